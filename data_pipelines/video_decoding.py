"""Clips from encoded videos: mp4, webm, gif and what else PyAV reads; animated webp by Pillow, which FFmpeg cannot decode.

The rules, in order; what a rule drops is named by it:

1. A file that cannot be opened or decoded, or has no picture, is dropped.
2. It is resampled to `fps`: at k / fps the frame that is shown then, so no frame is made up.
3. It is cut into clips of `frames` frames, one behind the other, at most `max_clips`. What remains at the end is left out. A video
   that is too short for one clip is dropped, or with `loop` played again from its start (as animations are).
4. A clip whose frames differ by less than `min_motion` (mean over its pixels, 0..255) is dropped: a still.
5. Frames are scaled to cover the size, and the overhang is cut evenly on both sides; what is transparent becomes white.

An image is a video of one frame: with `frames` 1 it gives one clip, and is too short for any other.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from nexus_scale.contracts import UserError
from nexus_scale.data.buckets import Bucket
from nexus_scale.data.buckets import fit as cover

VIDEO_EXTENSIONS = frozenset({"mp4", "webm", "mkv", "mov", "avi", "gif", "webp"})
STILL_FORMATS = {"png": "PNG", "jpg": "JPEG", "jpeg": "JPEG"}
"""Images, by extension; webp and gif may be either."""
LONGEST_SIDE = 8192
MOST_FRAMES = 100_000
"""Decoded frames of one file at most: a few bytes can claim to be hours of video."""

UNREADABLE = "a video that cannot be decoded"
NO_FRAMES = "a file without a moving picture"
TOO_SHORT = "a video too short for one clip"
STILL = "a clip that does not move"


@dataclass(frozen=True)
class Rules:
    """See the module. `size` is height and width; `frames` counts those of a clip."""

    size: tuple[int, int]
    frames: int
    fps: float
    max_clips: int = 1
    loop: bool = False
    min_motion: float = 0.0

    def __post_init__(self) -> None:
        sides = all(isinstance(side, int) and 1 <= side <= LONGEST_SIDE for side in self.size)
        if len(self.size) != 2 or not sides or self.frames < 1 or not 0 < self.fps <= 1000 or self.max_clips < 1:
            raise UserError(
                f"ingest_clips: size {self.size}, frames {self.frames}, fps {self.fps:g}, max_clips {self.max_clips}: expected height "
                f"and width in 1..{LONGEST_SIDE}, at least one frame and clip, and up to 1000 frames a second"
            )
        if not 0 <= self.min_motion <= 255:
            raise UserError(f"ingest_clips: min_motion {self.min_motion:g}: expected a mean difference in 0..255")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "size": list(self.size)}


@dataclass(frozen=True)
class Clip:
    """`frames` (F, H, W, 3) uint8; `start_seconds` in its video; `original`: height and width before scaling."""

    frames: np.ndarray
    start_seconds: float
    original: tuple[int, int]


def clips_of(data: bytes, extension: str, rules: Rules) -> tuple[list[Clip], list[str]]:
    """The clips of a file, and for each that was dropped the rule that did it."""
    wanted = rules.frames * rules.max_clips
    chosen: list[Image.Image] = []
    try:
        for image in _resampled(_frames(data, extension), rules.fps):
            chosen.append(image)
            if len(chosen) == wanted:
                break
    except _errors() as error:
        if isinstance(error, UserError):
            raise
        return [], [UNREADABLE]
    if not chosen:
        return [], [NO_FRAMES]
    if len(chosen) < rules.frames:
        if not rules.loop or len(chosen) < 2:
            return [], [TOO_SHORT]
        chosen = [chosen[i % len(chosen)] for i in range(rules.frames)]
    clips, dropped = [], []
    for first in range(0, len(chosen) - rules.frames + 1, rules.frames):
        part = chosen[first : first + rules.frames]
        frames = np.stack([np.asarray(_fitted(image, rules.size)) for image in part])
        if rules.frames > 1 and rules.min_motion > 0 and _motion(frames) < rules.min_motion:
            dropped.append(STILL)
            continue
        clips.append(Clip(frames, first / rules.fps, (part[0].height, part[0].width)))
    return clips, dropped


def _resampled(frames: Iterator[tuple[float, float, Image.Image]], fps: float) -> Iterator[Image.Image]:
    """At k / fps the frame that is shown then. A microsecond's grace: containers round their times."""
    k, begin = 0, None
    for start, end, image in frames:
        begin = start if begin is None else begin
        while k / fps < end - begin - 1e-6:
            yield image
            k += 1


def _frames(data: bytes, extension: str) -> Iterator[tuple[float, float, Image.Image]]:
    """Frames with the seconds at which each begins and ends to be shown, RGB or RGBA."""
    if extension in STILL_FORMATS:
        yield from _still(data, STILL_FORMATS[extension])
    else:
        yield from _webp(data) if extension == "webp" else _av(data)


def _still(data: bytes, format: str) -> Iterator[tuple[float, float, Image.Image]]:
    with Image.open(io.BytesIO(data), formats=(format,)) as image:
        _check_size(image.width, image.height)
        yield 0.0, 1e-3, image.convert("RGBA")


def _webp(data: bytes) -> Iterator[tuple[float, float, Image.Image]]:
    with Image.open(io.BytesIO(data), formats=("WEBP",)) as image:
        _check_size(image.width, image.height)
        seconds = 0.0
        for number in range(min(getattr(image, "n_frames", 1), MOST_FRAMES)):
            image.seek(number)
            image.load()
            shown = max(float(image.info.get("duration", 0)), 1.0) / 1000
            yield seconds, seconds + shown, image.convert("RGBA")
            seconds += shown


def _av(data: bytes) -> Iterator[tuple[float, float, Image.Image]]:
    av = _pyav()
    with av.open(io.BytesIO(data), mode="r", options={"protocol_whitelist": "pipe"}) as container:
        if not container.streams.video:
            return
        stream = container.streams.video[0]
        _check_size(stream.width, stream.height)
        usual = float(1 / stream.average_rate) if stream.average_rate else 1 / 25
        before, start = None, 0.0
        for number, frame in enumerate(container.decode(stream)):
            if number >= MOST_FRAMES:
                break
            now = float(frame.pts * frame.time_base) if frame.pts is not None else start + usual
            if before is not None and now > start:
                yield start, now, before
            transparent = (
                any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
            )
            pixels = frame.to_ndarray(format="rgba" if transparent else "rgb24")
            before, start = Image.fromarray(pixels), now
        if before is not None:
            yield start, start + usual, before


def _check_size(width: int, height: int) -> None:
    if not 0 < width <= LONGEST_SIDE or not 0 < height <= LONGEST_SIDE:
        raise ValueError(f"frames of {width} x {height}; at most {LONGEST_SIDE} a side")


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    image = image.convert("RGB")
    bucket = Bucket(size[1], size[0])
    if image.size == (bucket.width, bucket.height):
        return image
    how = cover(*image.size, bucket)
    scaled = image.resize((how.width, how.height), Image.Resampling.LANCZOS)
    return scaled.crop((how.left, how.top, how.left + bucket.width, how.top + bucket.height))


def _motion(frames: np.ndarray) -> float:
    """Mean over pixels of the largest change that each sees between neighbouring frames, 0..255."""
    change = np.abs(np.diff(frames.astype(np.int16), axis=0)).max(axis=(0, 3))  # (H, W)
    return float(change.mean())


def _pyav() -> Any:
    try:
        import av
    except ImportError:
        raise UserError("decoding videos needs PyAV; pip install 'nexus-scale[video]'") from None
    av.logging.set_level(av.logging.PANIC)
    return av


def _errors() -> tuple[type[BaseException], ...]:
    """What broken files raise, and no more: a mistake of ours is not counted as theirs."""
    broken = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
    try:
        import av
    except ImportError:
        return broken
    return (*broken, av.error.FFmpegError)
