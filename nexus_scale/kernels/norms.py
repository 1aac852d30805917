"""Layer norm and RMS norm over the last dimension: Apex's fused kernels, or torch's, which a compiler fuses with what is beside them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.kernels.choice import chosen


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension; statistics in float32.

    Args:
        x: (..., D).
        weight, bias: (D,) or None for 1 and 0.
    Returns:
        (..., D) in x's dtype.
    Source: Ba et al. 2016.
    """
    if (weight is None) == (bias is None) and _apex_serves(x):
        from apex.normalization import fused_layer_norm as apex

        shape = (x.shape[-1],)
        y: Tensor
        if weight is None:
            y = apex.fused_layer_norm(x, shape, eps)
        else:
            y = apex.fused_layer_norm_affine(x, weight, bias, shape, eps)
        return y
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def _apex_serves(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling() and chosen("norm") == "apex"


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        x: (..., D).
        weight: (D,) or None for 1.
    Returns:
        (..., D) in x's dtype.
    Source: Zhang & Sennrich 2019.
    """
    if _apex_serves(x):
        from apex.normalization import fused_layer_norm as apex

        shape = (x.shape[-1],)
        y: Tensor = (
            apex.fused_rms_norm(x, shape, eps) if weight is None else apex.fused_rms_norm_affine(x, weight, shape, eps)
        )
        return y
    return F.rms_norm(x, (x.shape[-1],), weight, eps)
