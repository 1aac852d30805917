"""How long a call takes on a device, for trials at start and for benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch


def median_ms(call: Callable[[], object], device: torch.device, *, warm: int = 3, repeats: int = 7) -> float:
    """Milliseconds of a call on the device: the median of several, each by itself, after some that warm up."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            begun.record()
            call()
            ended.record()
            torch.cuda.synchronize(device)
            times.append(begun.elapsed_time(ended))
        else:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)
