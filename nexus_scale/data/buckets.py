"""Aspect-ratio buckets: images of many shapes are cut to few sizes of about one area, so that batches share a shape.

Source: NovelAI's aspect ratio bucketing (2022); Podell et al. 2023 (SDXL), appendix I.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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
