"""Videos to clips: the rules, each with a video whose answer is known, and the job around them."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import ingest_clips, load_job
from data_pipelines.decoding_process import MISSING
from data_pipelines.shard_plan import Work
from data_pipelines.video_decoding import CUT, NO_FRAMES, STILL, TOO_SHORT, UNREADABLE, Rules, clips_of
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import Manifest
from nexus_scale.data.shards import decode, read_samples

av = pytest.importorskip("av")

LEVELS = [20 * i for i in range(12)]
"""Frame i of the test videos is a grey of this level, shown from i / 10 s on."""


def grey_frames(size: tuple[int, int] = (16, 16)) -> list[Image.Image]:
    return [Image.new("RGB", size, (level,) * 3) for level in LEVELS]


def encoded(extension: str, frames: list[Image.Image] | None = None) -> bytes:
    frames = frames or grey_frames()
    buffer = io.BytesIO()
    if extension in ("webp", "gif", "png"):
        lossless = {"lossless": True} if extension == "webp" else {}
        frames[0].save(buffer, extension, save_all=True, append_images=frames[1:], duration=100, loop=0, **lossless)
        return buffer.getvalue()
    with av.open(buffer, "w", format=extension) as container:
        stream = container.add_stream({"mp4": "libx264", "webm": "libvpx-vp9"}[extension], rate=10)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        for image in frames:
            for packet in stream.encode(av.VideoFrame.from_image(image)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def levels(data: bytes, extension: str, **rules: Any) -> list[list[int]]:
    """The level of each frame of each clip, to the nearest that the videos hold: codecs are off by a few."""
    clips, dropped = clips_of(data, Rules(**{"size": (16, 16), "frames": 3, "fps": 10.0} | rules))
    assert not dropped
    return [[round(float(frame.mean()) / 20) * 20 for frame in clip.frames] for clip in clips]


@pytest.mark.parametrize("extension", ["mp4", "webm", "gif", "webp"])
def test_frames_are_those_that_are_shown_at_the_times_asked_for(extension: str) -> None:
    data = encoded(extension)
    assert levels(data, extension, fps=10.0) == [LEVELS[:3]]
    assert levels(data, extension, fps=5.0) == [LEVELS[0:6:2]]
    assert levels(data, extension, fps=20.0, frames=4) == [[0, 0, 20, 20]]
    assert levels(data, extension, frames=5, max_clips=9) == [LEVELS[:5], LEVELS[5:10]], "the rest is left out"
    starts = [clip.start_seconds for clip in clips_of(data, Rules((16, 16), 5, 10.0, max_clips=2))[0]]
    assert starts == [0.0, 0.5]


@pytest.mark.parametrize("extension", ["mp4", "webm", "gif", "webp"])
def test_broken_files_are_dropped_and_never_raise(extension: str) -> None:
    data, rules = encoded(extension), Rules((16, 16), 3, 10.0)
    for broken in (b"", b"not a video", data[: len(data) // 8], data[len(data) // 2 :]):
        clips, dropped = clips_of(broken, rules)
        assert not clips and len(dropped) == 1 and dropped[0] in (CUT, UNREADABLE, NO_FRAMES, TOO_SHORT)


@pytest.mark.parametrize("extension", ["mp4", "webm", "gif", "webp", "png"])
def test_videos_that_end_before_they_say_are_dropped(extension: str) -> None:
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) for _ in range(12)]
    data, rules = encoded(extension, noise), Rules((16, 16), 3, 10.0)
    assert len(clips_of(data, rules)[0]) == 1
    for share in (0.5, 0.7, 0.95):  # what is left would do for a clip
        clips, dropped = clips_of(data[: round(share * len(data))], rules)
        assert not clips and dropped in ([CUT], [UNREADABLE]), share
        assert dropped == [CUT] or extension == "mp4", "its index is at the end"


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), float("inf")])
def test_a_share_of_bad_videos_is_one(tmp_path: Path, share: float) -> None:
    with pytest.raises(UserError, match=r"max_bad: input should be"):
        ingest(tmp_path, "clips", max_bad=share)


def test_short_videos_are_dropped_or_played_again() -> None:
    data = encoded("webp", grey_frames()[:3])
    assert clips_of(data, Rules((16, 16), 5, 10.0)) == ([], [TOO_SHORT])
    assert levels(data, "webp", frames=5, loop=True) == [[0, 20, 40, 0, 20]]
    picture = encoded("webp", grey_frames()[:1])
    assert clips_of(picture, Rules((16, 16), 5, 10.0, loop=True)) == ([], [TOO_SHORT]), "a picture is no video"


def test_stills_are_dropped_by_their_motion() -> None:
    still = [Image.new("RGB", (16, 16), (100, 100, 100))] * 8
    moving = [*still[:4], *grey_frames()[:4]]
    data = encoded("mp4", [*still, *moving])
    clips, dropped = clips_of(data, Rules((16, 16), 8, 10.0, max_clips=2, min_motion=5.0))
    assert len(clips) == 1 and dropped == [STILL]
    assert clips[0].start_seconds == 0.8


def test_frames_cover_the_size_and_transparency_is_white() -> None:
    wide = Image.new("RGBA", (48, 16), (0, 0, 0, 0))
    wide.paste((255, 0, 0, 255), (16, 0, 32, 16))
    frames = [wide, wide.rotate(180), wide]
    frames[1].putpixel(
        (47, 15), (9, 9, 9, 128)
    )  # libwebp drops the alpha of an animation whose frames do not vary in it
    (clip,), _ = clips_of(encoded("webp", frames), Rules((16, 32), 3, 10.0))
    assert clip.frames.shape == (3, 16, 32, 3) and clip.original == (16, 48)
    assert clip.frames[0, 8, 16].tolist() == [255, 0, 0], "the middle stays"
    assert clip.frames[0, 8, 1].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    "changes", [{"frames": 0}, {"fps": 0.0}, {"size": (0, 16)}, {"max_clips": 0}, {"min_motion": 300.0}]
)
def test_rules_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="expected"):
        Rules(**{"size": (16, 16), "frames": 3, "fps": 10.0} | changes)


# ------------------------------------------------------------------------------------------------------ the job

OPTIONS: dict[str, Any] = {
    "size": "16x16",
    "frames": 3,
    "fps": 10.0,
    "shard_videos": 4,
    "heldout": 0.4,
    "max_bad": 0.2,
}


def table(root: Path, count: int = 20) -> Path:
    """A table of videos of all kinds; one is broken, one too short, one is missing; two and two share a group."""
    folder = root / "videos"
    folder.mkdir(parents=True)
    kinds = [encoded(extension) for extension in ("mp4", "webm", "gif", "webp")]
    rows = []
    for i in range(count):
        extension = ("mp4", "webm", "gif", "webp")[i % 4]
        data = {3: encoded("webp", grey_frames()[:2]), 5: b"broken"}.get(i, kinds[i % 4])
        if i != 8:
            (folder / f"{i:02d}.{extension}").write_bytes(data)
        rows.append({"path": f"videos/{i:02d}.{extension}", "caption": f"caption {i}", "group": f"g{i // 2}"})
    with (root / "videos.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root / "videos.csv"


def ingest(root: Path, output: str, workers: int | None = 0, **changes: Any) -> dict[str, Any]:
    given = {"source": {"path": "videos.csv", "group_key": "group"}, "output": output, **OPTIONS, **changes}
    roots = {"data_root": root, "runs_root": root}
    load_job("ingest_clips").run(**given, workers=workers, **roots)
    assert load_job("ingest_clips").done(**given, **roots)
    report: dict[str, Any] = json.loads((root / output / ingest_clips.REPORT).read_text())
    return report


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file but the notes of the work."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_table_becomes_shards_and_what_is_dropped_is_counted(tmp_path: Path) -> None:
    table(tmp_path)
    report = ingest(tmp_path, "clips")
    assert (report["read"], report["used"]) == (20, 17)
    assert report["dropped"] == {MISSING: 1, UNREADABLE: 1, TOO_SHORT: 1}
    places = {item["place"]: item["reason"] for item in report["items"]}
    assert places == {"videos.csv:10": MISSING, "videos.csv:7": UNREADABLE, "videos.csv:5": TOO_SHORT}
    assert sum(report["clips"].values()) == 17 and set(report["clips"]) == {"train", "heldout"}
    groups: dict[str, set[str]] = {}
    for split in ("train", "heldout"):
        manifest = Manifest.load(tmp_path / "clips" / split / "clips")
        assert manifest.samples == report["clips"][split]
        assert manifest.fields["video"].shape == (3, 3, 16, 16)
        assert manifest.rates == {"video": 10.0}
        for shard in manifest.shards:
            for _, members in read_samples(manifest.folder / shard.file):
                video = decode("video.npy", members["video.npy"])
                assert video.shape == (3, 3, 16, 16) and video.dtype == np.uint8
                assert [round(float(video[:, f].mean()) / 20) * 20 for f in range(3)] == LEVELS[:3]
                caption = members["txt"].decode()
                groups.setdefault(split, set()).add(str(int(caption.split()[1]) // 2))
    assert not groups["train"] & groups["heldout"], "a group is in one split"


def test_file_names_of_any_bytes_are_read(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for name in (b"caf\xe9", "na\u00efve [2024]".encode(), b"new\nline", b"-dash", b"two words"):
        place = os.fsencode(tmp_path / "videos") + b"/" + name
        Path(os.fsdecode(place + b".mp4")).write_bytes(encoded("mp4"))
        Path(os.fsdecode(place + b".txt")).write_text("a caption")
    report = ingest(tmp_path, "clips", source="videos", heldout=0.0)
    assert (report["read"], report["used"]) == (5, 5)
    sent = Work("a.tar", "", [["\udce9.mp4"]], {}).row()
    assert Work.of({name: text.encode().decode() for name, text in sent.items()}).inputs == [["\udce9.mp4"]]


def test_videos_without_captions_serve_an_autoencoder_and_images_stand_beside_them(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/a.mp4").write_bytes(encoded("mp4"))
    (tmp_path / "videos/b.gif").write_bytes(encoded("gif"))
    (tmp_path / "videos/notes.url").write_text("somewhere")
    (tmp_path / "videos/left.mp4").write_bytes(encoded("mp4"))
    deep = np.full((16, 16), 40 * 257, np.uint16)
    Image.fromarray(deep).save(tmp_path / "videos/c.png")
    Image.new("RGB", (16, 16), (80, 80, 80)).save(tmp_path / "videos/d.bmp")
    report = ingest(tmp_path, "clips", source={"path": "videos", "ignore": ["left.*"]}, frames=1, heldout=0.0)
    assert report["used"] == 4 and sum(report["clips"].values()) == 4
    manifest = Manifest.load(tmp_path / "clips/train/clips")
    assert set(manifest.fields) == {"video", "json"}
    found = {}
    for shard in manifest.shards:
        for key, members in read_samples(manifest.folder / shard.file):
            found[key] = round(float(decode("video.npy", members["video.npy"]).mean()))
    assert found["c-000"] == 40, "16 bits are scaled, not clipped"
    assert found["d-000"] == 80 and {"a-000", "b-000"} < set(found)
    (tmp_path / "videos/a.txt").write_text("now one has a caption")
    report = ingest(tmp_path, "captioned", source="videos", heldout=0.0, max_bad=1.0)
    assert report["used"] == 1 and sum(report["dropped"].values()) == report["read"] - 1
    assert {"videos/b.gif", "videos/left.mp4"} <= {item["place"] for item in report["items"]}


def test_classes_are_numbered_by_their_names_where_all_videos_have_one(tmp_path: Path) -> None:
    table(tmp_path)
    ingest(tmp_path, "clips", source={"path": "videos.csv", "group_key": "group", "label_column": "group"})
    for split in ("train", "heldout"):
        manifest = Manifest.load(tmp_path / "clips" / split / "clips")
        assert manifest.fields["label"].shape == () and "label" in manifest.fields
        for shard in manifest.shards:
            for _, members in read_samples(manifest.folder / shard.file):
                assert f"g{int(members['cls'])}" == json.loads(members["json"])["group"]  # g0 .. g9, by the alphabet
    ingest(tmp_path, "without")
    assert "label" not in Manifest.load(tmp_path / "without" / "train" / "clips").fields
    with pytest.raises(UserError, match="no column 'grop'"):
        ingest(tmp_path, "wrong", source={"path": "videos.csv", "label_column": "grop"})


def test_a_rerun_redoes_nothing_and_a_broken_off_run_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path)
    ingest(tmp_path, "whole")
    made: list[str] = []
    real = ingest_clips.make_row

    def failing(row: dict[str, Any]) -> int:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(row["output"])
        return real(row)

    monkeypatch.setattr(ingest_clips, "make_row", failing)
    with pytest.raises(KeyboardInterrupt):
        ingest(tmp_path, "broken")
    assert not (tmp_path / "broken" / ingest_clips.REPORT).exists()
    again: list[str] = []
    monkeypatch.setattr(ingest_clips, "make_row", lambda row: (again.append(row["output"]), real(row))[1])
    ingest(tmp_path, "broken")
    assert again and not set(again) & set(made), "what was finished is not redone"
    shards = {name: h for name, h in contents(tmp_path / "whole").items() if name.endswith(".tar")}
    assert shards == {name: h for name, h in contents(tmp_path / "broken").items() if name.endswith(".tar")}
    again.clear()
    ingest(tmp_path, "broken")
    assert not again
    (tmp_path / "videos" / "00.mp4").write_bytes(encoded("mp4", grey_frames()[::-1]))
    ingest(tmp_path, "broken")
    assert len(again) == 1, "one video changed: its shard is made again"
    again.clear()
    for path in (tmp_path / "videos").iterdir():
        os.utime(path)
    ingest(tmp_path, "broken")
    assert not again, "files that were only touched are the same"
    text = (tmp_path / "videos.csv").read_text()
    (tmp_path / "videos.csv").write_text(text.replace("caption 13", "CAPTION 13", 1))
    assert text != (tmp_path / "videos.csv").read_text()
    ingest(tmp_path, "broken")
    assert len(again) == 1, "one caption changed: its shard is made again"
    kept = contents(tmp_path / "broken")
    with pytest.raises(UserError, match=r"made with other options \(fps differ\)"):
        ingest(tmp_path, "broken", fps=3)
    assert contents(tmp_path / "broken") == kept


@pytest.mark.slow
@pytest.mark.ray
def test_ray_data_gives_the_same_bits(tmp_path: Path) -> None:
    table(tmp_path)
    here, there = ingest(tmp_path, "here"), ingest(tmp_path, "there", workers=2)
    assert here["manifests"] == there["manifests"] and here["dropped"] == there["dropped"]


def test_too_many_broken_videos_and_rules_that_leave_nothing_end_the_job(tmp_path: Path) -> None:
    table(tmp_path)
    with pytest.raises(UserError, match=r"2 of 20 videos are broken.*max_bad"):
        ingest(tmp_path, "clips", max_bad=0.05)
    with pytest.raises(UserError, match=r"no clip for training.*too short"):
        ingest(tmp_path, "clips", frames=999)
    with pytest.raises(UserError, match="height and width"):
        ingest(tmp_path, "clips", size="16")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no such files .*mp4"):
        ingest(tmp_path, "clips", source="empty")
