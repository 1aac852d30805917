"""Images from every kind of source become data folders of ours, in a deterministic order, without leaks between splits."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from data_pipelines import ingest_images, load_job, rasterise_openmoji
from data_pipelines.fitting import fit
from data_pipelines.sources import OPENMOJI
from nexus_scale.contracts import UserError
from nexus_scale.data.images import decode_image, image_size
from nexus_scale.data.manifest import Manifest
from nexus_scale.data.shards import RawSample, read_samples


def picture(number: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def ingest(root: Path, output: str = "out", **options: Any) -> dict[str, Any]:
    ingest_images.run(output=output, data_root=root, runs_root=root, **options)
    return json.loads((root / output / "ingest_report.json").read_text())


def samples(root: Path, split: str = "train", output: str = "out") -> list[RawSample]:
    manifest = Manifest.load(root / output / split / "images")
    manifest.verify(deep=True)
    return [sample for shard in manifest.shards for sample in read_samples(manifest.folder / shard.file)]


def captions(root: Path, split: str = "train", output: str = "out") -> list[str]:
    return [sample.members["txt"].decode() for sample in samples(root, split, output)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images with captions beside them, four of them in JSON with a label."""
    for number in range(12):
        place = tmp_path / "photos" / f"day{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(encoded(picture(number)))
        if number < 4:
            (place / f"{number}.json").write_text(json.dumps({"caption": f"caption {number}", "label": "cat"}))
        else:
            (place / f"{number}.txt").write_text(f"caption {number}\n")
    return tmp_path


def test_openmoji_is_split_by_emoji_with_enough_prompts_of_each_group(tmp_path: Path) -> None:
    report = ingest(tmp_path, source="openmoji", resolution=32)
    described = {
        split: [json.loads(one.members["json"]) for one in samples(tmp_path, split)] for split in ("train", "heldout")
    }
    assert report["samples"] == {split: len(rows) for split, rows in described.items()}
    assert sum(report["samples"].values()) == sum(1 for _ in read_samples(OPENMOJI)) > 3000
    bases = {split: {row["base"] for row in rows} for split, rows in described.items()}
    assert not bases["train"] & bases["heldout"]
    prompts = Counter(group for group, _ in {(row["group"], row["caption"]) for row in described["heldout"]})
    assert set(prompts) == set(rasterise_openmoji.GROUPS)
    assert min(prompts.values()) >= 21
    people = [row["base"] for rows in described.values() for row in rows if row["group"] == "people-body"]
    held = len({row["base"] for row in described["heldout"] if row["group"] == "people-body"})
    assert 0.12 <= held / len(set(people)) <= 0.15
    manifest = Manifest.load(tmp_path / "out/train/images")
    assert len(manifest.shards) > 5
    assert manifest.buckets == ("32x32",)
    assert manifest.fields["image"].shape == (32, 32, 3)
    assert "OpenMoji" in manifest.attribution
    assert manifest.licence == "CC-BY-SA-4.0"
    # A shard is a mix of groups, not a run of one.
    first = [one.members["cls"] for one in samples(tmp_path)[:256]]
    assert len(set(first)) == 6


def test_openmoji_pictures_are_stored_as_they_are(tmp_path: Path) -> None:
    ingest(tmp_path, source="openmoji", heldout=0.0)
    original = {one.key: one.members["png"] for one in read_samples(OPENMOJI)}
    assert all(one.members["png"] == original[one.key] for one in samples(tmp_path))
    assert not (tmp_path / "out/heldout").exists()


def test_a_second_run_has_nothing_to_do_and_threads_do_not_matter(folder: Path) -> None:
    options = {"source": "photos", "heldout": 0.25, "shard_samples": 4}
    assert not ingest_images.done(output="out", data_root=folder, runs_root=folder, **options)
    ingest(folder, threads=1, **options)
    assert ingest_images.done(output="out", data_root=folder, runs_root=folder, **options)
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.is_file()}
    ingest(folder, threads=3, **options)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*") if path.is_file()}
    ingest(folder, "again", threads=3, **options)
    for path in before:
        other = folder / "again" / path.relative_to(folder / "out")
        assert other.read_bytes() == path.read_bytes(), path


def test_other_options_do_not_overwrite_data(folder: Path) -> None:
    ingest(folder, source="photos", seed=0)
    with pytest.raises(UserError, match=r"made with other options \(seed differ\)"):
        ingest(folder, source="photos", seed=1)


def test_a_folder_with_captions_beside_the_images(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    ingest(folder, source="photos", heldout=0.0)
    assert sorted(captions(folder)) == sorted(f"caption {n}" for n in range(12))
    for one in samples(folder):
        number = int(one.members["txt"].decode().split()[1])
        assert np.array_equal(decode_image(one.members["png"]), picture(number))
    assert "cls" not in samples(folder)[0].members
    assert "4 of 12 samples have a label" in caplog.text


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables_with_columns_of_any_name(folder: Path, kind: str) -> None:
    rows = [
        {"file": f"day{n % 2}/{n}.png", "text": f"row, {n}", "kind": "abc"[n % 3], "author": f"a{n // 4}"}
        for n in range(12)
    ]
    table = folder / f"table.{kind}"
    if kind == "parquet":
        pa.parquet.write_table(pa.Table.from_pylist(rows), table)
    elif kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    columns = {"path_column": "file", "caption_column": "text", "label_column": "kind", "group_key": "author"}
    spec = {"path": table.name, "root": "photos", **columns}
    report = ingest(folder, source=spec, heldout=0.34)
    assert report["labels"] == {"a": 0, "b": 1, "c": 2}
    authors: dict[str, set[str]] = {}
    for split in report["samples"]:
        for one in samples(folder, split):
            described = json.loads(one.members["json"])
            number = int(described["text"].split()[1])
            assert one.members["txt"].decode() == f"row, {number}"
            assert int(one.members["cls"]) == number % 3
            assert np.array_equal(decode_image(one.members["png"]), picture(number))
            authors.setdefault(split, set()).add(described["author"])
    assert not authors["train"] & authors.get("heldout", set())
    with pytest.raises(UserError, match=r"no column 'texts' \(caption_column\); did you mean 'text'"):
        ingest(folder, "other", source={**spec, "caption_column": "texts"})


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("in_memory", [True, False], ids=["shuffled", "streamed"])
def test_webdataset_tars_by_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool) -> None:
    if not in_memory:
        monkeypatch.setattr("data_pipelines.sources.IN_MEMORY", 0)
    (tmp_path / "wds").mkdir()
    for shard in range(2):
        members = {}
        for n in range(5):
            members |= {f"{n:03d}.jpg": encoded(picture(n), "JPEG"), f"{n:03d}.txt": f"{shard}/{n}".encode()}
        write_tar(tmp_path / f"wds/{shard}.tar", members)
    ingest(tmp_path, source="wds/*.tar", heldout=0.0, format="jpg")
    listed = [f"{shard}/{n}" for shard in range(2) for n in range(5)]
    assert sorted(captions(tmp_path)) == listed
    assert (captions(tmp_path) == listed) == (not in_memory)
    assert all(one.members["jpg"] == encoded(picture(int(one.members["txt"][2:])), "JPEG") for one in samples(tmp_path))


def test_webdataset_lists_of_shards(tmp_path: Path) -> None:
    """The notation of the webdataset package, which expands it."""
    (tmp_path / "wds").mkdir()
    for shard in range(4):
        members = {f"{n}.jpg": encoded(picture(n), "JPEG") for n in range(2)}
        members |= {f"{n}.txt": f"{shard}/{n}".encode() for n in range(2)}
        write_tar(tmp_path / f"wds/{shard:02d}.tar", dict(sorted(members.items())))
    ingest(tmp_path, source="wds/{00..01}.tar::wds/03.tar", heldout=0.0, format="jpg")
    assert sorted(captions(tmp_path)) == ["0/0", "0/1", "1/0", "1/1", "3/0", "3/1"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("pipe:touch hacked.tar", "would run a command"),
        ("wds/00.tar::pipe:touch hacked.tar", "would run a command"),
        ("https://example.org/{00..41}.tar", "got a URL"),
        ("wds/{00..09}.tar", "no such shard"),
        ("wds/{0..99999999999}.tar", "more than 1,000,000 shards"),
        (f"wds/{{0..{'9' * 30}}}.tar", "more than 1,000,000 shards"),
        ("wds/${HOME}.tar", "variables"),
        ("wds/{00..01.tar", "expected for example|no such shard"),
        ("wds/{notes,more}.txt", "no such shard|expected tars"),
    ],
)
def test_lists_of_shards_that_are_refused(source: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "wds").mkdir()
    write_tar(tmp_path / "wds/00.tar", {"0.png": encoded(picture(0)), "0.txt": b"a"})
    for name in ("notes", "more"):
        (tmp_path / f"wds/{name}.txt").write_text("no tar")
    with pytest.raises(UserError, match=words) as caught:
        ingest(tmp_path, source=source, heldout=0.0)
    assert caught.value.code == 3 and not list(tmp_path.rglob("hacked*"))


def test_sources_mix_by_weight_and_stay_interleaved(folder: Path) -> None:
    members = {}
    for n in range(30):
        members |= {f"{n}.png": encoded(picture(100 + n)), f"{n}.json": json.dumps({"caption": f"tar {n}"}).encode()}
    write_tar(folder / "many.tar", members)
    sources = [{"path": "photos", "weight": 1}, {"path": "many.tar", "weight": 2}]
    report = ingest(folder, sources=sources, heldout=0.0)
    mixed = [text.split()[0] for text in captions(folder)]
    assert Counter(mixed) == {"caption": 12, "tar": 24}
    assert report["left_out_by_weight"] == [0, 6]
    for end in range(1, len(mixed) + 1):
        assert abs(mixed[:end].count("tar") - 2 * end / 3) <= 1, end
    ingest(folder, "all", sources=["photos", "many.tar"], heldout=0.0)
    assert len(captions(folder, output="all")) == 42
    with pytest.raises(UserError, match="give all of them one, or none"):
        ingest(folder, "bad", sources=["photos", {"path": "many.tar", "weight": 1}])


def test_sizes_of_a_bucket_stay_and_others_are_fitted(tmp_path: Path) -> None:
    sizes = {"exact": (16, 24), "wide": (20, 60), "tall": (64, 32), "small": (8, 8)}
    (tmp_path / "in").mkdir()
    for number, (name, (height, width)) in enumerate(sizes.items()):
        (tmp_path / f"in/{name}.png").write_bytes(encoded(picture(number, height, width)))
        (tmp_path / f"in/{name}.txt").write_text(name)
    report = ingest(tmp_path, source="in", resolution=["16x24", [32, 16], 16], heldout=0.0)
    stored = {one.members["txt"].decode(): one.members["png"] for one in samples(tmp_path)}
    assert stored["exact"] == (tmp_path / "in/exact.png").read_bytes()
    found = {name: image_size(data) for name, data in stored.items()}
    assert found == {"exact": (16, 24), "wide": (16, 24), "tall": (32, 16), "small": (16, 16)}
    assert report["enlarged"] == 1
    assert Manifest.load(tmp_path / "out/train/images").buckets == ("16x16", "16x24", "32x16")


def test_a_fitted_image_is_its_middle(tmp_path: Path) -> None:
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = (0, 255, 0)
    fitted = fit(encoded(pixels), [(16, 16)], "png")
    assert not isinstance(fitted, str)
    assert np.array_equal(decode_image(fitted.image), pixels[:, 16:32])


def test_transparency_and_rotation_are_resolved(tmp_path: Path) -> None:
    clear = np.zeros((4, 4, 4), np.uint8)
    fitted = fit(encoded(clear), [], "png")
    assert not isinstance(fitted, str)
    assert (decode_image(fitted.image) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned = fit(encoded(picture(0, 4, 6), exif=exif), [], "png")
    assert not isinstance(turned, str)
    assert np.array_equal(decode_image(turned.image), np.rot90(picture(0, 4, 6), -1))


def test_bad_samples_are_counted_and_too_many_stop_the_job(folder: Path) -> None:
    (folder / "photos/broken.png").write_bytes(encoded(picture(1))[:60])
    (folder / "photos/broken.txt").write_text("cut off")
    (folder / "photos/empty.png").write_bytes(encoded(picture(2)))
    (folder / "photos/empty.txt").write_text(" \n")
    (folder / "photos/alone.png").write_bytes(encoded(picture(3)))
    with pytest.raises(UserError, match=r"2 of 15 samples are bad, more than max_bad=0\.01"):
        ingest(folder, source="photos")
    report = ingest(folder, source="photos", max_bad=0.3)
    assert report["skipped"] == {
        "an empty or missing caption": 1,
        "an image that cannot be decoded, or is too large": 1,
        "no readable .txt or .json beside the image": 1,
    }
    assert sum(report["samples"].values()) == 12


def test_an_image_bomb_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = encoded(picture(0, 64, 64))
    monkeypatch.setattr("nexus_scale.data.images.MAX_PIXELS", 64 * 64 - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("pixels were decoded"))
    assert fit(bomb, [], "png") == "an image that cannot be decoded, or is too large"


def test_missing_files_of_a_table_are_bad_samples(folder: Path) -> None:
    (folder / "photos/t.csv").write_text("path,caption\nday0/0.png,here\nday0/nowhere.png,gone\nday1/1.png,too\n")
    report = ingest(folder, source="photos/t.csv", max_bad=0.5, heldout=0.0)
    assert report["skipped"] == {"a file that is missing or cannot be read": 1}
    assert sorted(captions(folder)) == ["here", "too"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "photo"}, "did you mean 'photos'"),
        ({"source": "empty"}, "no such files"),
        ({"source": "notes.md"}, "expected a folder, .csv"),
        ({"source": {"path": "photos", "wieght": 2}}, "unknown key 'wieght'; did you mean 'weight'"),
        ({"source": "photos", "heldout": 1.0}, r"heldout: .*less than 1; got 1\.0"),
        ({"source": "photos", "resolution": "big"}, "resolution"),
        ({"source": "photos", "format": "gif"}, "one of .jpg., .png., .webp."),
        ({}, "give `source`"),
        ({"source": "openmoji", "heldout_captions": 100}, "more than half"),
    ],
)
def test_mistakes_are_named(folder: Path, options: dict[str, Any], message: str) -> None:
    (folder / "empty").mkdir()
    (folder / "notes.md").write_text("x")
    with pytest.raises(UserError, match=message):
        ingest(folder, **options)


def test_jobs_by_name_check_their_options() -> None:
    with pytest.raises(UserError, match="did you mean 'ingest_images'"):
        load_job("ingest_image")
    job = load_job("ingest_images")
    places = {"data_root": Path("."), "runs_root": Path(".")}
    with pytest.raises(UserError, match="unknown key 'resolutoin'; did you mean 'resolution"):
        job.done(output="x", source="openmoji", resolutoin=32, **places)
    with pytest.raises(UserError, match="'output' is missing"):
        job.run(source="openmoji", **places)


def test_commands_show_their_options_and_report_mistakes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as leaving:
        ingest_images.main(["--help"])
    assert leaving.value.code == 0
    assert "--heldout" in capsys.readouterr().out
    code = ingest_images.main(["--source", "nowhere", "--output", "out", "--data-root", str(tmp_path)])
    assert code == 3
    assert "no such file or folder" in capsys.readouterr().err
    # A path from the current folder, as a shell completes it: named with what to give instead.
    (tmp_path / "here" / "photos [2024]").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    places = ["--output", "out", "--data-root", str(tmp_path / "data")]
    assert ingest_images.main(["--source", "photos [2024]", *places]) == 3
    assert f"{tmp_path / 'here' / 'photos [2024]'} is there: give this path" in capsys.readouterr().err


def test_the_shipped_tar_is_of_one_size_and_has_no_twin_pictures() -> None:
    seen: set[bytes] = set()
    for one in read_samples(OPENMOJI):
        pixels = decode_image(one.members["png"])
        assert pixels.shape == (32, 32, 3)
        described = json.loads(one.members["json"])
        assert rasterise_openmoji.GROUPS[described["label"]] == described["group"]
        assert described["caption"]
        seen.add(pixels.tobytes())
    assert len(seen) == 3125
    licence = (OPENMOJI.parent / "LICENSE.txt").read_text()
    assert "All emojis designed by OpenMoji" in licence
    assert "Attribution-ShareAlike 4.0 International" in licence


def test_rasterising_a_package_is_the_same_to_the_bit(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    package = tmp_path / "package"
    (package / "data").mkdir(parents=True)
    (package / "color/svg").mkdir(parents=True)
    (package / "package.json").write_text(json.dumps({"version": rasterise_openmoji.VERSION}))
    (package / "LICENSE.txt").write_text("the licence")
    rows = [("A1", "flags", "flag: X", "", "red"), ("A2", "flags", "flag: X and Y", "", "red")]
    rows += [("B1", "people-body", "hand", "", "blue"), ("B1-2", "people-body", "hand: dark", "B1", "navy")]
    rows += [("C1", "extras-openmoji", "logo", "", "lime")]
    catalogue = []
    for order, (code, group, name, base, colour) in enumerate(rows):
        catalogue.append(
            {"hexcode": code, "group": group, "annotation": name, "skintone_base_hexcode": base, "order": order}
        )
        svg = f'<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"><rect width="36" height="72" fill="{colour}"/></svg>'
        (package / f"color/svg/{code}.svg").write_text(svg)
    (package / "data/openmoji.json").write_text(json.dumps(catalogue))
    for output in ("a", "b"):
        rasterise_openmoji.run(package="package", size=16, output=output, data_root=tmp_path, runs_root=tmp_path)
    tars = [(tmp_path / output / "openmoji-16.tar").read_bytes() for output in ("a", "b")]
    assert tars[0] == tars[1]
    made = list(read_samples(tmp_path / "a/openmoji-16.tar"))
    assert [json.loads(one.members["json"])["base"] for one in made] == ["A1", "B1", "B1"]
    pixels = decode_image(made[0].members["png"])
    assert (pixels[:, :8] == (255, 0, 0)).all()
    assert (pixels[:, 8:] == 255).all()
    assert (tmp_path / "a/LICENSE.txt").read_text().endswith("the licence")
    given = {"package": "package", "size": 16, "output": "a", "data_root": tmp_path, "runs_root": tmp_path}
    assert rasterise_openmoji.done(**given)
    drawing = package / "color/svg/B1.svg"
    drawing.write_text(drawing.read_text().replace("blue", "gold"))
    assert not rasterise_openmoji.done(**given), "a drawing was edited"
    rasterise_openmoji.run(**given)
    assert (tmp_path / "a/openmoji-16.tar").read_bytes() != tars[0] and rasterise_openmoji.done(**given)
    with pytest.raises(UserError, match="npm pack openmoji@17"):
        rasterise_openmoji.run(package="nowhere.tgz", output="c", data_root=tmp_path, runs_root=tmp_path)
