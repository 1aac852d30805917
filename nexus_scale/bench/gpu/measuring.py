"""How a case's steps are timed, and how large its micro-batch may become."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from nexus_scale.bench.gpu.profile import profiled

ROW, READY = "ROW ", "READY"
"""What a case's process says: before each row, and once it has imported everything."""

Emit = Callable[..., None]
"""Writes a row: `emit(row=..., ms=...)`."""

MARGIN = 0.92
"""Part of the device's memory that is filled at most: CUDA's context, NCCL and fragmentation take their share."""

SLOW = 0.5
"""Seconds of a step, above which fewer are measured."""

MOST = 512
"""Samples of the largest micro-batch tried."""


Steps = Callable[[int], None]
"""A function that takes so many whole training steps, one after another without a wait between them."""


class Subject(Protocol):
    """What is timed.

    Attributes:
        flops: of a sample's forward pass.
        waited: seconds for which the host has waited to read metrics, all in all.
        stages: when each stage of a step began; None where nobody tells.
    """

    device: torch.device
    flops: float

    @property
    def waited(self) -> float: ...

    @property
    def stages(self) -> StageTimes | None: ...

    def steps_of(self, micro_batch: int) -> Steps: ...


class StageTimes:
    """What the trainer says it does next, with the time on the device: a mark between kernels, for which nobody waits."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def __call__(self, name: str) -> None:
        if not self._on_gpu:
            self._marks.append((name, time.perf_counter()))
            return
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        self._marks.append((name, mark))

    def taken(self, steps: int) -> dict[str, float]:
        """Milliseconds of a step by stage, since the last call; the device must be done."""
        self("end")
        marks, self._marks = self._marks, []
        if self._on_gpu:
            marks[-1][1].synchronize()
        spent: dict[str, float] = {}
        for (name, begun), (_, ended) in itertools.pairwise(marks):
            ms = begun.elapsed_time(ended) if self._on_gpu else (ended - begun) * 1e3
            spent[name] = spent.get(name, 0.0) + ms / steps
        return spent


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Callable[[], tuple[int, int]]]:
    """`figures()`: bytes held now, and the most since the start of the block, by torch's allocator; 0 on a CPU."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)

    def figures() -> tuple[int, int]:
        if not on_gpu:
            return 0, 0
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)

    yield figures


def timed(subject: Subject, do: Steps, *, warm: int, steps: int) -> dict[str, Any]:
    """Milliseconds of a step, of steps one after another.

    Returns:
        `first_s`: the first step with all that is compiled in it; `ms`: of a step; `host_ms`: that the host was busy to ask for it;
        `cpu_ms`: of all its threads; `stages`: where it is known, milliseconds on the device by stage.
    """
    device = subject.device
    synchronize(device)
    begun = time.perf_counter()
    do(1)
    synchronize(device)
    first = time.perf_counter() - begun
    begun = time.perf_counter()
    do(1)
    synchronize(device)
    if time.perf_counter() - begun > SLOW:
        warm, steps = 1, 4
    do(warm)
    synchronize(device)
    if subject.stages is not None:
        subject.stages.taken(1)  # those of steps that are not counted
    begun, cpu, waited = time.perf_counter(), time.process_time(), subject.waited
    do(steps)
    asked, spent = time.perf_counter() - begun - (subject.waited - waited), time.process_time() - cpu
    synchronize(device)
    ended = time.perf_counter() - begun
    return {
        "first_s": first,
        "ms": ended / steps * 1e3,
        "host_ms": asked / steps * 1e3,
        "cpu_ms": spent / steps * 1e3,
        **({} if subject.stages is None else {"stages": subject.stages.taken(steps)}),
    }


def measure(
    subject: Subject, micro_batch: int, *, largest: bool, peak_flops: float | None, tiny: bool, emit: Emit
) -> None:
    """Emits a row for `micro_batch`, and with `largest` one for the largest that fits; then what the last step spent its time on."""
    micro, held, peak = _at(subject, micro_batch, peak_flops, tiny, emit)
    if largest and subject.device.type == "cuda":
        total = torch.cuda.get_device_properties(subject.device).total_memory
        if (more := fitting(micro, held, peak, MARGIN * total)) > micro:
            _at(subject, more, peak_flops, tiny, emit)


def fitting(micro: int, held: int, peak: int, limit: float) -> int:
    """The largest micro-batch within `limit` bytes, by what one of `micro` samples took above what is held between steps."""
    each = max(peak - held, 1) / micro
    most = min(MOST, int((limit - held) / each))
    return most // 16 * 16 if most >= 32 else most // 4 * 4 if most >= 8 else most


def _at(subject: Subject, micro: int, peak_flops: float | None, tiny: bool, emit: Emit) -> tuple[int, int, int]:
    """The micro-batch that was measured, half of the one asked for as often as memory ran out; bytes held between steps; bytes at most."""
    device = subject.device
    torch.compiler.reset()
    while True:
        try:
            with peak_memory(device) as memory:
                do = subject.steps_of(micro)
                times = timed(subject, do, warm=1 if tiny else 4, steps=2 if tiny else 10)
                held, peak = memory()
            break
        except torch.cuda.OutOfMemoryError as error:
            emit(row="out of memory", micro_batch=micro, error=str(error)[:300])
            if micro == 1:
                raise
            micro //= 2
        torch.cuda.empty_cache()
    done = 3 * subject.flops * micro / times["ms"] * 1e3
    emit(
        row="step", micro_batch=micro, samples_per_second=micro / times["ms"] * 1e3, tflops=done / 1e12,
        mfu=done / peak_flops if peak_flops else None, gib=peak / 2**30, gib_held=held / 2**30, **times,
    )  # fmt: skip
    spent = profiled(do, device, steps=1 if tiny else 3)
    emit(row="profile", micro_batch=micro, idle_ms=max(0.0, times["ms"] - spent["device_ms"]), **spent)
    return micro, held, peak
