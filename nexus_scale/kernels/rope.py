"""Rotary position embeddings over one or more position axes, on neighbouring pairs of features.

Source: Su et al. 2021 (RoFormer); the split of the head dim over axes is FLUX's and CogVideoX's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rope_frequencies(positions: Tensor, dims: Sequence[int], theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of position times frequency, for `apply_rope`.

    Args:
        positions: (L, A), a position per axis (for an image: row and column).
        dims: features of the head that each axis turns, A even numbers; their sum is E.
        theta: base of the frequencies theta^(-2i/dim).
    Returns:
        cos, sin: each (L, E/2) float32. Angles are taken in float64: positions of 10^5 would lose their digits.
    Raises:
        ValueError: dims do not fit the axes, or one is odd.
    """
    if positions.ndim != 2 or positions.shape[1] != len(dims) or any(dim % 2 or dim <= 0 for dim in dims):
        raise ValueError(
            f"positions {tuple(positions.shape)} and dims {tuple(dims)}; expected (L, A) and A positive even numbers"
        )
    angles = []
    for axis, dim in enumerate(dims):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
        angles.append(positions[:, axis, None].double() * theta**-exponents)  # (L, dim/2)
    angle = torch.cat(angles, dim=1)  # (L, E/2)
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair of features (2i, 2i + 1) by its angle, in float32.

    Args:
        x: queries or keys, (B, N, L, E).
        cos, sin: from `rope_frequencies`, (L, E/2).
    Returns:
        (B, N, L, E) in x's dtype.
    """
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # each (B, N, L, E/2)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)  # (B, N, L, E/2, 2)
    return turned.flatten(-2).to(x.dtype)
