"""Decoding and encoding of images, with limits on what a file may unpack to."""

from __future__ import annotations

import io
import itertools

import numpy as np
from PIL import Image, ImageSequence

from nexus_scale.data.manifest import DataError

MAX_PIXELS = 1 << 26
"""8192 x 8192: a file that unpacks to more is taken for a decompression bomb."""
_FORMATS = ("PNG", "JPEG", "WEBP")


def _open(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Exception as error:  # damaged bytes raise every kind of error in Pillow and its libraries
        raise DataError(f"got an image that cannot be read ({error}), expected {', '.join(_FORMATS)}") from error
    if image.width * image.height > MAX_PIXELS:
        raise DataError(f"got an image of {image.width} x {image.height}, expected at most {MAX_PIXELS} pixels")
    return image


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) of an image, read from its header alone."""
    with _open(data) as image:
        return image.height, image.width


def decode_image(data: bytes) -> np.ndarray:
    """The pixels (H, W, 3) uint8 of an image. Transparent parts become white, grey becomes three equal channels."""
    return decode_frames(data, 1)[0]


def decode_frames(data: bytes, most: int) -> list[np.ndarray]:
    """The first frames of an image that moves, at most so many, as `decode_image` has them; of one that does not, itself."""
    try:
        with _open(data) as image:
            return [_on_white(frame) for frame in itertools.islice(ImageSequence.Iterator(image), most)]
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"got an image that cannot be decoded: {error}") from error


def _on_white(image: Image.Image) -> np.ndarray:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return np.array(image.convert("RGB"))


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG of pixels (H, W, 3) uint8, without metadata."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise DataError(f"got an image array of {pixels.dtype} {pixels.shape}, expected uint8 (H, W, 3)")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()
