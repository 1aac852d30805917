"""One image into its bucket: decoded within limits, upright, opaque, resized only where it must be, encoded."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from nexus_scale.data.buckets import Bucket, assign
from nexus_scale.data.buckets import fit as cover
from nexus_scale.data.images import encode_png, image_size
from nexus_scale.data.manifest import DataError

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
"""How images are stored: the extension, and Pillow's name."""

Size = tuple[int, int]
"""(height, width)"""


class Fitted(NamedTuple):
    """An image in its bucket: encoded bytes, `height x width`, its size before, whether it was enlarged."""

    image: bytes
    bucket: str
    original: Size
    enlarged: bool


def fit(data: bytes, buckets: Sequence[Size], kind: str) -> Fitted | str:
    """Decodes, brings to a bucket's size, encodes; or says why that cannot be done.

    Returns:
        The image as it came where it has the size of a bucket and the format, else encoded anew; a reason otherwise.
    """
    try:
        image_size(data)  # refuses other formats, and what would unpack to too many pixels, by the header alone
        with Image.open(io.BytesIO(data)) as image:
            plain = image.format == FORMATS[kind] and _is_plain(image)
            image.load()
            pixels = _rgb(image)
    except (DataError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return "an image that cannot be decoded, or is too large"
    size = pixels.height, pixels.width
    choice = [Bucket(width, height) for height, width in buckets] or [Bucket(*pixels.size)]
    bucket = assign(*pixels.size, choice)
    if pixels.size == (bucket.width, bucket.height):
        return Fitted(data if plain else _encode(pixels, kind), bucket.name, size, False)
    # Scaled so that it covers the bucket; the overhang is cut evenly on both sides.
    how = cover(*pixels.size, bucket)
    scaled = pixels.resize((how.width, how.height), Image.Resampling.LANCZOS)
    cut = scaled.crop((how.left, how.top, how.left + bucket.width, how.top + bucket.height))
    return Fitted(_encode(cut, kind), bucket.name, size, how.width > pixels.width or how.height > pixels.height)


def _is_plain(image: Image.Image) -> bool:
    """Whether a reader that looks at pixels alone sees the same: no transparency, rotation by EXIF, or second frame."""
    opaque = image.mode in ("RGB", "P", "L") and "transparency" not in image.info
    return opaque and image.getexif().get(0x0112, 1) == 1 and getattr(image, "n_frames", 1) == 1


def _rgb(image: Image.Image) -> Image.Image:
    """Upright, opaque on white, RGB."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        layer = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return upright.convert("RGB")


def _encode(image: Image.Image, kind: str) -> bytes:
    if kind == "png":
        return encode_png(np.asarray(image))
    buffer = io.BytesIO()
    if kind == "webp":
        image.save(buffer, "WEBP", lossless=True, quality=50, method=4)
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
