"""Scaled dot-product attention behind one signature: FlashAttention 2, 3 or 4, cuDNN's, or one of torch's own kernels.

Which is fastest depends on the card, the head dim, the lengths and the mask: a run tries them as it starts (kernels/trial.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nexus_scale.kernels import determinism
from nexus_scale.kernels.choice import chosen, chosen_for, note, warn_once
from nexus_scale.kernels.lengths import Lengths
from nexus_scale.kernels.transfer import to_device

_CUDNN, _FLASH, _EFFICIENT, _MATH = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
)
_ORDERS = {
    "cudnn": [_CUDNN, _FLASH, _EFFICIENT, _MATH],
    "flash_attn_3": [_FLASH, _EFFICIENT, _MATH],
    "flash_attn_4": [_FLASH, _EFFICIENT, _MATH],
    "torch_flash": [_FLASH, _EFFICIENT, _MATH],
    "torch_efficient": [_EFFICIENT, _MATH],
    "torch_math": [_MATH],
}
"""Backends of torch that stand for an option, preferred first: one that refuses a shape (cuDNN a head dim above 128) passes it on, and
the last takes any. FlashAttention 3 and 4 take the place of torch's own (kernels/flash.py)."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(q k^T * scale) v, each head by itself.

    Args:
        q: queries, (B, N, L, E).
        k, v: keys and values, (B, N, S, E).
        mask: bool, (B, 1, 1, S) or (B, 1, L, S); True = attend. Each row needs one True: a row without gives NaN.
        bias: added to the logits in the place of a mask, (B or 1, N or 1, L, S): by how far places lie apart, say; -inf hides. It goes
            through torch's scaled_dot_product_attention.
        scale: default 1 / sqrt(E).
    Returns:
        (B, N, L, E) in q's dtype.
    Raises:
        ValueError: a mask that is not bool: as a float it would be added to the logits instead.
    Source: Vaswani et al. 2017; Dao 2023 (FlashAttention 2).
    """
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask of {mask.dtype}; expected bool, True = attend")
    if bias is not None:
        assert mask is None, "a bias hides by -inf, and takes no mask beside it"
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), scale=scale)
    shape = (q.shape[1], q.shape[3], q.shape[2], k.shape[2], mask is not None)
    if q.is_meta:
        note("attention", shape)
    kernel = chosen_for("attention", shape) if q.is_cuda else "sdpa"
    if kernel == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    if kernel == "flash_attn":
        if mask is None and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256:
            from flash_attn.flash_attn_interface import flash_attn_func

            rows = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            y: Tensor = flash_attn_func(*rows, softmax_scale=scale, deterministic=determinism.enabled())
            return y.transpose(1, 2)
        warn_once(
            "attention with a mask, in float32 or with a head dim above 256 goes through torch's "
            "scaled_dot_product_attention: flash_attn has no kernel for it"
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    with sdpa_kernel(_ORDERS[kernel], set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def packed_attention(
    q: Tensor, k: Tensor, v: Tensor, *, q_lengths: Sequence[int], k_lengths: Sequence[int], scale: float | None = None
) -> Tensor:
    """Attention within each of several samples packed end to end, without work on padding or across samples.

    On a GPU in half precision it is one kernel for all samples, FlashAttention's or the one that torch ships; elsewhere a
    call per sample.

    Args:
        q: queries, (1, N, sum of q_lengths, E).
        k, v: keys and values, (1, N, sum of k_lengths, E).
        q_lengths, k_lengths: tokens of each sample.
        scale: default 1 / sqrt(E).
    Returns:
        (1, N, sum of q_lengths, E) in q's dtype.
    Raises:
        ValueError: lengths that do not add up, or a sample with queries and no keys.
    """
    if torch.compiler.is_compiling() and isinstance(q_lengths, Lengths) and isinstance(k_lengths, Lengths):
        return _packed_compiled(q, k, v, q_lengths, k_lengths, scale)
    q_lengths, k_lengths = tuple(q_lengths), tuple(k_lengths)
    if len(q) != 1 or (q.shape[2], k.shape[2], v.shape[2]) != (sum(q_lengths), sum(k_lengths), sum(k_lengths)):
        raise ValueError(
            f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}; expected (1, N, S, E) with S = "
            f"{sum(q_lengths)}, {sum(k_lengths)} and {sum(k_lengths)}, the sums of the lengths"
        )
    if len(q_lengths) != len(k_lengths) or any(n and not m for n, m in zip(q_lengths, k_lengths, strict=True)):
        raise ValueError(f"q_lengths {q_lengths}, k_lengths {k_lengths}; expected a key for every sample with queries")
    if _one_kernel(q):
        ends = _ends(q_lengths, q.device), _ends(k_lengths, q.device)
        return _packed_by_ends(q, k, v, *ends, max(q_lengths), max(k_lengths), scale)
    samples = zip(q.split(q_lengths, dim=2), k.split(k_lengths, dim=2), v.split(k_lengths, dim=2), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*sample, scale=scale) for sample in samples], dim=2)


def _packed_compiled(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Lengths, k_lengths: Lengths, scale: float | None
) -> Tensor:
    """The same by tensors alone. Where no kernel takes several samples, every token meets every other, under a mask."""
    if _one_kernel(q):
        return _packed_by_ends(q, k, v, q_lengths.ends, k_lengths.ends, q_lengths.longest, k_lengths.longest, scale)
    mask = q_lengths.rows[:, None] == k_lengths.rows  # (S, S)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _one_kernel(q: Tensor) -> bool:
    """Whether one kernel takes several samples."""
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and q.shape[-1] <= 256


def _packed_by_ends(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, longest_q: int, longest_k: int, scale: float | None
) -> Tensor:
    kernel = _flash_packed if chosen("attention") == "flash_attn" else _torch_packed
    rows = q[0].transpose(0, 1), k[0].transpose(0, 1), v[0].transpose(0, 1)  # (S, N, E) each
    y: Tensor = kernel(*rows, q_ends, k_ends, longest_q, longest_k, scale)
    return y.transpose(0, 1)[None]


@lru_cache(maxsize=16)
def _ends(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Offsets of the samples and the end of the last one, (B + 1,) int32; the same for all blocks of a forward."""
    return to_device(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), device)


def _flash_packed(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, longest_q: int, longest_k: int, scale: float | None
) -> Any:
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    repeats = determinism.enabled()
    return flash_attn_varlen_func(
        q, k, v, q_ends, k_ends, longest_q, longest_k, softmax_scale=scale, deterministic=repeats
    )


def _torch_packed(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, longest_q: int, longest_k: int, scale: float | None
) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn(q, k, v, q_ends, k_ends, longest_q, longest_k, scale=scale)
