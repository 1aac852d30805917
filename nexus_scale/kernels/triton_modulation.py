"""Triton kernels of a modulated block: norm + modulate, gate + residual + norm + modulate, gate + residual.

One program works on up to ROWS tokens of one sample and keeps that sample's shift, scale and gate, and in backward the sums of
their gradients over its tokens, in registers: each activation is read once and written once, forward and backward. The sums of
a program are a row of `chunks` per sample, added up by torch in one order: no atomics, so that the same shapes give the same bits.

Passes over an activation (B, L, D): norm + modulate of a residual stream 2 forward and 4 backward, gate + residual + norm + modulate 4 and
6, gate + residual 3 and 3. That is 9 forward, as inductor's, and 13 backward with one or two of sums, where inductor's own plan for a DiT
block has 19 (Scheduler of torch 2.13, count_bytes, batch 16, 256 tokens, D 1152): it reads the activations again for sums over tokens. How
fast either is on a GPU says `nexus bench gpu`, case `fused`.

Left to inductor: GELU and its derivative, 20 passes. On an H100 they took 7.0 ms in 28 blocks over 16,384 tokens of width 1152, 3.0 TB/s;
there is nothing to win but the sums of dY over tokens for biases (9 passes a block), which need the bias outside its linear.

Imported only where Triton is; `TRITON_INTERPRET=1` runs them on a CPU.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# (what a kernel takes has types of Triton, made up as it is compiled)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512
"""About as many as a large GPU runs at once; a program takes several tokens where there are more."""


@triton.jit
def norm_modulate_forward(
    X, GATE, Y, SHIFT, SCALE, SUM, OUT, MEAN, RSTD,
    x_b, x_l, y_b, y_l, gate_b, shift_b, scale_b, chunks, L, D, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """SUM = X + GATE * Y where GATED, else X; OUT = layer norm of SUM * (1 + SCALE) + SHIFT."""
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    first = (program % chunks).to(tl.int64) * ROWS  # offsets within a sample may pass 2^31 where samples are packed
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    shift = tl.load(SHIFT + b * shift_b + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(SCALE + b * scale_b + columns, mask=inside, other=0.0).to(tl.float32) + 1.0
    if GATED:
        gate = tl.load(GATE + b * gate_b + columns, mask=inside, other=0.0).to(tl.float32)
    for i in range(ROWS):
        token = first + i
        here = inside & (token < L)
        x = tl.load(X + b * x_b + token * x_l + columns, mask=here, other=0.0).to(tl.float32)
        row = b * L + token
        if GATED:
            y = tl.load(Y + b * y_b + token * y_l + columns, mask=here, other=0.0).to(tl.float32)
            rounded = (x + gate * y).to(SUM.dtype.element_ty)
            tl.store(SUM + row * D + columns, rounded, mask=here)
            x = rounded.to(tl.float32)
        mean = tl.sum(x, axis=0) / D
        centred = tl.where(inside, x - mean, 0.0)
        rstd = 1.0 / tl.sqrt(
            tl.sum(centred * centred, axis=0) / D + tl.cast(eps, tl.float32)
        )  # inductor passes float64
        tl.store(OUT + row * D + columns, (centred * rstd * weight + shift).to(OUT.dtype.element_ty), mask=here)
        tl.store(MEAN + row, mean, mask=token < L)
        tl.store(RSTD + row, rstd, mask=token < L)


@triton.jit
def norm_modulate_backward(
    DOUT, DSUM, X, GATE, Y, SCALE, MEAN, RSTD, DX, DY, SUMS,
    dout_b, dout_l, dsum_b, dsum_l, x_b, x_l, y_b, y_l, gate_b, scale_b, chunks, L, D,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, GATED: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """DX: gradient of X through the norm, plus DSUM where RESIDUAL. DY = GATE * DX where GATED.

    SUMS: (B, chunks, 2 or 3, D), over the tokens of this program: of DOUT (shift), DOUT * normed (scale), DX * Y (gate).
    """
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    first = (program % chunks).to(tl.int64) * ROWS  # offsets within a sample may pass 2^31 where samples are packed
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    weight = tl.load(SCALE + b * scale_b + columns, mask=inside, other=0.0).to(tl.float32) + 1.0
    dshift = tl.zeros((BLOCK,), dtype=tl.float32)
    dscale = tl.zeros((BLOCK,), dtype=tl.float32)
    if GATED:
        gate = tl.load(GATE + b * gate_b + columns, mask=inside, other=0.0).to(tl.float32)
        dgate = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(ROWS):
        token = first + i
        here = inside & (token < L)
        row = b * L + token
        dout = tl.load(DOUT + b * dout_b + token * dout_l + columns, mask=here, other=0.0).to(tl.float32)
        x = tl.load(X + b * x_b + token * x_l + columns, mask=here, other=0.0).to(tl.float32)
        mean = tl.load(MEAN + row, mask=token < L, other=0.0)
        rstd = tl.load(RSTD + row, mask=token < L, other=0.0)
        normed = tl.where(inside, (x - mean) * rstd, 0.0)
        dshift += dout
        dscale += dout * normed
        dnormed = dout * weight
        mean_d = tl.sum(dnormed, axis=0) / D
        mean_dn = tl.sum(dnormed * normed, axis=0) / D
        dx = (dnormed - mean_d - normed * mean_dn) * rstd
        if RESIDUAL:
            dx += tl.load(DSUM + b * dsum_b + token * dsum_l + columns, mask=here, other=0.0).to(tl.float32)
        tl.store(DX + row * D + columns, dx.to(DX.dtype.element_ty), mask=here)
        if GATED:
            y = tl.load(Y + b * y_b + token * y_l + columns, mask=here, other=0.0).to(tl.float32)
            dgate += dx * y
            tl.store(DY + row * D + columns, (dx * gate).to(DY.dtype.element_ty), mask=here)
    sums = SUMS + program.to(tl.int64) * ((3 if GATED else 2) * D) + columns
    tl.store(sums, dshift, mask=inside)
    tl.store(sums + D, dscale, mask=inside)
    if GATED:
        tl.store(sums + 2 * D, dgate, mask=inside)


@triton.jit
def gated_add_backward(
    DOUT, GATE, Y, DY, SUMS, dout_b, dout_l, y_b, y_l, gate_b, chunks, L, D,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """DY = GATE * DOUT; SUMS (B, chunks, D) of DOUT * Y over the tokens of this program."""
    program = tl.program_id(0)
    b = (program // chunks).to(tl.int64)
    first = (program % chunks).to(tl.int64) * ROWS  # offsets within a sample may pass 2^31 where samples are packed
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    gate = tl.load(GATE + b * gate_b + columns, mask=inside, other=0.0).to(tl.float32)
    dgate = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(ROWS):
        token = first + i
        here = inside & (token < L)
        dout = tl.load(DOUT + b * dout_b + token * dout_l + columns, mask=here, other=0.0).to(tl.float32)
        y = tl.load(Y + b * y_b + token * y_l + columns, mask=here, other=0.0).to(tl.float32)
        dgate += dout * y
        tl.store(DY + (b * L + token) * D + columns, (dout * gate).to(DY.dtype.element_ty), mask=here)
    tl.store(SUMS + program.to(tl.int64) * D + columns, dgate, mask=inside)


# ------------------------------------------------------------------------------------------------ launches


def _shape(x: Tensor) -> tuple[int, int, int, int]:
    """Tokens of a program, programs of a sample, features that a program holds, warps."""
    B, L, D = x.shape
    rows = 1
    while rows < 64 and rows < L and rows * 2 * PROGRAMS <= B * L:
        rows *= 2
    block = max(64, 1 << (D - 1).bit_length())
    warps = 4 if block <= 1024 else 8 if block <= 4096 else 16
    return rows, (L + rows - 1) // rows, block, warps


def _rows(x: Tensor) -> Tensor:
    """x, copied if its features do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def forward(
    x: Tensor, gate: Tensor | None, y: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Norm + modulate of x, or of x + gate * y.

    Returns:
        what was normed, x itself without gate (B, L, D); its modulated norm (B, L, D); mean and 1 / deviation, (B, L) float32.
    """
    x, shift, scale = _rows(x), _rows(shift), _rows(scale)
    B, L, D = x.shape
    rows, chunks, block, warps = _shape(x)
    out = torch.empty((B, L, D), dtype=x.dtype, device=x.device)
    mean = torch.empty((B, L), dtype=torch.float32, device=x.device)
    rstd = torch.empty((B, L), dtype=torch.float32, device=x.device)
    gated = gate is not None and y is not None
    if gate is not None and y is not None:
        gate, y = _rows(gate), _rows(y)
        total = torch.empty((B, L, D), dtype=x.dtype, device=x.device)
    else:
        gate, y, total = shift, x, x
    norm_modulate_forward[(B * chunks,)](
        x, gate, y, shift, scale, total, out, mean, rstd,
        x.stride(0), x.stride(1), y.stride(0), y.stride(1), gate.stride(0), shift.stride(0), scale.stride(0),
        chunks, L, D, eps, ROWS=rows, BLOCK=block, GATED=gated, num_warps=warps,
    )  # fmt: skip
    return total, out, mean, rstd


def backward(
    dout: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    y: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
    """Gradients of `forward`: of x, y, shift, scale, gate; x is what was normed, dsum the gradient that reaches it otherwise."""
    dout, x, scale = _rows(dout), _rows(x), _rows(scale)
    B, L, D = x.shape
    rows, chunks, block, warps = _shape(x)
    dx = torch.empty((B, L, D), dtype=x.dtype, device=x.device)
    residual, gated = dsum is not None, gate is not None and y is not None
    dsum_ = dout if dsum is None else _rows(dsum)
    if gate is not None and y is not None:
        gate_, y_ = _rows(gate), _rows(y)
        dy = torch.empty((B, L, D), dtype=y.dtype, device=x.device)
    else:
        gate_, y_, dy = scale, x, dx
    sums = torch.empty((B, chunks, 3 if gated else 2, D), dtype=torch.float32, device=x.device)
    norm_modulate_backward[(B * chunks,)](
        dout, dsum_, x, gate_, y_, scale, mean, rstd, dx, dy, sums,
        dout.stride(0), dout.stride(1), dsum_.stride(0), dsum_.stride(1), x.stride(0), x.stride(1), y_.stride(0), y_.stride(1),
        gate_.stride(0), scale.stride(0), chunks, L, D,
        ROWS=rows, BLOCK=block, GATED=gated, RESIDUAL=residual, num_warps=warps,
    )  # fmt: skip
    added = sums.sum(1).to(scale.dtype)  # (B, 2 or 3, D)
    if gated:
        return dx, dy, added[:, 0], added[:, 1], added[:, 2]
    return dx, None, added[:, 0], added[:, 1], None


def gate_backward(dout: Tensor, gate: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x + gate * y: of gate and of y."""
    dout, gate, y = _rows(dout), _rows(gate), _rows(y)
    B, L, D = y.shape
    rows, chunks, block, warps = _shape(y)
    dy = torch.empty((B, L, D), dtype=y.dtype, device=y.device)
    sums = torch.empty((B, chunks, D), dtype=torch.float32, device=y.device)
    gated_add_backward[(B * chunks,)](
        dout, gate, y, dy, sums, dout.stride(0), dout.stride(1), y.stride(0), y.stride(1), gate.stride(0), chunks, L, D,
        ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return sums.sum(1).to(gate.dtype), dy


KERNELS: tuple[Any, ...] = (norm_modulate_forward, norm_modulate_backward, gated_add_backward)
