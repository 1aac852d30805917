"""How many tokens each sample has, where samples lie end to end: as numbers, and for compiled code as tensors.

Code is compiled for the numbers that it reads, and lengths are others in every batch. So within compiled blocks only the tensors are read,
and their sizes are kept open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from nexus_scale.kernels.transfer import to_device


class Lengths(Sequence[int]):
    """Tokens of each of B samples.

    Args:
        tokens: their numbers.
        longest: a bound of them that does not differ from batch to batch.
        device: for the tensors; None: without them, for what is not compiled.

    Attributes:
        rows: the sample of each token, (S,) int64.
        ends: offsets of the samples and the end of the last one, (B + 1,) int32.
    """

    rows: Tensor
    ends: Tensor

    def __init__(self, tokens: Sequence[int], longest: int, device: torch.device | None = None):
        self.tokens, self.longest = tuple(tokens), longest
        if device is not None:
            each = torch.tensor(self.tokens)
            self.rows = to_device(torch.arange(len(each)).repeat_interleave(each), device)
            ends = torch.cat([each.new_zeros(1), each.cumsum(0)])
            self.ends = to_device(ends.to(torch.int32), device)

    def __len__(self) -> int:
        return len(self.tokens)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[int, ...]: ...
    def __getitem__(self, index: int | slice) -> int | tuple[int, ...]:
        return self.tokens[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self.tokens)

    def open_tensors(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Tensors whose first size differs from batch to batch: of these lengths, and of what a block is `given` with them."""
        return [self.rows]


class Rearranged(torch.autograd.Function):
    """Rows of x (M, ...) at `index` (S,), zeros where it is -1; `back` (M,) is where each row of x went, -1 where nowhere.

    The gradient is rearranged by `back`: every sum has one term, where that of an indexed gather adds in any order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return _rows_at(x, index)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return _rows_at(dy, back), None, None


def _rows_at(x: Tensor, index: Tensor) -> Tensor:
    there = (index >= 0).view(-1, *[1] * (x.dim() - 1))
    return torch.where(there, x[index.clamp(min=0)], torch.zeros((), dtype=x.dtype, device=x.device))


class Repeated(torch.autograd.Function):
    """x (B, D) -> its row `rows[i]` as row i, (S, D). The gradient is one matrix product, which adds in one order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.samples = x.shape[0]
        return x[rows]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        of_sample = torch.arange(ctx.samples, device=rows.device)[:, None] == rows  # (B, S)
        return of_sample.to(dy.dtype) @ dy, None
