"""Any image as it is meant to be seen: upright, in sRGB, opaque, 8 bits a channel. Every foreign image is decoded here.

- Formats: PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000 and PNM, recognised by their bytes, not their names. Of animations and
  multi-page files the first frame or page is taken.
- Orientation by EXIF or XMP is applied. An embedded ICC profile that is not sRGB is converted to it (perceptual intent); one that cannot be
  used is ignored, as in browsers. CMYK without a profile is converted as Pillow does it.
- 16 bits are scaled to 8, never clipped. Of 32 bits and of fractions the range is the least of 0..1 (fractions only), 0..255, 0..65535 (and
  0..2^31 - 1 for whole numbers) that holds all values; negative and larger ones are refused.
- Transparent parts are laid on the `background`, white unless the recipe says otherwise.
- What would unpack to more than MAX_PIXELS is refused by its header alone. A JPEG above it is decoded at a half, quarter or eighth of its
  size where that is still as large as the image is needed. Threads wait for each other where their images together have more than
  PIXELS_AT_ONCE.
"""

from __future__ import annotations

import functools
import io
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms, ImageColor, UnidentifiedImageError

from nexus_scale.contracts import UserError
from nexus_scale.data import images

READ_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM")
READ_EXTENSIONS = frozenset(
    {
        *("png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "dib", "tif", "tiff", "avif"),
        *("jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm"),
    }
)
"""Extensions of files that are read as images."""
UNREAD_EXTENSIONS = frozenset(
    {
        *("heic", "heif", "jxl", "psd", "svg", "ico", "tga", "exr", "hdr", "eps", "pdf"),
        *("raw", "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2"),
    }
)
"""Extensions of image formats that cannot be read. Such files count as bad; files of other kinds do not."""

PIXELS_AT_ONCE = 1 << 27
"""Twice MAX_PIXELS: half a gigabyte in Pillow's memory."""
_SRGB = ImageCms.createProfile("sRGB")
_SAME = 2
"""Levels (of 255) by which a profile may differ from sRGB and still count as sRGB."""
_SPACES = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK"}
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

Image.init()  # here once, before threads that open images would each start it
# Pillow's own limit is higher than ours, so its warning adds nothing.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

CONVERTED = "colours converted to sRGB from an ICC profile"
UNUSABLE_PROFILE = "an ICC profile that cannot be used: colours taken as sRGB"
FIRST_FRAME = "first of several frames or pages"
ON_BACKGROUND = "transparent parts laid on the background"

Colour = tuple[int, int, int]
Size = tuple[int, int]
"""(height, width)"""


class ImageError(ValueError):
    """An image cannot be used; says why."""


class Decoded(NamedTuple):
    """An image to be fitted.

    Attributes:
        pixels: RGB, upright.
        size: (height, width) of the whole upright image; `pixels` may be decoded at a smaller size.
        plain: the name of its format where a reader that ignores profiles and orientation sees the same pixels; otherwise empty.
        notes: conversions that its owner may want to know about.
    """

    pixels: Image.Image
    size: Size
    plain: str
    notes: tuple[str, ...]


def colour_of(value: Any) -> Colour:
    """A background: a name (`white`), `#rrggbb`, or three numbers of 0..255.

    Raises:
        UserError: anything else.
    """
    parts: Any = value
    if isinstance(value, str):
        try:
            parts = ImageColor.getrgb(value)[:3]
        except ValueError:
            parts = None
    whole = isinstance(parts, Sequence) and all(isinstance(part, int) and 0 <= part <= 255 for part in parts)
    if not whole or len(parts) != 3:
        raise UserError(f"background {value!r}: expected a colour such as white, '#ffffff' or [255, 255, 255].")
    return parts[0], parts[1], parts[2]


def decode(data: bytes, *, background: Colour = (255, 255, 255), needed: int | None = None) -> Decoded:
    """Decodes one image.

    Args:
        background: what transparent parts are laid on.
        needed: the shortest side length that is needed; a JPEG may be decoded at a smaller size that has it. None: the whole image.
    Raises:
        ImageError: no image, damaged, or too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=READ_FORMATS) as image, _ROOM.of(image.width * image.height):
            return _decoded(image, background, needed)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"none of the formats that are read ({', '.join(READ_FORMATS)})") from error
    except Exception as error:  # damaged bytes raise every kind of error in Pillow and its libraries
        raise ImageError(f"{type(error).__name__}: {error}") from error


class _Room:
    """A bound on the pixels that threads decode at the same time; a single image always fits."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.taken = 0

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self.taken or self.taken + pixels <= PIXELS_AT_ONCE)
            self.taken += pixels
        try:
            yield
        finally:
            with self._changed:
                self.taken -= pixels
                self._changed.notify_all()


_ROOM = _Room()


def _decoded(image: Image.Image, background: Colour, needed: int | None) -> Decoded:
    size, notes = image.size, []
    if image.width * image.height > images.MAX_PIXELS and needed is not None and image.format in ("JPEG", "MPO"):
        scale = min(1.0, needed / min(image.size))
        image.draft(None, (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    if image.width * image.height > images.MAX_PIXELS:
        raise ImageError(f"{size[0]} x {size[1]} pixels, expected at most {images.MAX_PIXELS}")
    if frames := getattr(image, "n_frames", 1) > 1:
        notes.append(FIRST_FRAME)
        image.seek(0)
    image.load()
    orientation = orientation_of(image)
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    plain = not frames and not transparent and orientation == 1 and image.mode in ("RGB", "P", "L")
    profile = image.info.get("icc_profile")
    alpha = _alpha(image) if transparent else None
    pixels = _eight_bits(image)
    converted = None
    if isinstance(profile, bytes) and profile:
        try:
            converted = _in_srgb(pixels, profile)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            notes.append(UNUSABLE_PROFILE)
        if converted is not None:
            notes.append(CONVERTED)
    pixels = converted if converted is not None else pixels.convert("RGB") if pixels.mode != "RGB" else pixels
    if alpha is not None:
        if alpha.getextrema() != (255, 255):
            notes.append(ON_BACKGROUND)
        pixels.putalpha(alpha)
        pixels = Image.alpha_composite(Image.new("RGBA", pixels.size, (*background, 255)), pixels).convert("RGB")
    if orientation in _TURNS:
        pixels = turned(pixels, orientation)
        size = size[::-1] if orientation >= 5 else size
    kind = image.format or ""
    return Decoded(pixels, size[::-1], kind if plain and converted is None else "", tuple(notes))


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8. In an animation it holds for all frames."""
    orientation: int = image.getexif().get(0x0112, 1)
    return orientation


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned upright; unchanged where the orientation is not one of EXIF's."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _alpha(image: Image.Image) -> Image.Image | None:
    """Opacity (H, W), 0..255. For 16-bit grey it follows from the one transparent value, which Pillow would compare in 8 bits."""
    if image.mode.startswith("I;16"):
        clear = image.info.get("transparency")
        return Image.fromarray(np.where(np.asarray(image) == clear, 0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        return None
    clear = image.info.get("transparency")
    if isinstance(clear, tuple) and max(clear) > 255:  # for 16-bit colours, which Pillow would cut to 8 bits
        image.info["transparency"] = tuple(part >> 8 for part in clear)
    return image.convert("RGBA").getchannel("A")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image in mode L, RGB or CMYK, or in one that Pillow converts to RGB without loss."""
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode in ("I", "F"):
        return _from_range(np.asarray(image), image.format == "PPM")
    if image.mode in ("LA", "La"):
        return image.convert("LA").getchannel("L")
    if image.mode == "LAB":
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), _SRGB, "LAB", "RGB")
        return _transformed(image, to_rgb)
    if image.mode in ("PA", "RGBa") or (image.mode == "P" and "transparency" in image.info):
        image = image.convert("RGBA")
    if image.mode in ("L", "RGB", "CMYK"):
        return image
    return image.convert("RGB")  # RGBA: the colours under the transparency, unchanged


def _from_range(values: np.ndarray, sixteen: bool) -> Image.Image:
    fractions = values.dtype.kind == "f"
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0:
        raise ImageError(f"pixels from {low:g} to {high:g}, expected finite ones of at least 0")
    ranges = (65535.0,) if sixteen else (1.0, 255.0, 65535.0) if fractions else (255.0, 65535.0, 2.0**31 - 1)
    top = next((one for one in ranges if high <= one), None)
    if top is None:
        raise ImageError(
            f"pixels from {low:g} to {high:g}, expected a range of {', '.join(f'{one:g}' for one in ranges)}"
        )
    return Image.fromarray(np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8))


# ---------------------------------------------------------------------------------------------------- colours


def _in_srgb(pixels: Image.Image, profile: bytes) -> Image.Image | None:
    """RGB pixels in sRGB; None where the profile is sRGB already, so that stored bytes can stay as they are.

    Raises:
        PyCMSError, OSError, ValueError: the profile is damaged, or for another kind of image.
    """
    space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space
    if space == "RGB " and pixels.mode == "L":
        pixels = pixels.convert("RGB")  # grey values of an RGB space
    if pixels.mode not in _SPACES:
        pixels = pixels.convert("RGB")
    if _SPACES[pixels.mode] != space:
        raise ValueError(f"a profile of {space.strip()} in an image of {pixels.mode}")
    transform = _transform(profile, pixels.mode)
    return None if transform is None else _transformed(pixels, transform)


def _transformed(pixels: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    out = Image.new("RGB", pixels.size)
    transform.apply(pixels, out)
    return out


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform to sRGB; None where it changes no colour of a grid by more than _SAME."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    made = ImageCms.buildTransform(source, _SRGB, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
    if mode == "CMYK":
        return made
    levels = np.linspace(0, 255, 9 if mode == "RGB" else 256).astype(np.uint8)
    if mode == "RGB":
        grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
        before = grid
    else:
        grid = levels[None]
        before = np.repeat(grid[..., None], 3, axis=-1)
    after = np.asarray(_transformed(Image.fromarray(np.ascontiguousarray(grid)), made))
    return None if int(np.abs(after.astype(int) - before).max()) <= _SAME else made
