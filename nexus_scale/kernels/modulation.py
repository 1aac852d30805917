"""Adaptive layer norm: shift, scale and gate come from the conditioning, one vector per sample.

Plain torch, or Triton's kernels (kernels/triton_modulation.py) where `kernels.modulation` is `triton` and the device is CUDA. A compiler
fuses the plain forward as well as they do; in backward it sums the gradients of shift, scale and gate over the tokens in kernels
of their own, which read the activations again.

Source: Peebles & Xie 2023 (DiT), section 3.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexus_scale.kernels.choice import chosen_for, note
from nexus_scale.kernels.norms import layer_norm

WIDEST = 16_384
"""Features of a token that a program of Triton's kernels holds in registers."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale) + shift.

    Args:
        x: (B, L, D).
        shift, scale: (B, D).
    """
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm without weight and bias, then `modulate`: x (B, L, D), shift and scale (B, D) -> (B, L, D)."""
    if serves(x):
        y: Tensor = NormModulate.apply(x, shift, scale, eps)
        return y
    return modulate(layer_norm(x, eps=eps), shift, scale)


def branch(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x, and `norm_modulate` of it: the gradients of the two meet in one pass. By Triton's kernels, where they serve."""
    stream, y = Branch.apply(x, shift, scale, eps)
    return stream, y


def gated_branch(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + gate * y, and `norm_modulate` of that, by Triton's kernels, where they serve: x, y (B, L, D), the others (B, D)."""
    stream, normed = GatedBranch.apply(x, gate, y, shift, scale, eps)
    return stream, normed


def gated_add(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """x + gate * y: the residual x and the branch y (B, L, D), gate (B, D) -> (B, L, D)."""
    if serves(x):
        total: Tensor = GatedAdd.apply(x, gate, y)
        return total
    return torch.addcmul(x, gate[:, None], y)


def serves(x: Tensor) -> bool:
    """Whether Triton's kernels compute this, x (B, L, D)."""
    if x.is_meta:
        note("modulation", tuple(x.shape[1:]))
    if not x.is_cuda or x.shape[-1] > WIDEST or x.dtype is torch.float64:
        return False
    return chosen_for("modulation", (x.shape[2],)) == "triton"


# -------------------------------------------------------------------------------- Triton's, with gradients
#
# A gradient that is differentiated in turn (`create_graph`) is computed by torch's own operations.


class NormModulate(torch.autograd.Function):
    """x, shift, scale -> norm_modulate(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        from nexus_scale.kernels import triton_modulation

        _, out, mean, rstd = triton_modulation.forward(x, None, None, shift, scale, eps)
        ctx.save_for_backward(x, scale, mean, rstd)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, rstd = ctx.saved_tensors
        dx, dshift, dscale = _through_norm(dout, None, x, scale, mean, rstd, ctx.eps)
        return dx, dshift, dscale, None


class Branch(torch.autograd.Function):
    """x, shift, scale -> x, norm_modulate(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        from nexus_scale.kernels import triton_modulation

        _, out, mean, rstd = triton_modulation.forward(x, None, None, shift, scale, eps)
        ctx.save_for_backward(x, scale, mean, rstd)
        ctx.eps = eps
        return x.view_as(x), out

    @staticmethod
    def backward(ctx: Any, dstream: Tensor, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, rstd = ctx.saved_tensors
        dx, dshift, dscale = _through_norm(dout, dstream, x, scale, mean, rstd, ctx.eps)
        return dx, dshift, dscale, None


class GatedBranch(torch.autograd.Function):
    """x, gate, y, shift, scale -> x + gate * y, norm_modulate(x + gate * y)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        from nexus_scale.kernels import triton_modulation

        stream, out, mean, rstd = triton_modulation.forward(x, gate, y, shift, scale, eps)
        ctx.save_for_backward(stream, gate, y, scale, mean, rstd)
        ctx.eps = eps
        return stream, out

    @staticmethod
    def backward(ctx: Any, dstream: Tensor, dout: Tensor) -> tuple[Tensor | None, ...]:
        from nexus_scale.kernels import triton_modulation

        stream, gate, y, scale, mean, rstd = ctx.saved_tensors
        if _differentiated_again():
            dx, dshift, dscale = _through_norm(dout, dstream, stream, scale, mean, rstd, ctx.eps)
            return dx, (dx * y).sum(1), dx * gate[:, None], dshift, dscale, None
        dx, dy, dshift, dscale, dgate = triton_modulation.backward(dout, dstream, stream, gate, y, scale, mean, rstd)
        return dx, dgate, dy, dshift, dscale, None


class GatedAdd(torch.autograd.Function):
    """x, gate, y -> x + gate * y; forward is plain, for a compiler to fuse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y)
        return torch.addcmul(x, gate[:, None], y)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from nexus_scale.kernels import triton_modulation

        gate, y = ctx.saved_tensors
        if _differentiated_again():
            return dout, (dout * y).sum(1), dout * gate[:, None]
        dgate, dy = triton_modulation.gate_backward(dout, gate, y)
        return dout, dgate, dy


def _differentiated_again() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _through_norm(
    dout: Tensor, dstream: Tensor | None, x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift, scale; `dstream` reaches x beside the norm."""
    from nexus_scale.kernels import triton_modulation

    if _differentiated_again():
        normed = layer_norm(x, eps=eps)
        (dx,) = torch.autograd.grad(normed, x, dout * (1 + scale[:, None]), create_graph=True)
        return dx if dstream is None else dx + dstream, dout.sum(1), (dout * normed).sum(1)
    dx, _, dshift, dscale, _ = triton_modulation.backward(dout, dstream, x, None, None, scale, mean, rstd)
    return dx, dshift, dscale
