"""Buckets: samples of similar size share batches.

Aspect ratios: images of many shapes are cropped to a few sizes of about the same area. Lengths: a sequence belongs to the smallest of a few
bounds that holds it, and batches are padded to that bound instead of to the longest sequence of all.

Source: NovelAI's aspect ratio bucketing (2022); Podell et al. 2023 (SDXL), appendix I; the tables of PixArt-alpha's released code.
Khomenko et al. 2016 (lengths).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from nexus_scale.data.manifest import DataError


class Bucket(NamedTuple):
    """A size in pixels. `name` is the one in manifests, height first as in arrays."""

    width: int
    height: int

    @property
    def name(self) -> str:
        return f"{self.height}x{self.width}"


class Fit(NamedTuple):
    """How an image is brought into a bucket: resized to (width, height), then cropped to the bucket's size at (left, top)."""

    width: int
    height: int
    left: int
    top: int


_LANDSCAPE: Mapping[int, Sequence[int]] = {
    1024: (1024,), 960: (1024, 1088), 896: (1088, 1152), 832: (1152, 1216), 768: (1280, 1344), 704: (1344, 1408, 1472),
    640: (1536, 1600), 576: (1664, 1728, 1792), 512: (1856, 1920, 1984, 2048),
}  # fmt: skip
"""Widths by height, of SDXL's table and, but for two, of PixArt's."""


def _table(neither: Sequence[int], no_portrait: Sequence[int], divisor: int = 1) -> tuple[Bucket, ...]:
    """Those sizes and the same as portraits, ordered by width; without those of long sides that are in neither form, or in no portrait."""
    wide = [(w, h) for h, widths in _LANDSCAPE.items() for w in widths if w not in neither]
    tall = [(h, w) for w, h in wide if w != h and (w, h) != (1344, 704) and w not in no_portrait]
    return tuple(Bucket(w // divisor, h // divisor) for w, h in sorted([*wide, *tall]))


_OF_33 = (1920, 1984), (1664, 1792, 1856)
TABLES: Mapping[str, tuple[Bucket, ...]] = {
    "40_of_1024": _table((), ()),
    "33_of_1024": _table(*_OF_33),
    "33_of_512": _table(*_OF_33, 2),
    "33_of_256": _table(*_OF_33, 4),
}
"""Published tables by the name that `resolution` of ingest_images knows: 40 sizes of about 1024 x 1024 pixels (SDXL), and 33 of about as
many, or a quarter or a sixteenth as many (PixArt-alpha)."""


def standard_buckets(resolution: int, step: int, max_ratio: float = 2.0) -> list[Bucket]:
    """All sizes in multiples of `step` with at most resolution^2 pixels, sides within `max_ratio` of each other, and no room to grow along
    either side. Ordered by width; portrait and landscape mirror each other.

    Raises:
        DataError: `step` does not divide `resolution`, or the ratio is below 1.
    """
    if step < 1 or resolution < step or resolution % step or max_ratio < 1:
        raise DataError(
            f"buckets: got resolution {resolution}, step {step}, max_ratio {max_ratio}; expected a step that divides "
            "the resolution and a ratio of at least 1"
        )
    limit = resolution * resolution // (step * step)  # in cells of step x step
    tallest = {w: min(limit // w, int(max_ratio * w)) for w in range(1, limit + 1)}
    sizes = [(w, h) for w, h in tallest.items() if h and w <= max_ratio * h]
    return [Bucket(w * step, h * step) for w, h in sizes if not any(v > w and g >= h for v, g in sizes)]


def assign(width: int, height: int, buckets: Sequence[Bucket]) -> Bucket:
    """The bucket nearest in aspect ratio (on a logarithmic scale); the larger one of two equally near.

    An image that already has the size of a bucket gets that bucket.
    """
    if width < 1 or height < 1 or not buckets:
        raise DataError(
            f"buckets: got an image of {width} x {height} and {len(buckets)} buckets, expected at least 1 each"
        )
    if (width, height) in buckets:
        return Bucket(width, height)
    ratio = math.log(width / height)
    # Rounded, so that mirrored sizes tie exactly for a square image and the order of the table decides.
    return min(buckets, key=lambda b: (round(abs(math.log(b.width / b.height) - ratio), 9), -b.width * b.height))


def fit(width: int, height: int, bucket: Bucket, at: tuple[float, float] | None = None) -> Fit:
    """The resize and crop that bring an image into a bucket; no change where it has the bucket's size.

    Args:
        at: where the crop lies between left and right, and between top and bottom, each in [0, 1); None: in the middle.
    """
    scale = max(bucket.width / width, bucket.height / height)
    resized_width = max(bucket.width, round(width * scale))
    resized_height = max(bucket.height, round(height * scale))
    free = resized_width - bucket.width, resized_height - bucket.height
    left, top = (
        (side // 2 for side in free)
        if at is None
        else (int(part * (side + 1)) for part, side in zip(at, free, strict=True))
    )
    return Fit(resized_width, resized_height, left, top)


# ------------------------------------------------------------------------------------------------- lengths

_LENGTH = re.compile(r"([A-Za-z0-9_]+)<=([0-9]+)")


class LengthBucket(NamedTuple):
    """Samples whose `field` has at most `bound` entries along its length. `name` is the one in manifests: `codes<=150`."""

    field: str
    bound: int

    @property
    def name(self) -> str:
        return f"{self.field}<={self.bound}"

    @classmethod
    def of(cls, name: str) -> LengthBucket | None:
        """The length bucket of a name; None where it names a resolution, or nothing."""
        match = _LENGTH.fullmatch(name)
        return None if match is None else cls(match[1], int(match[2]))


def check_bounds(bounds: Sequence[int]) -> tuple[int, ...]:
    """The bounds of length buckets as a tuple. Raises DataError unless they are ascending whole numbers from 1 on."""
    whole = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds)
    if not whole or not bounds or bounds[0] < 1 or any(b <= a for a, b in pairwise(bounds)):
        raise DataError(
            f"buckets: got bounds {list(bounds)}, expected ascending whole numbers, such as [100, 150, 200]"
        )
    return tuple(bounds)


def assign_length(field: str, length: int, bounds: Sequence[int]) -> LengthBucket:
    """The bucket with the smallest bound that holds a length.

    Raises:
        DataError: none does. Cutting the sequence would be a silent loss.
    """
    for bound in bounds:
        if length <= bound:
            return LengthBucket(field, bound)
    raise DataError(
        f"buckets: got {field} of length {length}, the largest bound is {bounds[-1]}; add a larger one, or make the clips shorter"
    )
