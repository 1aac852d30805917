"""Attention over a sequence that is spread over ranks: two all-to-alls exchange tokens for heads and back (Ulysses).

Each rank holds S / P of the tokens and all heads; for the attention alone it holds all tokens and N / P of the heads. What a rank
sends is S / P * D values four times a block, whatever P: it does not grow with the number of ranks.

Source: Jacobs et al. 2023, "DeepSpeed Ulysses".
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single

from nexus_scale.kernels.attention import attention


class _Exchange(torch.autograd.Function):
    """Splits dim `split` over the ranks and joins what they send along dim `join`; its gradient is the exchange back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
        ctx.group, ctx.split, ctx.join = group, split, join
        sent = torch.stack(x.chunk(dist.get_world_size(group), dim=split))
        if torch.compiler.is_compiling():  # the form that graphs may have within them
            received = all_to_all_single(sent, None, None, group)
        else:  # not as lists, which gloo does not take in torch 2.11
            received = torch.empty_like(sent)
            dist.all_to_all_single(received, sent, group=group)
        return torch.cat(received.unbind(), dim=join)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Exchange.apply(grad, ctx.group, ctx.join, ctx.split), None, None, None


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`attention` over the whole sequence, of which each rank of `group` holds an equal part, in the order of the ranks.

    A collective: all ranks of the group call it, forward and backward, as often as one another.

    Args:
        q, k, v: this rank's tokens and all heads, (B, N, S / P, E).
        group: P ranks.
        mask: bool, (B, 1, 1, S): keys of the *whole* sequence to attend to, the same on all ranks.
        scale: default 1 / sqrt(E).
    Returns:
        (B, N, S / P, E): this rank's tokens.
    Raises:
        ValueError: P does not divide the heads.
    """
    ranks = dist.get_world_size(group)
    if q.shape[1] % ranks:
        raise ValueError(
            f"{q.shape[1]} heads do not divide among {ranks} ranks of a sequence; use fewer ranks per sequence"
        )
    q, k, v = (_Exchange.apply(x, group, 1, 2) for x in (q, k, v))  # (B, N / P, S, E)
    y = attention(q, k, v, mask=mask, scale=scale)
    out: Tensor = _Exchange.apply(y, group, 2, 1)  # (B, N, S / P, E)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return split_sequence(grad, ctx.group, ctx.dim), None, None


def split_sequence(x: Tensor, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
    """This rank's equal part of a tensor that all ranks of the group hold, (B, S, ...) -> (B, S / P, ...).

    Its gradient is this rank's part of the whole's: sum over the group for parameters and inputs that all ranks share.
    Raises:
        ValueError: the ranks do not divide the sequence.
    """
    ranks = dist.get_world_size(group)
    if x.shape[dim] % ranks:
        raise ValueError(
            f"a sequence of {x.shape[dim]} tokens does not divide among {ranks} ranks; pad it, and mask the padding"
        )
    return x.chunk(ranks, dim=dim)[dist.get_rank(group)]


def gather_sequence(x: Tensor, group: dist.ProcessGroup, dim: int = 1) -> Tensor:
    """The whole sequence on every rank, (B, S / P, ...) -> (B, S, ...), for a loss that every rank computes alike: the gradient
    of a rank's part is that of the one loss, once."""
    out: Tensor = _Gather.apply(x, group, dim)
    return out
