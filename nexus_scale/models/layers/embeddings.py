"""Embeddings of time and position, and the MLP that maps a vector to the hidden size."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.models.layers.linear import Linear


def sinusoid(t: Tensor, dim: int, max_period: float = 10_000.0, *, shift: int = 0) -> Tensor:
    """cos and sin of t at `dim / 2` frequencies from 1 down to about 1 / max_period.

    Args:
        t: (B,), in units where 1 is the finest step (time in [0, 1] times 1000).
        shift: frequencies are max_period^(-i / (dim / 2 - shift)); 1 ends at 1 / max_period itself.
    Returns:
        (B, dim) float32: cosines, then sines.
    Source: Vaswani et al. 2017, in the order of DDPM's and DiT's code.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift)
    )
    angles = t.float()[:, None] * frequencies  # (B, dim / 2)
    return torch.cat((angles.cos(), angles.sin()), dim=-1)  # (B, dim)


def sincos_position_2d(
    height: int, width: int, dim: int, *, table_size: int, base_size: int, device: torch.device
) -> Tensor:
    """The centre crop, `height` by `width`, of a square sin-cos table of `table_size` places a side.

    Places are scaled so that the whole table spans `base_size` units: models that grow in resolution keep their scale
    (SD3, section 5.3.2). The table factors into one axis each for x and y, so only the crop is ever computed, and a
    network has no buffer of hundreds of MB to carry through checkpoints.

    Returns:
        (height * width, dim) float32; the first half of dim encodes x, the second y.
    """

    def axis(length: int) -> Tensor:
        first = (table_size - length) // 2
        # float32 before float64: to the bit the table of published SD3 weights
        return torch.arange(first, first + length, dtype=torch.float32, device=device) / (table_size / base_size)

    return _sincos_grid(axis(height), axis(width), dim)


def stretched_position_2d(height: int, width: int, dim: int, *, span: float, device: torch.device) -> Tensor:
    """Sin-cos positions of which either axis spans `span` units, however many places it has; see `sincos_position_2d`.

    Returns:
        (height * width, dim) float32; the first half of dim encodes x, the second y.
    """

    def axis(length: int) -> Tensor:
        return torch.arange(length, dtype=torch.float32, device=device) * (span / length)

    return _sincos_grid(axis(height), axis(width), dim)


def _sincos_grid(y: Tensor, x: Tensor, dim: int) -> Tensor:
    """Places (height,) and (width,) float32 -> (height * width, dim) float32, x before y."""
    omega = 1.0 / 10_000 ** (torch.arange(dim // 4, dtype=torch.float64, device=x.device) / (dim / 4.0))

    def waves(place: Tensor) -> Tensor:
        angles = torch.outer(place.double(), omega)  # (length, dim / 4)
        return torch.cat((angles.sin(), angles.cos()), dim=-1).float()  # (length, dim / 2)

    across, down = waves(x)[None, :, :], waves(y)[:, None, :]
    grid = torch.cat((across.expand(len(y), -1, -1), down.expand(-1, len(x), -1)), dim=-1)
    return grid.reshape(len(y) * len(x), dim)


class VectorEmbedder(nn.Module):
    """(B, in) -> (B, D): linear, SiLU, linear. For the pooled text, and behind the sinusoids of time."""

    def __init__(self, in_features: int, hidden_size: int):
        super().__init__()
        self.fc1 = Linear(in_features, hidden_size)
        self.fc2 = Linear(hidden_size, hidden_size)

    def forward(self, v: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(v)))


class TimestepEmbedder(VectorEmbedder):
    """t in [0, 1], (B,) -> (B, D)."""

    def __init__(self, hidden_size: int, frequencies: int = 256):
        super().__init__(frequencies, hidden_size)
        self.frequencies = frequencies

    def forward(self, t: Tensor) -> Tensor:
        sinusoids = sinusoid(t.float() * 1000.0, self.frequencies)  # (B, frequencies)
        return super().forward(sinusoids.to(self.fc1.weight.dtype))

    def extra_repr(self) -> str:
        return f"frequencies={self.frequencies}"
