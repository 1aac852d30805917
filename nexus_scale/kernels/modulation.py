"""Adaptive layer norm: shift, scale and gate come from the conditioning, one vector per sample.

Source: Peebles & Xie 2023 (DiT), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_scale.kernels.norms import layer_norm


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift.

    Args:
        x: (B, L, D).
        shift, scale: (B, D).
    """
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm without weight and bias, then `modulate`: x (B, L, D), shift and scale (B, D) -> (B, L, D)."""
    return modulate(layer_norm(x, eps=eps), shift, scale)


def gated_add(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y: the residual x and the branch y (B, L, D), gate (B, D) -> (B, L, D)."""
    return torch.addcmul(x, gate[:, None], y)
