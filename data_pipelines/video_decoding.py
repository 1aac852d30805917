"""Clips from encoded videos: mp4, webm, gif and whatever else PyAV reads. Pillow reads animated webp, which FFmpeg cannot decode.

The rules, in order. A dropped video or clip is counted under the rule that dropped it:

1. A file that cannot be opened or decoded, has no moving picture (the cover of a song is not one), or is shorter than it
   declares (data_pipelines.cut_files) is dropped. Of several video streams the first that moves is taken.
2. Frames are turned and mirrored as players show them (display matrix, EXIF), to the nearest quarter turn. Pixels become square.
3. The video is resampled to `fps`: at k / fps stands the frame shown at that time; no frame is interpolated. Times count from the first
   frame.
4. It is cut into consecutive clips of `frames` frames, at most `max_clips`; the rest is left out. A video too short for one clip is
   dropped or, with `loop`, played again from its start, as animations are.
5. A clip whose frames differ by less than `min_motion` (mean over its pixels, 0..255) is dropped as a still.
6. Frames are scaled to cover the size and cropped evenly on both sides. Transparent parts become white.

Colours become 8-bit RGB by the matrix and range that the stream declares (limited range and BT.601 where it declares none). High
dynamic range (PQ, HLG) and wide gamuts are not mapped to sRGB: such clips look paler than in a player, and their JSON has `transfer`.
The alpha of VP8 and VP9, a stream of its own, is not read.

An image is a video of one frame, decoded as data_pipelines.image_decoding says: with `frames` 1 it gives one clip, and is
too short for any other. Formats are recognised by the bytes, not by the name. Each frame is resized as soon as it is decoded, so that
only the clips are held in memory.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from data_pipelines import image_decoding
from data_pipelines.cut_files import is_cut
from nexus_scale.contracts import UserError
from nexus_scale.data.buckets import Bucket
from nexus_scale.data.buckets import fit as cover

VIDEO_EXTENSIONS = frozenset(
    {"mp4", "m4v", "webm", "mkv", "mov", "avi", "mpg", "mpeg", "ogv", "3gp", "gif", "webp", "apng"}
)
STILL_EXTENSIONS = image_decoding.READ_EXTENSIONS
"""Extensions of images; webp, gif and avif may also be videos."""
LONGEST_SIDE = 8192
MOST_SCALED = 16
"""Largest ratio of the area of a scaled frame to that of the clip."""
MOST_FRAMES = 100_000
"""Most frames that are decoded from one file: a few bytes can claim to be hours of video."""
MOST_ASPECT = 16.0
"""Largest ratio of the sides of a pixel; beyond it the container is damaged."""
STILL_CODECS = frozenset({"mjpeg", "png", "bmp", "webp", "tiff"})
HDR = {16: "PQ", 18: "HLG"}
"""Transfer functions of high dynamic range, by their numbers in ITU-T H.273."""
LEAST_DELAY_S, USUAL_DELAY_S = 0.01, 0.1
"""A frame of an animated webp that claims to be shown no longer than the first is shown as long as the second, as browsers do."""
VERSION = 2
"""Version of these rules: clips made by other rules are made again."""

UNREADABLE = "a video that cannot be decoded"
CUT = "a file that ends before it says"
NO_FRAMES = "a file without a moving picture"
TOO_SHORT = "a video too short for one clip"
STILL = "a clip that does not move"


@dataclass(frozen=True)
class Rules:
    """The rules of the module, with their numbers. `size`: (height, width); `frames`: frames in a clip."""

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
                f"size {self.size}, frames {self.frames}, fps {self.fps:g}, max_clips {self.max_clips}: expected height "
                f"and width in 1..{LONGEST_SIDE}, at least one frame and clip, and up to 1000 frames a second"
            )
        if not 0 <= self.min_motion <= 255:
            raise UserError(f"min_motion {self.min_motion:g}: expected a mean difference in 0..255")

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "size": list(self.size)}


@dataclass(frozen=True)
class Clip:
    """`frames` (F, H, W, 3) uint8; `start_seconds` within its video; `original`: (height, width) before scaling, upright and with square
    pixels; `transfer`: PQ or HLG, otherwise empty."""

    frames: np.ndarray
    start_seconds: float
    original: tuple[int, int]
    transfer: str = ""


class Frame(NamedTuple):
    """`image()` makes the upright RGB or RGBA image when it is needed; `aspect`: width of a pixel divided by its height; `start`, `end`:
    seconds between which the frame is shown."""

    start: float
    end: float
    image: Callable[[], Image.Image]
    aspect: float = 1.0
    transfer: str = ""


class Fitted(NamedTuple):
    pixels: np.ndarray
    original: tuple[int, int]
    transfer: str


def clips_of(data: bytes | BinaryIO, rules: Rules) -> tuple[list[Clip], list[str]]:
    """The clips of a file, and the rule that dropped each of the others."""
    wanted = rules.frames * rules.max_clips
    chosen: list[Fitted] = []
    file = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        if is_cut(file):
            return [], [CUT]
        for frame in _resampled(frames_of(file), rules):
            chosen.append(frame)
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
        frames = np.stack([one.pixels for one in part])
        if rules.frames > 1 and rules.min_motion > 0 and _motion(frames) < rules.min_motion:
            dropped.append(STILL)
            continue
        clips.append(Clip(frames, first / rules.fps, part[0].original, part[0].transfer))
    return clips, dropped


def answer(file: BinaryIO, name: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """`clips_of` as a decoder of data_pipelines.decoding_process; `arguments` are the rules."""
    clips, dropped = clips_of(file, Rules(**{**arguments, "size": tuple(arguments["size"])}))
    said = [{"start_seconds": c.start_seconds, "original": list(c.original), "transfer": c.transfer} for c in clips]
    return {"clips": said, "dropped": dropped}, [clip.frames for clip in clips]


def clips_in(facts: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> list[Clip]:
    """The clips of an `answer`."""
    return [
        Clip(frames, one["start_seconds"], (one["original"][0], one["original"][1]), one["transfer"])
        for frames, one in zip(arrays, facts["clips"], strict=True)
    ]


def _resampled(frames: Iterator[Frame], rules: Rules) -> Iterator[Fitted]:
    """The frame shown at each k / fps, resized. A microsecond's grace, because containers round their times."""
    k, begin = 0, None
    for frame in frames:
        begin = frame.start if begin is None else begin
        fitted = None
        while k / rules.fps < frame.end - begin - 1e-6:
            fitted = fitted or _fitted(frame, rules.size)
            yield fitted
            k += 1


def frames_of(file: BinaryIO) -> Iterator[Frame]:
    """Frames in the order in which they are shown."""
    file.seek(0)
    head = file.read(256)
    file.seek(0)
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        yield from _webp(file)
    elif _is_still(head):
        yield from _still(file)
    else:
        yield from _av(file)


def _is_still(head: bytes) -> bool:
    """Whether a file with these first bytes is a single image, by the magic numbers of image formats."""
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return b"acTL" not in head
    if head[4:8] == b"ftyp":
        brands = head[8 : int.from_bytes(head[:4], "big")]
        return b"avif" in brands and b"avis" not in brands
    return head.startswith(
        (b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51", b"P5", b"P6")
    )


def _still(file: BinaryIO) -> Iterator[Frame]:
    """The one frame of an image, see data_pipelines.image_decoding: in sRGB, 16 bits scaled to 8."""
    pixels = image_decoding.decode(file.read()).pixels
    yield Frame(0.0, 1e-3, lambda: pixels)


def _webp(file: BinaryIO) -> Iterator[Frame]:
    with Image.open(file, formats=("WEBP",)) as image:
        _check_size(image.width, image.height)
        count = getattr(image, "n_frames", 1)
        orientation = image_decoding.orientation_of(image)
        seconds = 0.0
        for number in range(min(count, MOST_FRAMES) if count > 1 else 0):
            image.seek(number)
            image.load()  # also where it is not chosen: later frames build on earlier ones
            shown = float(image.info.get("duration", 0)) / 1000
            shown = shown if shown > LEAST_DELAY_S else USUAL_DELAY_S
            yield Frame(seconds, seconds + shown, partial(_upright, image, orientation))
            seconds += shown
    if count == 1:
        file.seek(0)
        yield from _still(file)


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image_decoding.turned(image.convert("RGBA"), orientation)


def _av(file: BinaryIO) -> Iterator[Frame]:
    av = _pyav()
    with av.open(file, mode="r", options={"protocol_whitelist": "pipe"}) as container:
        stream = _moving(container)
        if stream is None:
            return
        _check_size(stream.width, stream.height)
        stream.codec_context.options = {"max_pixels": str(LONGEST_SIDE**2)}
        stream.codec_context.thread_count = 1  # a worker has one CPU, and each further thread takes address space
        usual = float(1 / stream.average_rate) if stream.average_rate else 1 / 25
        before: Frame | None = None
        rotation: int | None = None
        matrix: Matrix = 1, 0, 0, 1
        for number, frame in enumerate(container.decode(stream)):
            if number >= MOST_FRAMES:
                break
            _check_size(frame.width, frame.height)
            if frame.pts is not None:
                now = float(frame.pts * frame.time_base)
            else:
                now = 0.0 if before is None else before.end
            if before is not None and now > before.start:
                yield before._replace(end=now)
            shown = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else 0.0
            if frame.rotation != rotation:  # PyAV keeps every frame whose side data were accessed
                rotation, matrix = frame.rotation, _matrix(frame)
            aspect = _aspect(stream)
            before = Frame(
                now,
                now + (shown if shown > 0 else usual),
                partial(_picture, frame, matrix),
                1 / aspect if _swaps(matrix) else aspect,
                HDR.get(int(frame.color_trc), ""),
            )
        if before is not None:
            yield before


def _moving(container: Any) -> Any:
    """The video stream that a player would show; None where there are only covers.

    Raises:
        ValueError: no stream is of a kind that can be decoded.
    """
    pictures = [one for one in container.streams.video if not one.disposition & one.disposition.attached_pic]
    # A stream without a decoder has no codec_context, nor any of its properties.
    readable = [one for one in pictures if one.codec_context is not None]
    if pictures and not readable:
        raise ValueError("no decoder for this kind of video")
    # A cover that is not marked as one and the first image of an animated AVIF come before the video they belong to.
    return min(
        readable,
        key=lambda one: one.frames == 1 or (one.codec_context.name in STILL_CODECS and one.frames < 1),
        default=None,
    )


Matrix = tuple[int, int, int, int]
"""(a, b, c, d): a point (x, y) of a frame is shown at (a x + c y, b x + d y). ISO 14496-12, 8.3.2."""


def _matrix(frame: Any) -> Matrix:
    from av.sidedata.sidedata import Type

    data = frame.side_data.get(Type.DISPLAYMATRIX)
    if data is None or len(bytes(data)) < 36:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    return a, b, c, d


def _swaps(matrix: Matrix) -> bool:
    """Whether width and height change places."""
    a, b, c, d = matrix
    return abs(b) + abs(c) > abs(a) + abs(d)


def _picture(frame: Any, matrix: Matrix) -> Image.Image:
    """A frame turned and mirrored as its display matrix says."""
    transparent = any(component.is_alpha for component in frame.format.components) or frame.format.name == "pal8"
    pixels = frame.to_ndarray(format="rgba" if transparent else "rgb24", threads=1)
    a, b, c, d = matrix
    right, down = (c, b) if _swaps(matrix) else (a, d)
    pixels = pixels.swapaxes(0, 1) if _swaps(matrix) else pixels
    return Image.fromarray(np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if right < 0 else 1]))


def _aspect(stream: Any) -> float:
    """Width of a pixel divided by its height, from the container, else from the codec; 1 where neither says."""
    for said in (stream.sample_aspect_ratio, stream.codec_context.sample_aspect_ratio):
        if said:
            if not 1 / MOST_ASPECT <= said <= MOST_ASPECT:
                raise ValueError(f"pixels of {said}")
            return float(said)
    return 1.0


def _check_size(width: int, height: int) -> None:
    if not 0 < width <= LONGEST_SIDE or not 0 < height <= LONGEST_SIDE:
        raise ValueError(f"frames of {width} x {height}; at most {LONGEST_SIDE} a side")


def _fitted(frame: Frame, size: tuple[int, int]) -> Fitted:
    image = frame.image()
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    image = image.convert("RGB")
    shown = max(1, round(image.width * frame.aspect)), image.height
    bucket = Bucket(size[1], size[0])
    if image.size == shown == (bucket.width, bucket.height):
        return Fitted(np.array(image), (shown[1], shown[0]), frame.transfer)
    how = cover(*shown, bucket)
    if how.width * how.height > MOST_SCALED * bucket.width * bucket.height:
        # A very long frame is cropped before it is scaled: most of it would be cropped anyway.
        across, down = image.width / how.width, image.height / how.height
        box = how.left * across, how.top * down, (how.left + bucket.width) * across, (how.top + bucket.height) * down
        cut = image.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box=box)
    else:
        scaled = image.resize((how.width, how.height), Image.Resampling.LANCZOS)
        cut = scaled.crop((how.left, how.top, how.left + bucket.width, how.top + bucket.height))
    return Fitted(np.array(cut), (shown[1], shown[0]), frame.transfer)


def _motion(frames: np.ndarray) -> float:
    """Mean over pixels of the largest change between neighbouring frames, 0..255."""
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
    """The errors that broken files raise, and no others: a bug of ours must not pass for a broken file."""
    broken = (OSError, ValueError, SyntaxError, EOFError, ArithmeticError, Image.DecompressionBombError)
    try:
        import av
    except ImportError:
        return broken
    return (*broken, av.error.FFmpegError)
