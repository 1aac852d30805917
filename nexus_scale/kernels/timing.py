"""How long a call takes on a device, for trials at start and for benchmarks."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

CYCLES = 2e9
"""Of a GPU's clock in a second, about."""

LONGEST_HEAD_START = 0.1
"""Seconds for which a GPU is kept busy before a call, at most."""


def median_ms(call: Callable[[], object], device: torch.device, *, warm: int = 3, repeats: int = 7) -> float:
    """Milliseconds of a call on the device: the median of several, each by itself, after some that warm up.

    On a GPU it is the time of its kernels: the GPU waits until the host has asked for all of them. In a step the host runs ahead, and
    what it needs for a call's launches, often more than the kernels, is no part of the call's cost.
    """
    asked = 0.0
    for _ in range(warm):
        start = time.perf_counter()
        call()
        asked = time.perf_counter() - start
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            begun, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize(device)
            torch.cuda._sleep(int(CYCLES * min(2 * asked, LONGEST_HEAD_START)))
            start = time.perf_counter()
            begun.record()
            call()
            ended.record()
            asked = time.perf_counter() - start
            torch.cuda.synchronize(device)
            times.append(begun.elapsed_time(ended))
        else:
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)
