"""Copies between the host and an accelerator for which neither of the two waits.

A copy runs beside the host only from or to page-locked ("pinned") memory: one from ordinary memory may first wait for everything that
the device was given before it. Source: CUDA Runtime API, "API synchronization behavior", Memcpy and Asynchronous.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor


def reads_freely(device: torch.device) -> bool:
    """Whether the host may read values of this device at no cost. It then decides by them what need not be computed, and checks them;
    elsewhere all is computed, and the host runs ahead."""
    return device.type == "cpu"


def to_device(value: Tensor, device: torch.device | str) -> Tensor:
    """A tensor of the host, on the device, without waiting for what the device has still to do; `value` itself where it is there already.

    torch's allocator of pinned memory takes a block back only when the copies from it are done, so the caller may forget `value`.
    """
    device = torch.device(device)
    if device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def pinned(values: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Tensors of the host as copies to this device need them: in pinned memory for a GPU, otherwise as they are. In any thread."""
    if device.type != "cuda":
        return dict(values)
    with torch.cuda.device(device):  # a thread begins on the first GPU, where another rank computes
        return {name: value.pin_memory() for name, value in values.items()}


def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """These numbers as a tensor on the device, for reading only."""
    return made_on(_tensor, (values, dtype), device)


def _tensor(values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def made_on(make: Callable[..., Tensor], arguments: tuple[Hashable, ...], device: torch.device) -> Tensor:
    """`make(*arguments)`, a tensor of the host, on the device, for reading only: a GPU is sent each once."""
    if device.type != "cuda":
        return to_device(make(*arguments), device)
    return _sent(make, arguments, device)


@lru_cache(maxsize=256)
def _sent(make: Callable[..., Tensor], arguments: tuple[Hashable, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is made within it could not be used in training
        return to_device(make(*arguments), device)


@torch.no_grad()
def read_later(values: Sequence[Tensor]) -> Callable[[], list[float]]:
    """A function that returns these scalars as numbers; it alone waits for the device, and only until they were computed.

    Those on a GPU travel together into pinned memory behind the work queued so far. Those on the CPU are read by the call.

    Args:
        values: tensors of one element each, of any dtypes; those on accelerators all on one.
    """
    there = [i for i, value in enumerate(values) if value.device.type != "cpu"]
    if not there:
        return _packed(values).tolist if values else list
    here = [i for i, value in enumerate(values) if value.device.type == "cpu"]
    numbers = dict(zip(here, read_later([values[i] for i in here])(), strict=True))
    packed = _packed([values[i] for i in there])
    on_host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    on_host.copy_(packed, non_blocking=True)
    # `blocking`: the host sleeps while it waits, and leaves its core to the threads that read data.
    done = torch.cuda.Event(blocking=True)
    done.record()

    def read() -> list[float]:
        done.synchronize()
        numbers.update(zip(there, on_host.tolist(), strict=True))
        return [float(numbers[i]) for i in range(len(values))]

    return read


def _packed(values: Sequence[Tensor]) -> Tensor:
    scalars = [value if value.ndim == 0 else value.reshape(()) for value in values]
    # Beside float32 numbers, whole ones would become float32 and lose what is beyond 24 bits.
    return torch.stack([value if value.is_floating_point() else value.double() for value in scalars])
