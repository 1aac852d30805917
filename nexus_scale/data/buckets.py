"""Buckets: samples of about one size share their batches.

Aspect ratios: images of many shapes are cut to few sizes of about one area. Lengths: sequences are sorted by the least of a
few bounds that holds them, and batches are padded to that bound instead of to the longest of all.

Source: NovelAI's aspect ratio bucketing (2022); Podell et al. 2023 (SDXL), appendix I. Khomenko et al. 2016 (lengths).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from nexus_scale.data.manifest import DataError


class Bucket(NamedTuple):
    """A size in pixels. `name` is that of arrays, height first, as manifests have it."""

    width: int
    height: int

    @property
    def name(self) -> str:
        return f"{self.height}x{self.width}"


class Fit(NamedTuple):
    """How to bring an image into a bucket: resize to (width, height), then crop the bucket's size at (left, top)."""

    width: int
    height: int
    left: int
    top: int


def standard_buckets(resolution: int, step: int, max_ratio: float = 2.0) -> list[Bucket]:
    """All sizes that are multiples of `step`, have at most resolution^2 pixels, sides within `max_ratio` of each
    other, and cannot grow along either side. Ordered by width; portrait and landscape mirror each other.

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
    """The bucket nearest in aspect ratio (on a logarithmic scale); of equally near ones the larger.

    An image that has a bucket's size already gets that one.
    """
    if width < 1 or height < 1 or not buckets:
        raise DataError(
            f"buckets: got an image of {width} x {height} and {len(buckets)} buckets, expected at least 1 each"
        )
    if (width, height) in buckets:
        return Bucket(width, height)
    ratio = math.log(width / height)
    # Rounded, so that the mirrored sizes of a square image tie exactly and the order of the table decides.
    return min(buckets, key=lambda b: (round(abs(math.log(b.width / b.height) - ratio), 9), -b.width * b.height))


def fit(width: int, height: int, bucket: Bucket) -> Fit:
    """Resizes to cover the bucket, then crops its middle. Exact where the size is the bucket's already."""
    scale = max(bucket.width / width, bucket.height / height)
    resized_width = max(bucket.width, round(width * scale))
    resized_height = max(bucket.height, round(height * scale))
    return Fit(
        resized_width, resized_height, (resized_width - bucket.width) // 2, (resized_height - bucket.height) // 2
    )


# ------------------------------------------------------------------------------------------------- lengths

_LENGTH = re.compile(r"([A-Za-z0-9_]+)<=([0-9]+)")


class LengthBucket(NamedTuple):
    """Samples whose `field` has at most `bound` entries along its length. `name` is that of manifests: `codes<=150`."""

    field: str
    bound: int

    @property
    def name(self) -> str:
        return f"{self.field}<={self.bound}"

    @classmethod
    def of(cls, name: str) -> LengthBucket | None:
        """The bucket of a name; None where it names a resolution, or nothing."""
        match = _LENGTH.fullmatch(name)
        return None if match is None else cls(match[1], int(match[2]))


def check_bounds(bounds: Sequence[int]) -> tuple[int, ...]:
    """The bounds of length buckets. Raises DataError unless they are whole numbers that rise from 1 on."""
    whole = all(isinstance(bound, int) and not isinstance(bound, bool) for bound in bounds)
    if not whole or not bounds or bounds[0] < 1 or any(b <= a for a, b in pairwise(bounds)):
        raise DataError(
            f"buckets: got bounds {list(bounds)}, expected whole numbers that rise, such as [100, 150, 200]"
        )
    return tuple(bounds)


def assign_length(field: str, length: int, bounds: Sequence[int]) -> LengthBucket:
    """The bucket with the least bound that holds a length.

    Raises:
        DataError: none does. Cutting a sequence at its bound would be a silent loss.
    """
    for bound in bounds:
        if length <= bound:
            return LengthBucket(field, bound)
    raise DataError(
        f"buckets: got {field} of length {length}, the largest bound is {bounds[-1]}; add a larger one, or make the clips shorter"
    )
