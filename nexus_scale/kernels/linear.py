"""Linear maps over the last dimension, by oneDNN's matrix products where they are faster on a CPU, else by torch's.

torch takes float32 products on x86 from MKL, which keeps its AVX-512 code for Intel's own processors: on an AMD EPYC with AVX-512 it
came to 100 GFLOP/s a core and oneDNN, which looks at what the processor has, to 220. The two differ by the order of their sums.
On a GPU that has them, products of 8 bits are there to be asked for (kernels/fp8.py).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from nexus_scale.kernels import fp8
from nexus_scale.kernels.choice import chosen

PLAIN = (Tensor, Parameter)
"""Kinds of weights that hold their numbers as they are; another holds them in 8 bits and computes by itself (engine/eight_bits.py)."""

SMALLEST = 2**23
"""Multiplications above which a product outweighs its Python calls (some 60 us with the backward)."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b.

    Args:
        x: (..., K).
        weight: (N, K).
        bias: (N,), or None for 0.
    Returns:
        (..., N).
    """
    if type(weight) not in PLAIN and is_traceable_wrapper_subclass(weight):
        y: Tensor = _EightBits.apply(x, weight, bias)
        return y
    if fp8.serves(x, weight) and chosen("linear") == "fp8":
        return fp8.linear(x, weight, bias)
    if not _served_by_onednn(x, weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y = _Linear.apply(rows, weight, bias)
    else:
        y = _product(rows, weight, bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def _served_by_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()  # a compiler makes products of its own
        and x.device.type == "cpu"
        and x.dtype is weight.dtype is torch.float32
        and x.numel() * weight.shape[0] >= SMALLEST
        and not torch.is_autocast_enabled("cpu")
        and chosen("linear") == "onednn"
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(M, K), (N, K), (N,) -> (M, N), whatever their strides.

    A second factor that lies in memory with gaps, or is one row repeated, is copied first: of such ones oneDNN has its reference code only,
    a thousand times slower. A part of a wider tensor is one: the gradient of what was concatenated.
    """
    dense = weight.is_contiguous() or weight.t().is_contiguous()
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight if dense else weight.contiguous(), bias, "none", [], "")
    return y


class _EightBits(torch.autograd.Function):
    """y = x W^T + b of a frozen weight in 8 bits, dx = dy W: the weight is brought to the precision of x once on either way, and no copy of
    it waits for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, None]:
        return (dy @ ctx.weight.dequantize().to(dy.dtype) if ctx.needs_input_grad[0] else None), None, None


class _Linear(torch.autograd.Function):
    """y = x W^T + b; dx = dy W, dW = dy^T x, db = sum of dy. Its backward is made of `linear` and can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = linear(dy, weight.t()) if ctx.needs_input_grad[0] else None  # (M, K)
        # As the transpose of x^T dy, whose rows oneDNN reads faster.
        dw = linear(x.t(), dy.t()).t() if ctx.needs_input_grad[1] else None  # (N, K)
        db = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dw, db
