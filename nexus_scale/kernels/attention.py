"""Scaled dot-product attention: FlashAttention 2, cuDNN's or torch's own choice of kernel behind one signature."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nexus_scale.kernels.choice import chosen, warn_once

# cuDNN refuses some shapes (a head dim above 128); the others follow in torch's own order, MATH serves the meta device.
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v, each head by itself.

    Args:
        q: queries, (B, N, L, E).
        k, v: keys and values, (B, N, S, E).
        mask: bool, (B, 1, 1, S) or (B, 1, L, S); True = attend. Each row needs one True: a row without gives NaN.
        scale: default 1 / sqrt(E).
    Returns:
        (B, N, L, E) in q's dtype.
    Raises:
        ValueError: a mask that is not bool: as a float it would be added to the logits instead.
    Source: Vaswani et al. 2017; Dao 2023 (FlashAttention 2).
    """
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask of {mask.dtype}; expected bool, True = attend")
    kernel = chosen("attention")
    if kernel == "sdpa" or not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if kernel == "flash_attn":
        if mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
            from flash_attn.flash_attn_interface import flash_attn_func

            y: Tensor = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), softmax_scale=scale)
            return y.transpose(1, 2)
        warn_once(
            "attention with a mask, in float32 or with a head dim above 256 goes through torch's "
            "scaled_dot_product_attention: flash_attn has no kernel for it"
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
