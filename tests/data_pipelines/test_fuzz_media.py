"""Videos and sounds under a mutator: whatever their bytes are, a job goes on, and what it cannot use is counted with its reason."""

from __future__ import annotations

import functools
import io
import json
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines import decoding_process, ingest_clips, ingest_speech
from data_pipelines.sound_decoding import SoundRules
from data_pipelines.video_decoding import Rules
from tests.data_pipelines.test_raw_media import UPRIGHT, compressed, film, tone, wav
from tests.fuzz import CPU_S, exit_code, fuzz

pytest.importorskip("av")


def animation(kind: str) -> bytes:
    frames = [Image.fromarray(np.roll(UPRIGHT, step, 1)) for step in range(5)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=100, loop=0)
    return buffer.getvalue()


VIDEOS: dict[str, Callable[[], bytes]] = {
    "mp4": lambda: film(degrees=90, sample_aspect_ratio=2),
    "mov": lambda: film("mov", hflip=True),
    "mkv": lambda: film("matroska"),
    "webm": lambda: film("webm"),
    "avi": lambda: film("avi", codec="mjpeg", pix_fmt="yuvj420p"),
    "gif": lambda: animation("GIF"),
    "webp": lambda: animation("WEBP"),
    "apng": lambda: animation("PNG"),
}
SOUNDS: dict[str, Callable[[], bytes]] = {
    "wav": lambda: wav(np.stack([tone()] * 2)),
    "flac": lambda: compressed("flac", "flac", 1.5),
    "mp3": lambda: compressed("mp3", "libmp3lame", 1.5),
    "ogg": lambda: compressed("ogg", "libopus", 1.5),
    "m4a": lambda: compressed("mp4", "aac", 1.5),
    "aiff": lambda: compressed("aiff", "pcm_s16be", 1.5),
}


@functools.cache
def whole(kinds: str, extension: str) -> bytes:
    return {"video": VIDEOS, "sound": SOUNDS}[kinds][extension]()


ODD = (
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    64,
    127,
    128,
    255,
    256,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFE,
    0xFFFFFFFF,
)


def mutated(rng: random.Random, data: bytes) -> bytes:
    """The file with one to six changes, most of them in its headers."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        size = len(changed)
        if not size:
            break
        at = rng.randrange(min(size, rng.choice((64, 512, 4096, size))))
        if rng.random() < 0.3:
            at = max(0, size - 1 - at)
        length = rng.choice((1, 2, 4, 8, 64))
        match rng.randrange(9):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                changed[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice(ODD))
            case 3:
                changed[at : at + 2] = struct.pack(rng.choice("<>") + "H", rng.choice(ODD) & 0xFFFF)
            case 4:
                del changed[at : at + length]
            case 5:
                changed[at:at] = rng.randbytes(length)
            case 6:
                other = rng.randrange(size)
                changed[at : at + length] = changed[other : other + length]
            case 7:
                changed[at:] = b"" if rng.random() < 0.3 else changed[at:] + changed[at : at + 512]
            case 8:
                changed[at : at + length] = bytes(length)
    return bytes(changed)


def prepare(rng: random.Random, folder: Path, kinds: str, extensions: Sequence[str]) -> list[str]:
    extension = rng.choice(extensions)
    data = mutated(rng, whole(kinds, extension))
    place = folder / "data" / "media"
    place.mkdir(parents=True)
    (place / f"case.{extension}").write_bytes(data)
    (place / "case.txt").write_text("never known")
    if rng.randrange(8):
        return ["alone", str(place / f"case.{extension}")]
    (place / f"good.{extension}").write_bytes(whole(kinds, extension))
    (place / "good.txt").write_text("as it was")
    return ["job", str(folder / "data")]


def a_video(rng: random.Random, folder: Path) -> list[str]:
    return prepare(rng, folder, "video", list(VIDEOS))


def a_sound(rng: random.Random, folder: Path) -> list[str]:
    return prepare(rng, folder, "sound", list(SOUNDS))


def decode_video(how: str, path: str) -> int:
    decoding_process.CPU_S = CPU_S // 2
    if how == "alone":
        got = decoding_process.decode_apart(ingest_clips.answer, path, Rules((16, 32), 3, 10.0).to_json())
        assert got.reason or got.facts["dropped"] or len(got.arrays) == 1
        assert got.reason != decoding_process.UNEXPECTED, got.details
        return 0
    options = "--source media --output clips --size 16x32 --frames 3 --fps 10 --heldout 0 --max-bad 1 --workers 0"
    return job(ingest_clips.main, [*options.split(), "--data-root", path], Path(path) / "clips")


def decode_sound(how: str, path: str) -> int:
    decoding_process.CPU_S = CPU_S // 2
    if how == "alone":
        got = decoding_process.decode_apart(ingest_speech.answer, path, SoundRules(16000).to_json())
        assert got.reason or got.facts["why"] or len(got.arrays) == 1
        assert got.reason != decoding_process.UNEXPECTED, got.details
        return 0
    options = (
        "--source media --output speech --sample-rate-hz 16000 --heldout 0 --max-bad 1 --workers 0 --language none"
    )
    return job(ingest_speech.main, [*options.split(), "--data-root", path], Path(path) / "speech")


def job(main: Callable[[list[str]], int], arguments: list[str], output: Path) -> int:
    """Runs it over a good file and a mutated one: both are accounted for, and the good one is used."""
    code = exit_code(lambda: main(arguments))
    if not code:
        report = json.loads((output / "ingest_report.json").read_text())
        assert report["read"] == 2 == report["used"] + sum(report["dropped"].values()), report
        assert report["used"] >= 1, report
    return code


def test_no_video_ends_a_job(tmp_path: Path) -> None:
    fuzz("clip", a_video, tmp_path, decode_video)


def test_no_sound_ends_a_job(tmp_path: Path) -> None:
    fuzz("sound", a_sound, tmp_path, decode_sound)
