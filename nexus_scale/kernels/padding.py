"""Padding of sequences by what they hold, with a gradient that repeats to the bit where that is wanted: torch's own adds by atomics on a
GPU, and `cluster.deterministic` refuses it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.kernels import determinism


def pad_ends(x: Tensor, before: int, after: int, mode: str) -> Tensor:
    """x (B, C, T) -> (B, C, before + T + after), as `torch.nn.functional.pad` has its modes; a reflection is shorter than x."""
    if x.is_cuda and mode in ("reflect", "replicate") and determinism.enabled():
        return in_pieces(x, before, after, mode)
    return F.pad(x, (before, after), mode)


def in_pieces(x: Tensor, before: int, after: int, mode: str) -> Tensor:
    """The same, put together of slices."""
    last = x.shape[-1] - 1
    if mode == "reflect":
        ends = x[..., 1 : before + 1].flip(-1), x[..., last - after : last].flip(-1)
    else:
        ends = x[..., :1].expand(*x.shape[:-1], before), x[..., last:].expand(*x.shape[:-1], after)
    return torch.cat((ends[0], x, ends[1]), dim=-1)
