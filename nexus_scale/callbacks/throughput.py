"""Speed of the run, its waiting times and its memory."""

from __future__ import annotations

import resource
import sys
import time

import torch
from pydantic import PositiveInt

from nexus_scale.callbacks.context import post
from nexus_scale.callbacks.watchdog import StageClock
from nexus_scale.contracts import Callback, Engine, Progress, StepInfo

TRAINING = ("data", "forward", "backward", "step")
"""Stages that are the step itself; validation, samples and saving are counted separately."""


class Throughput(Callback):
    """Leaves in the context, every `every` steps:

    - `samples_per_s`, `tokens_per_s`, `model_flops_per_s`: of all ranks together, over the time of training stages alone;
      tokens and FLOPs where the network declares them. FLOPs are the model's (forward and backward, nothing recomputed).
    - `mfu`: model FLOP/s over the cluster's peak, where that is known (Chowdhery et al. 2022, PaLM, appendix B).
    - `data_wait`, `host_wait`: shares of the training time in which the host waited for data, and for the device to read metrics. On a GPU
      the latter is what the host has to spare: at 0 the host is the slower of the two.
    - `time/<stage>`: seconds in each stage since the row before.
    - `memory_peak_bytes`: peak resident memory, summed over ranks; `cuda_peak_bytes`: the largest rank's share of its GPU.

    Args:
        every: steps between figures; best that of the metrics.
        flops_per_sample, tokens_per_sample: of one sample, forward and backward; 0 where unknown.
        peak_flops: FLOP/s that all devices of the run could do together; None where unknown.
    """

    def __init__(
        self,
        *,
        every: PositiveInt = 10,
        global_batch: int,
        flops_per_sample: float = 0.0,
        tokens_per_sample: float = 0.0,
        peak_flops: float | None = None,
        stage: StageClock,
        context: dict[str, float],
    ):
        self.every, self.global_batch = every, global_batch
        self.flops_per_sample, self.tokens_per_sample, self.peak_flops = flops_per_sample, tokens_per_sample, peak_flops
        self.stage, self.context = stage, context
        self._step, self._seconds, self._begin = 0, stage.seconds(), time.perf_counter()
        self._waited = 0.0

    def before_run(self, engine: Engine, progress: Progress) -> None:
        self._step, self._begin = progress.step, time.perf_counter()
        # Time before the first step (building, loading) counts towards the first row.

    def after_step(self, info: StepInfo) -> None:
        if info.step % self.every == 0 or info.step == info.steps:
            post(self.context, info.step, self.figures(info))

    def figures(self, info: StepInfo) -> dict[str, float]:
        """Figures since the last call. A collective if there is more than one rank."""
        seconds, now = self.stage.seconds(), time.perf_counter()
        spent = {name: total - self._seconds.get(name, 0.0) for name, total in seconds.items()}
        training = sum(spent.get(name, 0.0) for name in TRAINING) or now - self._begin
        samples = (info.step - self._step) * self.global_batch
        waited = info.waited - self._waited
        self._step, self._seconds, self._begin, self._waited = info.step, seconds, now, info.waited

        figures = {
            "samples_per_s": samples / training,
            "data_wait": spent.get("data", 0.0) / training,
            "host_wait": waited / training,
        }
        if self.tokens_per_sample:
            figures["tokens_per_s"] = figures["samples_per_s"] * self.tokens_per_sample
        if self.flops_per_sample:
            figures["model_flops_per_s"] = figures["samples_per_s"] * self.flops_per_sample
            if self.peak_flops:
                figures["mfu"] = figures["model_flops_per_s"] / self.peak_flops
        figures.update({f"time/{name}": round(value, 6) for name, value in spent.items() if value > 0})
        figures["memory_peak_bytes"] = _sum_over_ranks(float(peak_memory()), info.engine.world_size)
        if info.engine.device.type == "cuda":
            figures["cuda_peak_bytes"] = float(torch.cuda.max_memory_allocated(info.engine.device))
        return figures


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _sum_over_ranks(value: float, world_size: int) -> float:
    if world_size == 1:
        return value
    from nexus_scale.engine.distributed import sum_over_ranks

    return float(sum_over_ranks(torch.tensor(value, dtype=torch.float64)))
