"""Between a fused projection and attention: queries, keys and values by head, norms of queries and keys, rotary positions, streams joined.

By Triton's kernels (kernels/triton_heads.py) where `kernels.rope` is `triton` and the device is CUDA; otherwise networks put it together
from the operations of norms, rope and blocked. Without norm and rotation there is nothing to compute, and heads are views of the
projection: there plain torch serves everywhere. The gradients of queries, keys and values then come from attention as three tensors and
are stacked, six passes over (B, L, D), since neither torch's attention nor cuDNN's writes them into one; three projections in the place
of one would read their input three times and add three gradients of it, which is no less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nexus_scale.kernels.choice import chosen_for, note
from nexus_scale.kernels.norms import layer_norm, rms_norm
from nexus_scale.kernels.rope import apply_rope

PLAIN, RMS, LAYER = 0, 1, 2
"""Norm of queries and keys, per head: none, by the root of their mean square, or a layer norm."""

WIDEST = 8192
"""Features of a token, in heads and head dims rounded up to powers of two, that a program holds in registers."""

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of `rope_frequencies`, of the tokens that turn."""


def serves(qkvs: Sequence[Tensor], num_heads: int, norm: int, rotation: Rotation | None) -> bool:
    """Whether `joined` computes this."""
    E = qkvs[0].shape[2] // (3 * num_heads)
    if norm == PLAIN and rotation is None:
        return False
    shape = (num_heads, E, norm, int(rotation is not None))
    if qkvs[0].is_meta:
        note("rope", (sum(qkv.shape[1] for qkv in qkvs), *shape))
    held = (1 << (num_heads - 1).bit_length()) * (1 << (E - 1).bit_length())
    if not qkvs[0].is_cuda or E % 2 or held > WIDEST or qkvs[0].dtype is torch.float64:
        return False
    return chosen_for("rope", shape) == "triton"


def joined(
    qkvs: Sequence[Tensor],
    weights: Sequence[Tensor],
    rotation: Rotation | None,
    *,
    norm: int,
    num_heads: int,
    eps: float,
    num_q: int = 1,
    turned_from: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of several streams in one sequence, by Triton's kernels.

    Args:
        qkvs: per stream (B, L_i, 3D), rows q, k, v.
        weights: of the norms, (E,) each: per stream the weight of queries, the bias of queries, the weight of keys, the bias of keys;
            RMS has no biases, PLAIN nothing.
        rotation: of the tokens of the sequence from `turned_from` on, (S - turned_from, E/2) each; None: none turn.
        num_q: how many of the first streams have queries.
    Returns:
        q (B, sum of the first L_i, N, E), k, v (B, sum of L_i, N, E).
    """
    q, k, v = Joined.apply(
        norm, num_q, num_heads, eps, turned_from, len(qkvs), rotation is not None, *qkvs, *weights, *(rotation or ())
    )
    return q, k, v


def plain(
    qkvs: Sequence[Tensor],
    weights: Sequence[Tensor],
    rotation: Rotation | None,
    norm: int,
    num_q: int,
    num_heads: int,
    eps: float,
    turned_from: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`joined` in torch's operations."""
    parts: tuple[list[Tensor], ...] = ([], [], [])
    each = {PLAIN: 0, RMS: 2, LAYER: 4}[norm]
    for i, qkv in enumerate(qkvs):
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)  # (B, L_i, N, E) each
        own = weights[each * i : each * (i + 1)]
        if norm == RMS:
            q, k = rms_norm(q, own[0], eps), rms_norm(k, own[1], eps)
        elif norm == LAYER:
            q, k = layer_norm(q, own[0], own[1], eps), layer_norm(k, own[2], own[3], eps)
        for part, x in zip(parts, (q, k, v) if i < num_q else (q[:, :0], k, v), strict=True):
            part.append(x)
    q, k, v = (torch.cat(part, dim=1) for part in parts)
    if rotation is not None:
        q, k = (_turned(x, rotation, turned_from) for x in (q, k))
    return q, k, v


def _turned(x: Tensor, rotation: Rotation, turned_from: int) -> Tensor:
    """x (B, S, N, E) with its tokens from `turned_from` on turned, as far as it goes."""
    still, turning = x[:, :turned_from].transpose(1, 2), x[:, turned_from:].transpose(1, 2)
    cos, sin = (table[: turning.shape[2]] for table in rotation)
    return torch.cat((still, apply_rope(turning, cos, sin)), dim=2).transpose(1, 2)


class Joined(torch.autograd.Function):
    """`joined`; a gradient that is differentiated in turn (`create_graph`) is computed by torch's own operations."""

    @staticmethod
    def forward(
        ctx: Any,
        norm: int,
        num_q: int,
        num_heads: int,
        eps: float,
        turned_from: int,
        streams: int,
        rotated: bool,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from nexus_scale.kernels import triton_heads

        qkvs, weights, rotation = _told_apart(streams, rotated, tensors)
        ctx.save_for_backward(*tensors)
        ctx.norm, ctx.num_q, ctx.num_heads, ctx.eps, ctx.turned_from = norm, num_q, num_heads, eps, turned_from
        ctx.streams, ctx.rotated = streams, rotated
        return triton_heads.forward(qkvs, weights, rotation, norm, num_q, num_heads, eps, turned_from)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
        from nexus_scale.kernels import triton_heads

        qkvs, weights, rotation = _told_apart(ctx.streams, ctx.rotated, ctx.saved_tensors)
        settings = ctx.norm, ctx.num_q, ctx.num_heads, ctx.eps, ctx.turned_from
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            outs = plain(qkvs, weights, rotation, *settings)
            dqkvs_, dweights_ = _again(outs, qkvs, weights, (dq, dk, dv))
        else:
            dqkvs_, dweights_ = triton_heads.backward(dq, dk, dv, qkvs, weights, rotation, *settings)
        angles = (None, None) if ctx.rotated else ()
        return (None, None, None, None, None, None, None, *dqkvs_, *dweights_, *angles)


def _told_apart(
    streams: int, rotated: bool, tensors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], Rotation | None]:
    end = len(tensors) - 2 if rotated else len(tensors)
    rotation = (tensors[end], tensors[end + 1]) if rotated else None
    return list(tensors[:streams]), list(tensors[streams:end]), rotation


def _again(
    outs: Sequence[Tensor], qkvs: Sequence[Tensor], weights: Sequence[Tensor], given: Sequence[Tensor]
) -> tuple[list[Any], list[Any]]:
    wanted = [*qkvs, *weights]
    learned = [x for x in wanted if x.requires_grad]
    found = iter(torch.autograd.grad(outs, learned, given, create_graph=True))
    gradients = [next(found) if x.requires_grad else None for x in wanted]
    return gradients[: len(qkvs)], gradients[len(qkvs) :]
