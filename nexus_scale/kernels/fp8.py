"""Linear maps whose products are taken in 8 bits, forward and backward, on GPUs that have them: `kernels.linear: fp8`.

Inputs and weights are e4m3 (4 bits of exponent, 3 of mantissa), gradients of outputs e5m2, each with one scale for the whole tensor, by
which its largest value is the format's; sums are float32, results bf16. A value is off by up to 6 % (e4m3), a gradient by 12 %, and small
values of a tensor with large ones are lost: training is another one than in bf16, and it is never chosen unless asked for.

On the quickstart's data (mmdit/tiny_openmoji, 120 steps in bf16, the CPU's own products of 8 bits for all of 64 features and more) the
loss went from 1.883 at step 20 to 1.244, and the held-out one to 1.257; without, from 1.883 to 1.235 and to 1.246: 0.8 % behind. Nothing of
it has been measured on a GPU.

Source: Micikevicius et al. 2022, "FP8 formats for deep learning".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INPUTS, GRADIENTS = torch.float8_e4m3fn, torch.float8_e5m2

ADA = (8, 9)
"""Compute capability from which GPUs multiply in 8 bits."""

NARROWEST = 256
"""Features on either side, and rows, of a product that is worth the casts. Smaller ones are at the ends of a network and in its
conditioning, where errors matter most."""


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether x (..., K) times weight (N, K) is taken in 8 bits: bf16 on CUDA, large, and of sizes that are multiples of 16."""
    if not x.is_cuda or x.dtype is not torch.bfloat16 or weight.dtype is not torch.bfloat16:
        return False
    (N, K), M = weight.shape, x.numel() // x.shape[-1]
    return min(M, N, K) >= NARROWEST and M % 16 == N % 16 == K % 16 == 0


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b: x (..., K), weight (N, K), bias (N,) or None -> (..., N)."""
    y: Tensor = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def scaled(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x in 8 bits, and the float32 scalar that it is to be multiplied by."""
    most = torch.finfo(dtype).max
    largest = x.abs().amax().float().clamp(min=1e-12)
    return (x.float() * (most / largest)).to(dtype), largest / most


def _product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """a (M, K) times the transpose of b (N, K), both with K side by side, as the hardware takes them -> (M, N)."""
    y: Tensor = torch._scaled_mm(a[0], b[0].t(), scale_a=a[1], scale_b=b[1], bias=bias, out_dtype=dtype)
    return y


def _transposed(x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return x[0].t().contiguous(), x[1]


class _Linear(torch.autograd.Function):
    """y = x W^T + b; dx = dy W, dW = dy^T x, db = sum of dy. Keeps x in 8 bits for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        small = scaled(x, INPUTS)
        ctx.save_for_backward(*small, weight)
        return _product(small, scaled(weight, INPUTS), bias, x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, scale, weight = ctx.saved_tensors
        small = scaled(dy.contiguous(), GRADIENTS)  # (M, N)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _product(small, _transposed(scaled(weight, INPUTS)), None, dy.dtype)  # (M, K)
        if ctx.needs_input_grad[1]:
            dw = _product(_transposed(small), _transposed((x, scale)), None, dy.dtype)  # (N, K)
        return dx, dw, dy.sum(0) if ctx.needs_input_grad[2] else None
