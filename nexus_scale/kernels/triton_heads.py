"""Triton kernels between the fused projection and attention: split into heads, norm of queries and keys, rotary positions, streams joined.

A program works on up to ROWS tokens of one sample, all heads of a token at once. Forward reads queries and keys once and writes them
normed, turned and in their place of the joint sequence; values are copied where streams are joined, and stay where they are otherwise.
Backward writes the gradient of the projection whole, so that nothing is stacked, and sums the gradients of the norms' weights in
registers. Passes over (B, L, D): 4 forward and 8 backward for a stream, where the same in operations of their own takes 8 and 18: the
norm, its sums for two weights, the rotation and the stacking each read what the one before wrote.

Imported only where Triton is.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (what a kernel takes has types of Triton, made up as it is compiled)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512
"""About as many as a large GPU runs at once; a program takes several tokens where there are more."""

PLAIN, RMS, LAYER = 0, 1, 2
"""Norm of queries and keys: none, by the root of their mean square, or a layer norm."""


@triton.jit
def _normed(x, inside, E, eps, NORM: tl.constexpr):
    """Each head of x by itself: normed, and 1 / deviation."""
    if NORM == 2:
        x = tl.where(inside, x - (tl.sum(x, axis=1) / E)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / E + tl.cast(eps, tl.float32))  # inductor passes it in float64
    return x * rstd[:, None], rstd[:, None]


@triton.jit
def _turned(x, cos, sin, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Each pair of neighbours turned by its angle."""
    even, odd = tl.split(tl.reshape(x, (HEADS, WIDTH // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (HEADS, WIDTH))


@triton.jit
def heads_forward(
    QKV, Q_WEIGHT, Q_BIAS, K_WEIGHT, K_BIAS, COS, SIN, Q, K, V,
    qkv_b, qkv_l, q_b, k_b, place, turned_from, chunks, L, N, E, eps,
    ROWS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    NORM: tl.constexpr, TURNED: tl.constexpr, QUERIES: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Q, K, V (B, S, N, E) at `place` of the sequence; tokens of the stream from `turned_from` on are turned, by rows of COS from 0 on."""
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    first = (program % chunks).to(tl.int64) * ROWS  # offsets within a sample may pass 2^31 where samples are packed
    head = tl.arange(0, HEADS)[:, None]
    feature = tl.arange(0, WIDTH)[None, :]
    inside = (head < N) & (feature < E)
    own = head * E + feature
    D = N * E
    if NORM > 0:
        wide = tl.arange(0, WIDTH)[None, :]
        q_weight = tl.load(Q_WEIGHT + wide, mask=wide < E, other=0.0).to(tl.float32)
        k_weight = tl.load(K_WEIGHT + wide, mask=wide < E, other=0.0).to(tl.float32)
        if NORM == 2:
            q_bias = tl.load(Q_BIAS + wide, mask=wide < E, other=0.0).to(tl.float32)
            k_bias = tl.load(K_BIAS + wide, mask=wide < E, other=0.0).to(tl.float32)
    pair = tl.arange(0, WIDTH // 2)[None, :]
    for i in range(ROWS):
        token = first + i
        here = inside & (token < L)
        row = QKV + b * qkv_b + token * qkv_l + own
        to_q = b * q_b + (place + token) * D + own
        to_k = b * k_b + (place + token) * D + own
        if TURNED:
            angles = (token - turned_from) * (E // 2) + pair
            turns = (pair < E // 2) & (token >= turned_from) & (token < L)
            cos = tl.load(COS + angles, mask=turns, other=1.0)
            sin = tl.load(SIN + angles, mask=turns, other=0.0)
        if QUERIES:
            q = tl.load(row, mask=here, other=0.0).to(tl.float32)
            if NORM > 0:
                q, _ = _normed(q, inside, E, eps, NORM)
                q = q * q_weight
                if NORM == 2:
                    q = q + q_bias
            if TURNED:
                q = _turned(q, cos, sin, HEADS, WIDTH)
            tl.store(Q + to_q, q.to(Q.dtype.element_ty), mask=here)
        k = tl.load(row + D, mask=here, other=0.0).to(tl.float32)
        if NORM > 0:
            k, _ = _normed(k, inside, E, eps, NORM)
            k = k * k_weight
            if NORM == 2:
                k = k + k_bias
        if TURNED:
            k = _turned(k, cos, sin, HEADS, WIDTH)
        tl.store(K + to_k, k.to(K.dtype.element_ty), mask=here)
        if VALUES:
            tl.store(V + to_k, tl.load(row + 2 * D, mask=here, other=0.0), mask=here)


@triton.jit
def heads_backward(
    DQ, DK, DV, QKV, Q_WEIGHT, K_WEIGHT, COS, SIN, DQKV, SUMS,
    dq_b, dq_l, dq_n, dk_b, dk_l, dk_n, dv_b, dv_l, dv_n, qkv_b, qkv_l, place, turned_from, chunks, L, N, E, eps,
    ROWS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    NORM: tl.constexpr, TURNED: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """DQKV (B, L, 3D), whole; zeros for queries of a stream without. SUMS (B * chunks, 4, E), weight and bias of queries, then of keys."""
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    first = (program % chunks).to(tl.int64) * ROWS  # offsets within a sample may pass 2^31 where samples are packed
    head = tl.arange(0, HEADS)[:, None]
    feature = tl.arange(0, WIDTH)[None, :]
    inside = (head < N) & (feature < E)
    own = head * E + feature
    D = N * E
    pair = tl.arange(0, WIDTH // 2)[None, :]
    if NORM > 0:
        q_weight = tl.load(Q_WEIGHT + feature, mask=feature < E, other=0.0).to(tl.float32)
        k_weight = tl.load(K_WEIGHT + feature, mask=feature < E, other=0.0).to(tl.float32)
        sum_qw = tl.zeros((HEADS, WIDTH), dtype=tl.float32)
        sum_kw = tl.zeros((HEADS, WIDTH), dtype=tl.float32)
        if NORM == 2:
            sum_qb = tl.zeros((HEADS, WIDTH), dtype=tl.float32)
            sum_kb = tl.zeros((HEADS, WIDTH), dtype=tl.float32)
    for i in range(ROWS):
        token = first + i
        here = inside & (token < L)
        row = QKV + b * qkv_b + token * qkv_l + own
        to = DQKV + (b * L + token) * 3 * D + own
        at = place + token
        if TURNED:
            angles = (token - turned_from) * (E // 2) + pair
            turns = (pair < E // 2) & (token >= turned_from) & (token < L)
            cos = tl.load(COS + angles, mask=turns, other=1.0)
            sin = tl.load(SIN + angles, mask=turns, other=0.0)
        if QUERIES:
            dq = tl.load(DQ + b * dq_b + at * dq_l + head * dq_n + feature, mask=here, other=0.0).to(tl.float32)
            if TURNED:
                dq = _turned(dq, cos, -sin, HEADS, WIDTH)
            if NORM > 0:
                normed, rstd = _normed(tl.load(row, mask=here, other=0.0).to(tl.float32), inside, E, eps, NORM)
                sum_qw += dq * normed
                if NORM == 2:
                    sum_qb += dq
                dq = dq * q_weight
                mean = tl.sum(dq * normed, axis=1) / E
                if NORM == 2:
                    dq = dq - (tl.sum(dq, axis=1) / E)[:, None]
                dq = (dq - normed * mean[:, None]) * rstd
        else:
            dq = tl.zeros((HEADS, WIDTH), dtype=tl.float32)
        tl.store(to, dq.to(DQKV.dtype.element_ty), mask=here)
        dk = tl.load(DK + b * dk_b + at * dk_l + head * dk_n + feature, mask=here, other=0.0).to(tl.float32)
        if TURNED:
            dk = _turned(dk, cos, -sin, HEADS, WIDTH)
        if NORM > 0:
            normed, rstd = _normed(tl.load(row + D, mask=here, other=0.0).to(tl.float32), inside, E, eps, NORM)
            sum_kw += dk * normed
            if NORM == 2:
                sum_kb += dk
            dk = dk * k_weight
            mean = tl.sum(dk * normed, axis=1) / E
            if NORM == 2:
                dk = dk - (tl.sum(dk, axis=1) / E)[:, None]
            dk = (dk - normed * mean[:, None]) * rstd
        tl.store(to + D, dk.to(DQKV.dtype.element_ty), mask=here)
        dv = tl.load(DV + b * dv_b + at * dv_l + head * dv_n + feature, mask=here, other=0.0)
        tl.store(to + 2 * D, dv.to(DQKV.dtype.element_ty), mask=here)
    if NORM > 0:
        column = tl.arange(0, WIDTH)
        sums = SUMS + program.to(tl.int64) * 4 * E + column
        tl.store(sums, tl.sum(sum_qw, axis=0), mask=column < E)
        tl.store(sums + 2 * E, tl.sum(sum_kw, axis=0), mask=column < E)
        if NORM == 2:
            tl.store(sums + E, tl.sum(sum_qb, axis=0), mask=column < E)
            tl.store(sums + 3 * E, tl.sum(sum_kb, axis=0), mask=column < E)


# ------------------------------------------------------------------------------------------------ launches


def _shape(B: int, L: int, N: int, E: int) -> tuple[int, int, int, int, int]:
    """Tokens of a program, programs of a sample, heads and features that a program holds, warps."""
    rows = 1 if B > 1 else 8  # samples packed end to end are one, of a length that a compiler leaves open
    while B > 1 and rows < 64 and rows < L and rows * 2 * PROGRAMS <= B * L:
        rows *= 2
    heads, width = 1 << (N - 1).bit_length(), max(16, 1 << (E - 1).bit_length())
    warps = 4 if heads * width <= 1024 else 8 if heads * width <= 4096 else 16
    return rows, (L + rows - 1) // rows, heads, width, warps


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    qkvs: Sequence[Tensor],
    weights: Sequence[Tensor],
    rotation: tuple[Tensor, Tensor] | None,
    norm: int,
    num_q: int,
    num_heads: int,
    eps: float,
    turned_from: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Streams (B, L_i, 3D) -> q (B, sum of the first num_q L_i, N, E), k, v (B, sum of L_i, N, E).

    Args:
        weights: per stream of queries' weight and bias, then keys', (E,) each; without biases where `norm` is RMS; empty for PLAIN.
        rotation: cosines and sines of the tokens of the sequence from `turned_from` on, (S - turned_from, E/2) float32; None: none turn.
    """
    qkvs = [_rows(qkv) for qkv in qkvs]
    B, E = len(qkvs[0]), qkvs[0].shape[2] // (3 * num_heads)
    lengths = [qkv.shape[1] for qkv in qkvs]
    device, dtype = qkvs[0].device, qkvs[0].dtype
    q = torch.empty((B, sum(lengths[:num_q]), num_heads, E), dtype=dtype, device=device)
    k = torch.empty((B, sum(lengths), num_heads, E), dtype=dtype, device=device)
    joined = len(qkvs) > 1
    v = torch.empty_like(k) if joined else qkvs[0].unflatten(-1, (3, num_heads, E))[:, :, 2]
    place = 0
    for i, qkv in enumerate(qkvs):
        q_weight, q_bias, k_weight, k_bias = _of_stream(weights, i, norm, qkv)
        cos, sin, first = _angles(rotation, place, turned_from, qkv)
        rows, chunks, heads, width, warps = _shape(B, lengths[i], num_heads, E)
        heads_forward[(B * chunks,)](
            qkv, q_weight, q_bias, k_weight, k_bias, cos, sin, q, k, v if joined else k,
            qkv.stride(0), qkv.stride(1), q.stride(0), k.stride(0), place, first, chunks, lengths[i], num_heads, E, eps,
            ROWS=rows, HEADS=heads, WIDTH=width, NORM=norm, TURNED=rotation is not None, QUERIES=i < num_q, VALUES=joined,
            num_warps=warps,
        )  # fmt: skip
        place += lengths[i]
    return q, k, v


def _of_stream(weights: Sequence[Tensor], i: int, norm: int, other: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight and bias of queries, then of keys, of stream i; another tensor stands for what there is none of."""
    if norm == PLAIN:
        return other, other, other, other
    if norm == RMS:
        return weights[2 * i], other, weights[2 * i + 1], other
    q_weight, q_bias, k_weight, k_bias = weights[4 * i : 4 * i + 4]
    return q_weight, q_bias, k_weight, k_bias


def _angles(
    rotation: tuple[Tensor, Tensor] | None, place: int, turned_from: int, other: Tensor
) -> tuple[Tensor, Tensor, int]:
    """Cosines, sines, and the token of this stream whose angles are their first row."""
    if rotation is None:
        return other, other, 0
    return rotation[0], rotation[1], turned_from - place


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkvs: Sequence[Tensor],
    weights: Sequence[Tensor],
    rotation: tuple[Tensor, Tensor] | None,
    norm: int,
    num_q: int,
    num_heads: int,
    eps: float,
    turned_from: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of `forward`: of the streams, and of the weights."""
    dq, dk, dv, qkvs = _rows(dq), _rows(dk), _rows(dv), [_rows(qkv) for qkv in qkvs]
    B, E = len(qkvs[0]), qkvs[0].shape[2] // (3 * num_heads)
    dqkvs, dweights, place = [], [], 0
    for i, qkv in enumerate(qkvs):
        L = qkv.shape[1]
        q_weight, _, k_weight, _ = _of_stream(weights, i, norm, qkv)
        cos, sin, first = _angles(rotation, place, turned_from, qkv)
        rows, chunks, heads, width, warps = _shape(B, L, num_heads, E)
        dqkv = torch.empty((B, L, 3 * num_heads * E), dtype=qkv.dtype, device=qkv.device)
        sums = torch.zeros((B * chunks if norm else 1, 4, E), dtype=torch.float32, device=qkv.device)
        heads_backward[(B * chunks,)](
            dq, dk, dv, qkv, q_weight, k_weight, cos, sin, dqkv, sums,
            dq.stride(0), dq.stride(1), dq.stride(2), dk.stride(0), dk.stride(1), dk.stride(2),
            dv.stride(0), dv.stride(1), dv.stride(2), qkv.stride(0), qkv.stride(1),
            place, first, chunks, L, num_heads, E, eps,
            ROWS=rows, HEADS=heads, WIDTH=width, NORM=norm, TURNED=rotation is not None, QUERIES=i < num_q, num_warps=warps,
        )  # fmt: skip
        dqkvs.append(dqkv)
        if norm:
            added = sums.sum(0).to(q_weight.dtype)  # (4, E)
            dweights += [added[0], added[2]] if norm == RMS else [added[0], added[1], added[2], added[3]]
        place += L
    return dqkvs, dweights


KERNELS: tuple[Any, ...] = (heads_forward, heads_backward)
