"""The loop that trains every family. It names no model, no loss, no rank and no device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Callback, Engine, Loss, Objective, Phase, Progress, Stage, StepInfo, names_of
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.kernels.transfer import read_later


class Meter:
    """Sums and counts of one step's metrics, left where they were computed."""

    def __init__(self) -> None:
        self.sums: dict[str, tuple[Any, Any]] = {}

    def add(self, prefix: str, metrics: Any) -> None:
        for name, value in metrics.items():
            total, count = value if isinstance(value, tuple) else (value, 1)
            name = prefix + name
            if name in self.sums:
                old_total, old_count = self.sums[name]
                total, count = old_total + total, old_count + count
            self.sums[name] = (total, count)


class Readings:
    """Reads the metrics of each step and hands them to the callbacks, in order, each step's once.

    Where a device computes by itself, they are read when the next step's work is queued there: the host then waits for a step that the
    device has long begun, and the device for nothing. Where the host computes, they are read at once.

    Attributes:
        waited: seconds for which the host has waited for the device to read metrics.
    """

    def __init__(self, callbacks: Sequence[Callback], late: bool):
        self.waited = 0.0
        self._callbacks, self._late = callbacks, late
        self._pending: tuple[StepInfo, Callable[[], list[float]]] | None = None

    def expect(self, info: StepInfo) -> None:
        """Sends a step's metrics on their way, after it has read those of the step before."""
        self.settle()
        tensors = [value for pair in info.metrics.values() for value in pair if isinstance(value, Tensor)]
        self._pending = info, read_later(tensors)
        if not self._late:
            self.settle()

    def settle(self) -> None:
        """Reads what is pending now."""
        if self._pending is None:
            return
        (info, read), self._pending = self._pending, None
        begun = time.perf_counter()
        numbers = iter(read())
        if self._late:
            self.waited += time.perf_counter() - begun
        metrics = {
            name: (_number(total, numbers), _number(count, numbers)) for name, (total, count) in info.metrics.items()
        }
        told = replace(info, metrics=metrics)
        for callback in self._callbacks:
            callback.after_reading(told)


def _number(value: Any, numbers: Iterator[float]) -> Any:
    return next(numbers) if isinstance(value, Tensor) else value


def reads_late(device: torch.device) -> bool:
    """Whether the host runs ahead of the device. The same on all ranks, since callbacks may talk to each other once they have read."""
    return device.type == "cuda"


class Trainer:
    """Runs an objective's phases on an engine until `steps` are done.

    Args:
        steps: number of steps after which the run is complete.
        seed: of the recipe; with the step, the phase and a sample's position it keys all randomness.
        next_batches: this rank's micro-batches of the next global batch.
        progress: the position of the run; advanced in place.
        stage: called with what the loop does next (`forward`, `backward`, `step`), for the watchdog and the record of time.
    """

    def __init__(
        self,
        *,
        steps: int,
        seed: int,
        objective: Objective,
        engine: Engine,
        next_batches: Callable[[], Sequence[Batch]],
        callbacks: Sequence[Callback],
        progress: Progress,
        stage: Stage,
    ):
        self.steps, self.seed = steps, seed
        self.objective, self.engine = objective, engine
        self.next_batches, self.callbacks = next_batches, callbacks
        self.progress, self.stage = progress, stage
        self.readings = Readings(callbacks, reads_late(engine.device))

    def run(self) -> None:
        for callback in self.callbacks:
            callback.before_run(self.engine, self.progress)
        self.advance(self.steps)
        for callback in self.callbacks:
            callback.after_run(self.engine, self.progress)

    def advance(self, until: int) -> None:
        """Runs steps, and the callbacks after each, until `until` steps are done."""
        while self.progress.step < until:
            meter, drawn = self._step(self.progress.step)
            self.progress.step += 1
            self.readings.expect(info := self._info(meter.sums, drawn))
            if self.progress.step == until:
                self.readings.settle()
            for callback in self.callbacks:
                callback.after_step(info)

    def _info(self, sums: Mapping[str, tuple[Any, Any]], drawn: Sequence[Batch]) -> StepInfo:
        readings, step = self.readings, self.progress.step
        return StepInfo(step, self.steps, sums, self.engine, self.progress, drawn, readings.settle, readings.waited)

    def _step(self, step: int) -> tuple[Meter, list[Batch]]:
        engine, stage, meter = self.engine, self.stage, Meter()
        batches: Sequence[Batch] = ()
        drawn: list[Batch] = []
        for phase, occurrence, prefix, final in turns(self.objective.phases(step)):
            if phase.draws or not batches:
                stage("data")
                batches = self.next_batches()
                drawn.extend(batches)
            rng = partial(self._rng, step, phase, occurrence)
            with engine.training(phase.trains):
                for i, batch in enumerate(batches):
                    stage("forward")
                    loss = self._loss(phase, batch, rng(batch), step)
                    stage("backward")
                    engine.backward(phase.trains, loss.total / len(batches), last=i + 1 == len(batches))
                    meter.add(prefix, loss.metrics)
                stage("step")
                meter.add(prefix, engine.step(phase.trains, step, final))
                last = rng(batches[-1])
                meter.add(
                    prefix, self.objective.after_phase(phase.name, engine.nets, engine.sum_over_ranks, last, step)
                )
        engine.update_averages(step)
        return meter, drawn

    def _loss(self, phase: Phase, batch: Batch, rng: ProgressRng, step: int) -> Loss:
        # Dropout inside networks draws from torch's global generators; seeded here, it is a function of progress too.
        torch.default_generator.manual_seed(rng.dropout_seed)
        if (
            self.engine.device.type == "cuda"
        ):  # sets two numbers of the host, and waits for nothing (ATen, CUDAGeneratorImpl.cpp)
            torch.cuda.manual_seed(rng.dropout_seed)
        return self.objective.loss(phase.name, self.engine.nets, batch.on(self.engine.device), rng, step)

    def _rng(self, step: int, phase: Phase, occurrence: int, batch: Batch) -> ProgressRng:
        return ProgressRng(self.seed, step, phase.name, batch.positions, self.engine.device, occurrence)


def turns(phases: Sequence[Phase]) -> Iterator[tuple[Phase, int, str, bool]]:
    """Each phase of a step with the number of earlier phases of its name, the prefix of its metrics' names, and whether its networks
    learn in no later phase of the step."""
    for number, phase in enumerate(phases):
        occurrence = sum(before.name == phase.name for before in phases[:number])
        later = {name for after in phases[number + 1 :] for name in names_of(after.trains)}
        yield phase, occurrence, f"{phase.name}/" if len(phases) > 1 else "", later.isdisjoint(names_of(phase.trains))
