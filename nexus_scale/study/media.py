"""Samples as a study shows them: read from whatever file they are in, and written again so that neither name, format nor level tells a
system. Pictures become PNGs, clips sheets of frames that a page steps through with one clock, sounds WAVs of one rate and loudness.
"""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageSequence

from data_pipelines import image_decoding, sound_decoding, video_decoding
from data_pipelines.decoding_process import Decoded, Decoder, decode_apart
from nexus_scale.contracts import UserError
from nexus_scale.data.errors import DataError
from nexus_scale.data.images import encode_png
from nexus_scale.data.sounds import decode_wav, encode_wav
from nexus_scale.io.durable import atomic_write
from nexus_scale.media.files import encode_image
from nexus_scale.metrics.loudness import loudness_lufs
from nexus_scale.metrics.resample import resample
from nexus_scale.study.folder import Kind, Medium

SUFFIXES: Mapping[str, Kind] = {
    ".png": "image", ".jpg": "image", ".jpeg": "image", ".webp": "image", ".gif": "clip", ".mp4": "clip", ".webm": "clip",
    ".mov": "clip", ".wav": "sound", ".flac": "sound", ".mp3": "sound", ".ogg": "sound",
}  # fmt: skip
"""Files that hold samples. A webp that moves is a clip."""

SHEET_SIDE = 2048
"""Pixels of a side of a sheet of frames: what phones decode at once."""
CLIP_PIXELS = 96 << 20
"""Of a clip, all frames together: what a phone holds twice."""
RATE_HZ, LONGEST_S = 48_000, 600.0
ONE_TIME = 1_000_000_000
LOUDNESS_LUFS, PEAK_DB = -23.0, -1.0
LEVELLED = f"ITU-R BS.1770-4, gated: {LOUDNESS_LUFS:g} LUFS, or of a prompt's sounds as much less as leaves each a peak of {PEAK_DB:g} dB"
"""How sounds are levelled, as study.yaml states it."""


@dataclass
class Read:
    """One sample, decoded: a picture (1, H, W, 3) or frames (F, H, W, 3) uint8; or a wave (C, T) float32 at `RATE_HZ`."""

    kind: Kind
    frames: np.ndarray | None = None
    rate_hz: float = 0.0
    wave: np.ndarray | None = None


def read_sample(file: Path) -> Read:
    """The sample in a file.

    Raises:
        UserError: it cannot be decoded, or PyAV is missing for its kind.
    """
    suffix = file.suffix.lower()
    if SUFFIXES[suffix] == "sound":
        return Read("sound", wave=_pcm(file) if suffix == ".wav" else _foreign_sound(file))
    if suffix in (".webp", ".gif"):
        frames, rate_hz = _animation(file)
    elif SUFFIXES[suffix] == "clip":
        found = _apart(file, frames_in)
        frames, rate_hz = found.arrays[0], float(found.facts["rate_hz"])
    else:
        frames, rate_hz = _picture(file)[None], 0.0
    return Read("clip", frames, rate_hz) if len(frames) > 1 else Read("image", frames)


def _pcm(file: Path) -> np.ndarray:
    """A WAV of 16-bit PCM, as runs draw them; other kinds are read as foreign sounds are."""
    try:
        sound = decode_wav(file.read_bytes())
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}", code=3) from None
    except DataError:
        return _foreign_sound(file)
    if sound.wave.shape[1] > LONGEST_S * sound.sample_rate_hz:
        raise UserError(too_long(str(file)), code=3)
    return resample(torch.from_numpy(sound.wave[:2]), sound.sample_rate_hz, RATE_HZ).numpy()


def _foreign_sound(file: Path) -> np.ndarray:
    return _apart(file, sound_in).arrays[0]


def too_long(name: str) -> str:
    return f"{name}: is longer than {LONGEST_S:g} s; cut it"


def _picture(file: Path) -> np.ndarray:
    try:
        return np.asarray(image_decoding.decode(file.read_bytes()).pixels.convert("RGB"))
    except (image_decoding.ImageError, OSError) as error:
        raise UserError(f"{file}: cannot be read as a picture: {error}", code=3) from None


def _animation(file: Path) -> tuple[np.ndarray, float]:
    """Frames and their rate of a file of frames, or of a still one in the same format."""
    try:
        with Image.open(file, formats=("WEBP", "GIF")) as image:
            count, (width, height) = getattr(image, "n_frames", 1), image.size
            if count * width * height > CLIP_PIXELS:
                raise UserError(too_large(str(file), count, width, height), code=3)
            frames, seconds = [], 0.0
            for frame in ImageSequence.Iterator(image):
                frames.append(np.asarray(on_white(frame)))
                seconds += frame.info.get("duration", 0) / 1000 or video_decoding.USUAL_DELAY_S
        return np.stack(frames), len(frames) / seconds
    except UserError:
        raise
    except Exception as error:  # damaged bytes raise every kind of error in Pillow and its libraries
        raise UserError(f"{file}: cannot be read as a picture or clip: {type(error).__name__}: {error}", 3) from None


def on_white(image: Image.Image) -> Image.Image:
    """The picture without transparency."""
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def too_large(name: str, count: int, width: int, height: int) -> str:
    return (
        f"{name}: {count} frames of {width}x{height} are more than the {CLIP_PIXELS >> 20} megapixels that a phone holds twice; "
        "make the clips shorter or smaller"
    )


def _apart(file: Path, decoder: Decoder) -> Decoded:
    found = decode_apart(decoder, file, {})
    if found.reason or not found.arrays:
        raise UserError(f"{file}: {found.reason or 'has no sample in it'} {found.details}".strip(), code=3)
    return found


def frames_in(file: BinaryIO, name: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """All frames of a video and their rate, as a decoder of data_pipelines.decoding_process."""
    frames: list[np.ndarray] = []
    begin = end = 0.0
    for frame in video_decoding.frames_of(file):
        begin, end = (begin if frames else frame.start), frame.end
        frames.append(np.asarray(on_white(frame.image())))
        height, width = frames[0].shape[:2]
        if len(frames) * height * width > CLIP_PIXELS:
            raise UserError(too_large(name, len(frames), width, height), code=3)
    return {"rate_hz": len(frames) / max(end - begin, 1e-3)}, [np.stack(frames)] if frames else []


def sound_in(file: BinaryIO, name: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """A sound's first two channels at `RATE_HZ`, as a decoder of data_pipelines.decoding_process."""
    blocks: list[np.ndarray] = []
    for block in sound_decoding.blocks_of(file, RATE_HZ):
        blocks.append(block[:2])
        if sum(block.shape[1] for block in blocks) > LONGEST_S * RATE_HZ:
            raise UserError(too_long(name), code=3)
    return {}, [np.nan_to_num(np.concatenate(blocks, 1).astype(np.float32))] if blocks else []


# ----------------------------------------------------------------------------------------------- written again


class Blinded:
    """Writes samples into a folder under random names, all with one time.

    Args:
        folder: media/ of a study.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, group: Sequence[Read]) -> list[Medium]:
        """The samples of one prompt, levelled to each other where they are sounds."""
        if group[0].kind == "sound":
            return self._sounds(group)
        return [self._clip(one) if one.kind == "clip" else self._image(one) for one in group]

    def _write(self, data: bytes, suffix: str) -> str:
        name = secrets.token_hex(8) + suffix
        atomic_write(self.folder / name, data, synced=False)
        os.utime(self.folder / name, (ONE_TIME, ONE_TIME))  # of each answer, too, that the server gives
        return name

    def _image(self, one: Read) -> Medium:
        assert one.frames is not None
        height, width = one.frames.shape[1:3]
        return Medium(parts=[self._write(encode_png(one.frames[0]), ".png")], size=(width, height))

    def _clip(self, one: Read) -> Medium:
        assert one.frames is not None
        count, height, width = one.frames.shape[:3]
        columns, rows = max(1, SHEET_SIDE // width), max(1, SHEET_SIDE // height)
        parts = []
        for begin in range(0, count, columns * rows):
            few = one.frames[begin : begin + columns * rows]
            used = math.ceil(len(few) / columns)
            sheet = np.zeros((used * columns, height, width, 3), np.uint8)
            sheet[: len(few)] = few
            sheet = sheet.reshape(used, columns, height, width, 3).swapaxes(1, 2)
            parts.append(self._write(encode_image(sheet.reshape(used * height, columns * width, 3), "webp"), ".webp"))
        return Medium(parts=parts, size=(width, height), frames=count, columns=columns, rows=rows, rate_hz=one.rate_hz)

    def _sounds(self, group: Sequence[Read]) -> list[Medium]:
        waves = [one.wave for one in group if one.wave is not None]
        written = []
        for wave, gain in zip(waves, gains_db(waves, RATE_HZ), strict=True):
            data = encode_wav(wave * np.float32(10 ** (gain / 20)), RATE_HZ)
            written.append(Medium(parts=[self._write(data, ".wav")], gain_db=round(gain, 3)))
        return written


def gains_db(waves: Sequence[np.ndarray], rate_hz: int) -> list[float]:
    """By how much each of some sounds is to be raised so that all are equally loud, see `LEVELLED`; 0 of silence."""
    loud = [loudness_lufs(wave, rate_hz) for wave in waves]
    room = [
        one + PEAK_DB - 20 * math.log10(float(np.abs(wave).max()))
        for one, wave in zip(loud, waves, strict=True)
        if one > -math.inf
    ]
    target = min([LOUDNESS_LUFS, *room])
    return [target - one if one > -math.inf else 0.0 for one in loud]


def spoilt(one: Read, rng: np.random.Generator) -> Read:
    """A copy that anyone tells from the sample: blurred to an eighth and under noise; a sound under noise of twice its power."""
    if one.wave is not None:
        power = float(np.square(one.wave, dtype=np.float64).mean())
        noise = rng.normal(0, math.sqrt(2 * power + 1e-6), one.wave.shape)
        mixed = one.wave + noise.astype(np.float32)
        return Read("sound", wave=mixed / max(1.0, float(np.abs(mixed).max())))
    assert one.frames is not None
    height, width = one.frames.shape[1:3]
    small = (max(1, width // 8), max(1, height // 8))
    tiny = [Image.fromarray(frame).resize(small, Image.Resampling.BOX) for frame in one.frames]
    blurred = np.stack([np.asarray(picture.resize((width, height))) for picture in tiny])
    noise = rng.normal(0, 50, one.frames.shape)
    return Read(one.kind, np.clip(blurred + noise, 0, 255).astype(np.uint8), one.rate_hz)
