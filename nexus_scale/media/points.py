"""Points of a plane: samples of mixtures whose modes are known."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

SIDE, DOT = 64, 1
"""Pixels of a picture's sides, and on each side of its dot's middle."""
MARGIN = 1.25


class Points:
    """See `Medium`. Samples (B, D) are shown as they are; a picture shows the first two numbers.

    Args:
        largest: absolute value in the data; a picture shows a little more.
    """

    name = "point"
    formats: Sequence[str] = ("npy",)
    shard_formats: Sequence[str] = ("npy",)
    rate_hz: float | None = None

    def __init__(self, largest: float):
        self.reach = MARGIN * max(largest, 1e-6)

    def decode(
        self, samples: Tensor, lengths: Sequence[int] | None = None, before: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        return list(samples.float())

    def picture(self, shown: Tensor) -> np.ndarray:
        """A dot in a white square with the axes; at its border where the point lies beyond."""
        picture = np.full((SIDE, SIDE, 3), 255, np.uint8)
        picture[SIDE // 2, :] = picture[:, SIDE // 2] = 208
        x, y = torch.nn.functional.pad(shown.detach().float().cpu(), (0, 2))[:2].clamp(-self.reach, self.reach).tolist()
        column, row = (round((1 + value / self.reach) / 2 * (SIDE - 1)) for value in (x, -y))
        picture[max(0, row - DOT) : row + DOT + 1, max(0, column - DOT) : column + DOT + 1] = (176, 32, 32)
        return picture

    def file(self, shown: Tensor, format: str | None = None) -> bytes:
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, shown.detach().float().cpu().numpy(), allow_pickle=False)
        return buffer.getvalue()
