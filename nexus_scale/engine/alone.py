"""A rank by itself: collectives that return at once, so that a rank may fail within a step without the others waiting for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SUMS = ("allreduce", "allreduce_coalesced", "reduce", "reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced",
        "reduce_scatter_single", "reduce_scatter_single_coalesced")  # fmt: skip
COPIES = ("allgather", "allgather_coalesced", "_allgather_base", "allgather_into_tensor_coalesced", "all_gather_single",
          "all_gather_single_coalesced", "alltoall", "alltoall_base", "all_to_all_single", "gather", "scatter")  # fmt: skip
SILENT = ("broadcast", "barrier", "_start_coalescing", "_end_coalescing", "send", "recv")
"""Methods of torch's process groups, through which all of torch.distributed goes, by what they leave behind. Of torch 2.11 to 2.13."""


class _Done:
    """The handle of a collective that is complete."""

    def wait(self, *_: Any) -> bool:
        return True

    is_completed = is_success = wait

    def synchronize(self) -> None: ...

    block_current_stream = synchronize

    def get_future(self) -> Any:
        future: Any = torch.futures.Future()
        future.set_result([])
        return future


@contextmanager
def alone() -> Iterator[None]:
    """A context in which no collective reaches another rank. Nothing that is computed in it is of use.

    Memory is taken as always. What a gather brings are copies of this rank's part; every sum over ranks is NaN, so that engines skip the
    step, and flags that ranks raise together are raised.
    """
    group: Any = dist.ProcessGroup
    replaced = {**dict.fromkeys(SUMS, _sum), **dict.fromkeys(COPIES, _copy), **dict.fromkeys(SILENT, _silent)}
    own = {
        name: vars(group)[name] for name in replaced if name in vars(group)
    }  # as they lie there, not as they are called
    try:
        for name in own:
            setattr(group, name, _handled(replaced[name]))
        yield
    finally:
        for name, method in own.items():
            setattr(group, name, method)


def _handled(action: Callable[..., None]) -> Callable[..., _Done]:
    def method(group: Any, *given: Any, **options: Any) -> _Done:
        action(*given)
        return _Done()

    return method


@torch.no_grad()
def _sum(out: Any = None, *_: Any) -> None:
    for tensor in _tensors(out):
        tensor.fill_(math.nan if tensor.is_floating_point() else 1)


@torch.no_grad()
def _copy(out: Any = None, given: Any = None, *_: Any) -> None:
    mine = _tensors(given)
    for number, tensor in enumerate(_tensors(out)):
        own = mine[number % len(mine)] if mine else tensor
        if tensor.is_contiguous() and own.numel() and tensor.numel() % own.numel() == 0:
            tensor.view(-1, own.numel()).copy_(own.reshape(1, -1))
        else:
            tensor.zero_()


def _silent(*_: Any) -> None: ...


def _tensors(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    return [tensor for one in given for tensor in _tensors(one)] if isinstance(given, Sequence) else []
