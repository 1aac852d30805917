"""Videos and sounds as people have them: turned, mirrored, of oblong pixels, with covers, cut, of many channels, deadly to decoders."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import wave as wavefile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines import decoding_process, ingest_clips, load_job
from data_pipelines.cut_files import is_cut
from data_pipelines.decoding_process import DIED, MISSING, TOO_LARGE, TOO_SLOW, UNEXPECTED, decode_apart
from data_pipelines.sound_decoding import CUT, SoundRules, clip_of, recording_of
from data_pipelines.video_decoding import NO_FRAMES, UNREADABLE, Rules, clips_of
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import Manifest
from nexus_scale.data.shards import decode, read_samples
from tests.decoders import growth, obedient
from tests.distributed import script, until

av = pytest.importorskip("av")

RED, GREEN, BLUE, GREY = (220, 30, 30), (30, 200, 30), (30, 30, 220), (128, 128, 128)
UPRIGHT = np.zeros((32, 64, 3), np.uint8)
UPRIGHT[:16, :32], UPRIGHT[:16, 32:], UPRIGHT[16:, :32], UPRIGHT[16:, 32:] = RED, GREEN, BLUE, GREY
"""What a player shows: no turn and no mirror image of it is the same."""
CODECS = {"mp4": "libx264", "mov": "libx264", "matroska": "libx264", "webm": "libvpx-vp9"}


def film(
    container: str = "mp4",
    pixels: np.ndarray = UPRIGHT,
    frames: int = 6,
    *,
    degrees: int = 0,
    hflip: bool = False,
    **settings: Any,
) -> bytes:
    """A video of one picture, which its display matrix turns and mirrors."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as opened:
        stream = opened.add_stream(settings.pop("codec", CODECS.get(container)), rate=10)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = settings.pop("pix_fmt", "yuv420p")
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        if degrees or hflip:
            stream.set_display_rotation(degrees, hflip=hflip)
        for _ in range(frames):
            opened.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        opened.mux(stream.encode())
    return buffer.getvalue()


def stored(degrees: int, hflip: bool) -> np.ndarray:
    """What must be stored for `UPRIGHT` to be shown: FFmpeg turns against the clock, and then mirrors."""
    return np.ascontiguousarray(np.rot90(UPRIGHT[:, ::-1] if hflip else UPRIGHT, -degrees // 90))


def corners(picture: np.ndarray) -> list[str]:
    """Names of the colours at the four corners of (H, W, 3), row by row."""
    height, width = picture.shape[:2]
    names = {"red": RED, "green": GREEN, "blue": BLUE, "grey": GREY}
    found = []
    for y in (height // 4, height - height // 4):
        for x in (width // 4, width - width // 4):
            found.append(min(names, key=lambda name: np.abs(picture[y, x].astype(int) - names[name]).sum()))
    return found


def one_clip(data: bytes, size: tuple[int, int] = (32, 64), frames: int = 3) -> Any:
    clips, dropped = clips_of(data, Rules(size, frames, 10.0))
    assert len(clips) == 1 and not dropped, dropped
    return clips[0]


# ------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(
    ("container", "degrees", "hflip"),
    [
        (container, degrees, hflip)
        for container in CODECS
        for degrees in (0, 90, 180, 270)
        for hflip in ((False, True) if container in ("mp4", "mov") else (False,))  # Matroska has a turn and no mirror
    ],
)
def test_videos_are_upright_as_players_show_them(container: str, degrees: int, hflip: bool) -> None:
    clip = one_clip(film(container, stored(degrees, hflip), degrees=degrees, hflip=hflip))
    assert clip.original == (32, 64)
    for frame in clip.frames:
        assert corners(frame) == ["red", "green", "blue", "grey"]


def test_turned_videos_come_upright_out_of_the_job(tmp_path: Path) -> None:
    for degrees in (0, 90, 180, 270):
        (tmp_path / "films").mkdir(exist_ok=True)
        (tmp_path / f"films/{degrees}.mp4").write_bytes(film(pixels=stored(degrees, False), degrees=degrees))
        (tmp_path / f"films/{degrees}.txt").write_text(f"turned by {degrees}")
    roots = {"data_root": tmp_path, "runs_root": tmp_path}
    load_job("ingest_clips").run(
        source="films", output="clips", size="32x64", frames=3, fps=10.0, heldout=0.0, workers=0, **roots
    )
    manifest = Manifest.load(tmp_path / "clips/train/clips")
    seen = []
    for shard in manifest.shards:
        for _, members in read_samples(manifest.folder / shard.file):
            video = decode("video.npy", members["video.npy"])
            assert corners(video[:, 0].transpose(1, 2, 0)) == ["red", "green", "blue", "grey"]
            seen.append(members["txt"].decode())
    assert sorted(seen) == [f"turned by {degrees}" for degrees in (0, 180, 270, 90)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_of_an_animated_webp_turns_all_its_frames(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    # How a picture is stored that this orientation brings upright.
    undo = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    image = Image.fromarray(UPRIGHT)
    if orientation in undo:
        image = image.transpose(Image.Transpose[undo[orientation]])
    other = image.copy()
    other.putpixel((0, 0), (9, 9, 9))
    buffer = io.BytesIO()
    image.save(
        buffer, "WEBP", save_all=True, append_images=[other, image], duration=100, lossless=True, exif=exif.tobytes()
    )
    clip = one_clip(buffer.getvalue())
    assert clip.original == (32, 64) and all(
        corners(frame) == ["red", "green", "blue", "grey"] for frame in clip.frames
    )


@pytest.mark.parametrize("degrees", [0, 90])
def test_pixels_become_square(degrees: int) -> None:
    """32 x 32 stored, pixels twice as wide as high: shown as 32 x 64, or turned as 64 x 32."""
    narrow = np.ascontiguousarray(np.rot90(UPRIGHT[:, ::2], -degrees // 90)) if degrees else UPRIGHT[:, ::2].copy()
    aspect = Fraction(1, 2) if degrees else Fraction(2)  # of the stored pixels
    clip = one_clip(film(pixels=narrow, degrees=degrees, sample_aspect_ratio=aspect))
    assert clip.original == (32, 64), "and nothing of it was cut away"
    assert corners(clip.frames[0]) == ["red", "green", "blue", "grey"]


def test_a_cover_is_no_video_and_does_not_stand_for_one() -> None:
    def file(*, moving: bool) -> bytes:
        buffer = io.BytesIO()
        picture = io.BytesIO()
        Image.fromarray(UPRIGHT).save(picture, "PNG")
        with av.open(buffer, "w", format="mp4") as opened:
            cover = opened.add_stream("png", rate=1)
            cover.width, cover.height, cover.pix_fmt = 64, 32, "rgb24"
            cover.disposition = av.stream.Disposition.attached_pic
            sound = opened.add_stream("aac", rate=16000, layout="mono")
            if moving:
                video = opened.add_stream("libx264", rate=10)
                video.width, video.height, video.pix_fmt = 64, 32, "yuv420p"
            opened.mux(cover.encode(av.VideoFrame.from_ndarray(255 - UPRIGHT, format="rgb24")))
            opened.mux(cover.encode())
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 16000
            opened.mux(sound.encode(frame))
            opened.mux(sound.encode())
            for _ in range(6 if moving else 0):
                opened.mux(video.encode(av.VideoFrame.from_ndarray(UPRIGHT, format="rgb24")))
            if moving:
                opened.mux(video.encode())
        return buffer.getvalue()

    clip = one_clip(file(moving=True))
    assert corners(clip.frames[0]) == ["red", "green", "blue", "grey"]
    assert clips_of(file(moving=False), Rules((32, 64), 1, 10.0)) == ([], [NO_FRAMES])


def test_a_kind_of_video_without_a_decoder_is_dropped() -> None:
    data = film()
    at = data.index(b"avc1")
    for found in (at, data.find(b"avc1", at + 4)):
        if found >= 0:
            data = data[:found] + b"zzzz" + data[found + 4 :]
    assert clips_of(data, Rules((16, 16), 3, 10.0)) == ([], [UNREADABLE])


def test_ranges_and_depths_of_colours_are_the_streams_own() -> None:
    shown = np.full((32, 64, 3), 255, np.uint8)
    shown[:, 32:] = 0
    for settings in ({}, {"pix_fmt": "yuvj420p", "color_range": 2}, {"pix_fmt": "yuv420p10le"}, {"pix_fmt": "yuv444p"}):
        frame = one_clip(film(pixels=shown, **settings)).frames[0].astype(int)
        assert frame[16, 8].min() > 245 and frame[16, 56].max() < 10, settings
    (clip,), _ = clips_of(film(codec="libx265", pix_fmt="yuv420p10le", color_trc=16), Rules((32, 64), 3, 10.0))
    assert clip.transfer == "PQ"


def test_a_long_thin_frame_takes_no_more_memory_than_its_clip() -> None:
    image = Image.fromarray(np.tile(np.arange(8000, dtype=np.uint16).astype(np.uint8)[None, :, None], (1, 1, 3)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    clip = one_clip(buffer.getvalue(), (64, 64), frames=1)
    assert clip.frames.shape == (1, 64, 64, 3) and np.ptp(clip.frames.astype(int)) <= 2, (
        "one pixel of 8000, of its middle"
    )


def test_memory_is_that_of_the_clips_not_of_the_frames(tmp_path: Path) -> None:
    (tmp_path / "long.mp4").write_bytes(film(pixels=np.zeros((720, 1280, 3), np.uint8), frames=50, codec="mpeg4"))
    got = decode_apart(growth, tmp_path / "long.mp4", {"frames": 50})
    assert got.facts["mib"] < 25, "50 frames are 63 MiB as they are decoded, and 126 MiB as RGB"


# ------------------------------------------------------------------------------------------------- sounds

RATE = 16000
RULES = SoundRules(RATE)


def tone(hz: float = 440.0, seconds: float = 1.5, loudness: float = 0.3) -> np.ndarray:
    return (loudness * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def wav(channels: np.ndarray) -> bytes:
    """(C, T) of float32 as 16 bits."""
    buffer = io.BytesIO()
    with wavefile.open(buffer, "wb") as file:
        file.setparams((len(channels), 2, RATE, 0, "NONE", ""))
        file.writeframes(np.rint(channels.T * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


@pytest.mark.parametrize("count", [1, 2, 6, 7, 8, 12, 64])
def test_any_number_of_channels_becomes_their_mean(count: int) -> None:
    found, why = recording_of(wav(np.stack([tone()] * count)), RULES)
    assert found is not None and not why
    assert np.abs(found - tone()).max() < 1e-3


@pytest.mark.parametrize(
    ("kind", "bits", "stored"),
    [
        (1, 8, lambda wave: (wave * 127 + 128).astype(np.uint8)),
        (1, 32, lambda wave: (wave * 2.0**31).astype("<i4")),
        (3, 32, lambda wave: wave.astype("<f4")),
        (3, 64, lambda wave: wave.astype("<f8")),
    ],
)
def test_waves_of_any_depth_are_read(kind: int, bits: int, stored: Callable[[np.ndarray], np.ndarray]) -> None:
    found, why = recording_of(riff(kind, 1, RATE, bits, stored(tone()).tobytes()), RULES)
    assert found is not None and not why
    assert np.abs(found - tone()).max() < 0.02


def riff(kind: int, channels: int, rate: int, bits: int, samples: bytes) -> bytes:
    form = struct.pack(
        "<HHIIHH", kind, channels, rate, rate * channels * bits // 8 % 2**32, channels * bits // 8 % 2**16, bits
    )
    body = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(samples)) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(("channels", "rate"), [(0, RATE), (1, 0), (1, 1), (1, 2**32 - 1), (1000, RATE), (65535, RATE)])
def test_layouts_that_make_no_sense_are_dropped(channels: int, rate: int) -> None:
    assert recording_of(riff(1, channels, rate, 16, bytes(1 << 18)), RULES) == (
        None,
        "a recording that cannot be decoded",
    )


def test_channels_that_cancel_each_other_give_way_to_the_loudest() -> None:
    left = tone()
    for channels, expected in (
        ((left, -left), left),
        ((0.9 * left, -left), -left),
        ((left, 0 * left), left / 2),
        ((left, tone(700.0)), (left + tone(700.0)) / 2),
        ((1.1 * left, -1.1 * left, tone(700.0), -tone(700.0)), 1.1 * left),
    ):
        found, _ = recording_of(wav(np.stack(channels)), RULES)
        assert found is not None and np.abs(found - expected).max() < 1e-3
        assert clip_of(found, RULES)[0] is not None


def compressed(container: str, codec: str, seconds: float = 3.0, rate: int = 48000, **options: str) -> bytes:
    """Noise, by FFmpeg's encoders."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container, options=options) as opened:
        stream = opened.add_stream(codec, rate=rate, layout="mono")
        wave = np.rint(np.random.default_rng(0).normal(0, 3000, (1, round(seconds * rate)))).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
        frame.sample_rate = rate
        size = stream.codec_context.frame_size or 1024
        for part in av.AudioResampler(stream.format, "mono", rate, frame_size=size).resample(frame):
            opened.mux(stream.encode(part))
        opened.mux(stream.encode())
    return buffer.getvalue()


KINDS = [
    ("wav", "pcm_s16le"), ("wav", "pcm_f32le"), ("aiff", "pcm_s16be"), ("flac", "flac"), ("mp3", "libmp3lame"), ("ogg", "libopus"),
 ("mp4", "aac"), ("webm", "libopus"), ("w64", "pcm_s16le"),
]  # fmt: skip


@pytest.mark.parametrize(("container", "codec"), KINDS)
def test_a_recording_that_ends_before_it_says_is_dropped(container: str, codec: str) -> None:
    data = compressed(container, codec)
    found, why = recording_of(data, RULES)
    assert found is not None and not why and abs(len(found) / RATE - 3.0) < 0.1
    for share in (0.3, 0.6, 0.9):
        found, why = recording_of(data[: round(share * len(data))], RULES)
        assert found is None and why in (CUT, "a recording that cannot be decoded"), share
        assert why == CUT or container in ("mp4", "flac"), (
            "without an index, or with half a frame, nothing can be decoded"
        )


def test_an_mp3_without_a_header_of_its_length_is_cut_where_its_last_frame_is() -> None:
    for rate in (16000, 44100, 48000):  # MPEG 2 and MPEG 1
        data = compressed("mp3", "libmp3lame", 1.0, rate=rate, write_xing="0")
        assert b"Xing" not in data and b"Info" not in data
        assert recording_of(data, RULES)[1] == "" == recording_of(data + b"TAG" + bytes(125), RULES)[1]
        assert recording_of(data[: len(data) // 2 + 1], RULES) == (None, CUT)


@pytest.mark.parametrize("declared", [0xFFFFFFFF, 0x7FFFFFFF, 0])
def test_a_stream_of_unknown_length_is_taken_as_it_is(declared: int) -> None:
    data = wav(tone()[None])
    at = data.index(b"data") + 4
    open_end = data[:4] + struct.pack("<I", 0xFFFFFFFF) + data[8:at] + struct.pack("<I", declared) + data[at + 4 :]
    found, why = recording_of(open_end, RULES)
    assert not is_cut(io.BytesIO(open_end))
    assert declared == 0 or (found is not None and len(found) == len(tone())), why


# ------------------------------------------------------------------------------------------------- the process


def test_a_decoder_that_dies_hangs_or_swells_costs_its_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding_process, "CPU_S", 1)
    monkeypatch.setattr(decoding_process, "MEMORY_BYTES", 256 << 20)
    for said, reason, details in (
        ("die", DIED, "SIGSEGV"), ("hang", TOO_SLOW, "SIGXCPU"), ("swell", TOO_LARGE, ""), ("raise", UNEXPECTED, "LookupError: of ours"),
        ("exit", DIED, "exit code 3"),
    ):  # fmt: skip
        file = tmp_path / said
        file.write_text(said)
        got = decode_apart(obedient, file, {"bytes": 1 << 30})
        assert got.reason == reason and details in got.details and not got.arrays, said
        (tmp_path / "good").write_text("well done")
        after = decode_apart(obedient, tmp_path / "good", {})
        assert (
            after.facts["name"] == "good"
            and after.arrays[0].tobytes() == b"well done"
            and after.arrays[1].shape == (0, 3)
        )
        assert after.facts["process"] != os.getpid()


def test_what_is_no_file_is_missing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("nothing", "pipe", ".", "a\0b", "\udcff"):
        assert decode_apart(obedient, f"{tmp_path}/{name}", {}).reason == MISSING


def test_a_server_that_was_killed_is_started_again(tmp_path: Path) -> None:
    (tmp_path / "good").write_text("well done")
    decode_apart(obedient, tmp_path / "good", {})
    server = decoding_process._server
    assert server is not None
    server.kill()
    server.wait()
    assert decode_apart(obedient, tmp_path / "good", {}).facts["name"] == "good"


LEAVING = """
import sys, threading, time
from data_pipelines import decoding_process
from tests.decoders import obedient
threading.Thread(target=decoding_process.decode_apart, args=(obedient, sys.argv[1], {}), daemon=True).start()
while decoding_process._server is None:
    time.sleep(0.01)
print(decoding_process._server.pid, flush=True)
time.sleep(600)
"""


def test_a_job_that_is_killed_leaves_no_decoder_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("hang")
    process = script(LEAVING, str(tmp_path / "file"), log=tmp_path / "log")
    until(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text().strip())
    server = int((tmp_path / "log").read_text())
    until(lambda: len(of_session(server)) == 2)
    process.kill()
    process.join()
    until(lambda: not of_session(server))
    assert (tmp_path / "log").read_text().split() == [str(server)], "and nothing is printed"


def of_session(leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if os.getsid(int(entry.name)) == leader:
                found.append(int(entry.name))
    return found


def test_a_video_that_kills_its_decoder_is_counted_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_clips, "answer", obedient)
    (tmp_path / "films").mkdir()
    (tmp_path / "films/deadly.mp4").write_text("die")
    (tmp_path / "films/deadly.txt").write_text("a film that kills")
    with pytest.raises(UserError, match=r"1 of 1 videos are broken.* kills the process .*deadly\.mp4"):
        load_job("ingest_clips").run(
            source="films",
            output="clips",
            size="16x16",
            frames=3,
            fps=10.0,
            workers=0,
            data_root=tmp_path,
            runs_root=tmp_path,
        )
    note = json.loads(next((tmp_path / "clips").rglob("*.note.json")).read_text())
    assert note["account"]["items"] == [{"place": "deadly", "reason": DIED, "detail": "SIGSEGV"}]
