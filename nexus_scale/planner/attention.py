"""A stand-in for fused attention on the meta device, where torch itself takes the plain form, which keeps all scores."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AttentionCall(NamedTuple):
    """One call: queries (batch x heads, length, head dim) against `keys` keys."""

    rows: int
    queries: int
    keys: int
    head_dim: int

    @property
    def flops(self) -> float:
        """FLOPs of the forward pass: two products, two operations for each multiplication and addition."""
        return 4.0 * self.rows * self.queries * self.keys * self.head_dim


@torch.library.custom_op("nexus_planner::attention", mutates_args=())
def fused_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and a float32 log-sum for each row: shapes alone mean something."""
    return _like(q, k, v)


@torch.library.custom_op("nexus_planner::attention_backward", mutates_args=())
def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, d_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _like(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The result lies as kernels write it: all heads of a token side by side, so that joining them copies nothing."""
    shape = (*q.shape[:-1], v.shape[-1])
    out = (
        q.new_empty(shape)
        if q.dim() < 3
        else q.new_empty(*shape[:-3], shape[-2], shape[-3], shape[-1]).transpose(-2, -3)
    )
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


fused_attention.register_fake(_like)
_backward.register_fake(
    lambda q, k, v, out, sums, d_out: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
)
fused_attention.register_autograd(
    lambda ctx, d_out, d_sums: _backward(*ctx.saved_tensors, d_out),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


class FusedAttention(TorchFunctionMode):
    """Within it scaled dot-product attention keeps what fused attention keeps: queries, keys, values, the result and a log-sum for each
    row. `calls` has every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[AttentionCall] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        given = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
        q, k, v = given["query"], given["key"], given["value"]
        self.calls.append(AttentionCall(math.prod(q.shape[:-2]), q.shape[-2], k.shape[-2], q.shape[-1]))
        return fused_attention(q, k, v)[0]
