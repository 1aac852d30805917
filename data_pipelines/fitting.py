"""An image brought to the size of its bucket: decoded (data_pipelines.image_decoding), resized only if it must be, and encoded."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from data_pipelines.image_decoding import Colour, Decoded, ImageError, Size, decode
from nexus_scale.data.buckets import Bucket, Fit, assign
from nexus_scale.data.buckets import fit as cover
from nexus_scale.data.images import encode_png

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}
"""The formats that images are stored in, with Pillow's names for them."""
UNDECODABLE = "an image that cannot be decoded, or is too large"
OVERHANG = 8
"""An image is scaled as a whole and then cropped if the scaled image has at most so many times the bucket's pixels. Longer ones are
cropped first."""


class Fitted(NamedTuple):
    """An image in its bucket: encoded bytes, the bucket's name, the original (height, width), whether it was enlarged, and notes.

    `corner`, (top, left), is where the image lies in the original as it was scaled to cover the bucket; `mirrored`, where it does if the
    original is flipped left to right. `size` is its own (height, width).
    """

    image: bytes
    bucket: str
    original: Size
    enlarged: bool
    notes: tuple[str, ...] = ()
    corner: Size = (0, 0)
    mirrored: Size = (0, 0)
    size: Size = (0, 0)


def fit(data: bytes, buckets: Sequence[Size], kind: str) -> Fitted | str:
    """The result of `fit_image` on white, or the reason why there is none."""
    try:
        return fit_image(data, buckets, kind, (255, 255, 255))
    except ImageError:
        return UNDECODABLE


def fit_image(
    data: bytes, buckets: Sequence[Size], kind: str, background: Colour, at: tuple[float, float] | None = None
) -> Fitted:
    """An image in the nearest of some sizes.

    Args:
        at: where it is cropped; see `data.buckets.fit`.
    Returns:
        The original bytes where size and format are right already, otherwise a new encoding.
    Raises:
        ImageError: it cannot be decoded, or is too large; says what was found.
    """
    needed = max((side for size in buckets for side in size), default=None)
    decoded = decode(data, background=background, needed=needed)
    pixels = decoded.pixels
    choice = [Bucket(width, height) for height, width in buckets] or [Bucket(*pixels.size)]
    bucket = assign(*pixels.size, choice)
    if pixels.size == (bucket.width, bucket.height):
        whole = decoded.plain == FORMATS[kind] and decoded.size == (bucket.height, bucket.width)
        return _fitted(data if whole else _encode(pixels, kind), bucket, decoded, False, Fit(*pixels.size, 0, 0))
    how = cover(*pixels.size, bucket, at)  # scaled to cover the bucket, then cropped
    enlarged = how.width > pixels.width or how.height > pixels.height
    corner = how.left, how.top, how.left + bucket.width, how.top + bucket.height
    if how.width * how.height <= OVERHANG * bucket.width * bucket.height:
        cut = pixels.resize((how.width, how.height), Image.Resampling.LANCZOS).crop(corner)
    else:
        across, down = pixels.width / how.width, pixels.height / how.height
        right, below = min(corner[2] * across, pixels.width), min(corner[3] * down, pixels.height)
        box = corner[0] * across, corner[1] * down, right, below
        cut = pixels.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS, box)
    return _fitted(_encode(cut, kind), bucket, decoded, enlarged, how)


def _fitted(data: bytes, bucket: Bucket, decoded: Decoded, enlarged: bool, how: Fit) -> Fitted:
    corner, mirrored = (how.top, how.left), (how.top, how.width - bucket.width - how.left)
    size = bucket.height, bucket.width
    return Fitted(data, bucket.name, decoded.size, enlarged, decoded.notes, corner, mirrored, size)


def _encode(image: Image.Image, kind: str) -> bytes:
    if kind == "png":
        return encode_png(np.asarray(image))
    buffer = io.BytesIO()
    if kind == "webp":
        image.save(buffer, "WEBP", lossless=True, quality=50, method=4)
    else:
        image.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()
