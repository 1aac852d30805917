"""Rolls the run back after repeated skipped steps or (optionally) a loss spike, and skips the batches that caused them.

Source of the remedy: Chowdhery et al. 2022, PaLM, section 5.1: return to a checkpoint some 100 steps before a spike, and skip the
200 to 500 batches around it; neither alone helped.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from nexus_scale.contracts import Callback, Engine, Progress, Rollback, RunFolder, StepInfo, UserError
from nexus_scale.engine import distributed
from nexus_scale.engine.checkpoint import committed_steps
from nexus_scale.io import incidents
from nexus_scale.run.skipped import SkippedRange, skipped_ranges

log = logging.getLogger(__name__)

SPAN = 1000
"""Steps over which rollbacks are counted."""


# ------------------------------------------------------------------------------------------------ the guard


class Spike(BaseModel):
    """What counts as a spike, and the reaction to it.

    A step is high if the loss over all ranks exceeds the median of the `window` steps before it by `sigmas` deviations (1.4826 of the
    median distance from the median, which the spike itself hardly moves). `in_a_row` high steps are a spike. `warn` notes it;
    `rollback` returns to a checkpoint at least `steps_back` steps before it, and skips the `passes_over` batches after that point.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sigmas: float = Field(6.0, gt=0)
    window: int = Field(200, ge=20)
    in_a_row: int = Field(3, ge=1)
    action: Literal["warn", "rollback"] = "warn"
    steps_back: int = Field(100, ge=1)
    passes_over: int = Field(200, ge=1)
    metric: str = "loss"

    @model_validator(mode="after")
    def _passes_the_spike(self) -> Spike:
        least = self.steps_back + self.in_a_row
        if self.passes_over < least:
            raise ValueError(
                f"passes_over: got {self.passes_over}; expected at least steps_back + in_a_row = {least}, or the spike's own batches "
                "would be trained on again"
            )
        return self


class Guard(Callback):
    """Counts steps whose update the engine skipped on all ranks because a value was not finite, and rolls back.

    Each is an incident with the ranks whose loss was not finite, and their samples. If only the gradients were not finite,
    no rank is named, since gradients have been summed by then. Weights, moments and optimizer steps stay. The learning rate
    advances, as a function of the step; averages keep moving towards the same weights.

    After `patience` such steps in a row the run rolls back to its newest checkpoint and skips their batches, and more each
    further time. After `rollbacks` rollbacks within 1000 steps it ends.

    Where a device computes by itself, a step is judged once the next one is queued, and the run rolls back after that one. A save has
    all steps before it judged first (`StepInfo.settle`), so that what is committed is the same.

    Args:
        spike: None: spikes are not watched, and ranks exchange nothing.
        run: the run's folder.
    """

    def __init__(
        self,
        *,
        patience: PositiveInt = 5,
        rollbacks: NonNegativeInt = 3,
        spike: Spike | None = None,
        run: RunFolder,
    ):
        self.patience, self.rollbacks, self.run = patience, rollbacks, run
        self._bad: list[tuple[int, int]] = []  # draws of consecutive skipped steps
        self._losses = None if spike is None else Losses(spike)

    def before_run(self, engine: Engine, progress: Progress) -> None:
        if self._losses is not None:
            self._losses.start()

    def after_reading(self, info: StepInfo) -> None:
        if any(value > 0 for name, (value, _) in info.metrics.items() if name.endswith("skipped")):
            self._left_out(info)
        elif self._bad:
            self._bad.clear()
        if self._losses is not None:
            begin = self._losses.spike(info)
            if begin is not None:
                self._spike(info, begin)

    # ------------------------------------------------------------------------------------------ not finite

    def _left_out(self, info: StepInfo) -> None:
        draws = _draws(info)
        self._bad.append(draws)
        seen = _who_saw(info)
        if info.engine.rank == 0:
            whose = f"the loss of rank {', '.join(map(str, seen))}" if seen else "a gradient"
            words = f"step {info.step} was left out: {whose} was not finite ({len(self._bad)} in a row)"
            log.warning("%s", words)
            facts = {"step": info.step, "draws": list(draws), "ranks": list(seen), "samples": seen}
            incidents.note(self.run.path, "nonfinite", words, **facts)
        if len(self._bad) >= self.patience:
            reason = f"{len(self._bad)} steps in a row were not finite"
            # The same place again: the damage extends beyond the skipped batches.
            more = self.patience * (2 ** len(self._recent(info.step)) - 1)
            self._go_back(info.step, reason, self._bad[0][0], draws[1] + more)

    def _recent(self, step: int) -> list[SkippedRange]:
        return [entry for entry in skipped_ranges(self.run) if entry.step > step - SPAN]

    def _go_back(self, step: int, reason: str, first: int, last: int, before: int | None = None) -> None:
        times = len(self._recent(step))
        if times >= self.rollbacks:
            raise UserError(
                f"after step {step} {reason}, and the run has already rolled back {times} times within {SPAN} steps "
                f"(callbacks.guard.rollbacks: {self.rollbacks}): lower the learning rate, clip gradients more tightly, or inspect the "
                f"samples that {self.run.path / incidents.FILE} names",
                code=1,
            )
        raise Rollback(f"after step {step} {reason}", first, last, before)

    # ------------------------------------------------------------------------------------------ spikes

    def _spike(self, info: StepInfo, begin: int) -> None:
        assert self._losses is not None
        policy, losses = self._losses.policy, self._losses
        words = f"the loss left its usual range at step {begin}: {losses.last:.4g}, usually {losses.usual:.4g}"
        before = begin - 1 - policy.steps_back
        there = info.engine.rank == 0 and any(step <= before for step in committed_steps(self.run.checkpoints))
        back = policy.action == "rollback" and bool(distributed.broadcast_int(int(there)))
        if policy.action == "rollback" and not back:
            words += f"; no checkpoint is as old as step {before}, so the run continues"
        if info.engine.rank == 0:
            log.warning("%s", words)
            incidents.note(self.run.path, "spike", words, step=begin, loss=losses.last, usual=losses.usual)
        if back:
            first = losses.draw_after(before)
            self._go_back(info.step, words, first, first + policy.passes_over - 1, before)


def _draws(info: StepInfo) -> tuple[int, int]:
    """First and last global batch that the step drew."""
    return min(batch.draw for batch in info.batches), max(batch.draw for batch in info.batches)


def _who_saw(info: StepInfo) -> dict[int, list[int]]:
    """Samples, by manifest number, of the ranks whose own metrics are not finite: on rank 0. A collective."""
    # The gradient's norm is not this rank's own: it has been summed over all.
    own = [total for name, (total, _) in info.metrics.items() if not name.rpartition("/")[2].startswith("grad_norm")]
    sound = all(map(math.isfinite, own))
    samples = [int(sample) for batch in info.batches for sample in batch.samples]
    everyones = distributed.gather(torch.tensor([[int(sound), *samples]]))
    if everyones is None:
        return {}
    rows: list[list[int]] = everyones.tolist()
    return {rank: row[1:] for rank, row in enumerate(rows) if not row[0]}


class Losses:
    """Compares the loss over all ranks, one step late, with the previous steps.

    Attributes:
        last, usual: the loss that was judged last, and the median that it was held against.
    """

    def __init__(self, policy: Spike):
        self.policy = policy
        self.last = self.usual = math.nan
        self._window: deque[float] = deque(maxlen=policy.window)
        self._draws: deque[tuple[int, int]] = deque(maxlen=policy.steps_back + policy.in_a_row + 3)
        self._high = 0
        self._sum: distributed.LateSum | None = None

    def start(self) -> None:
        self._sum = distributed.LateSum()

    def draw_after(self, step: int) -> int:
        """The first global batch after a step, as far back as is remembered."""
        return next(first for done, first in self._draws if done > step)

    def spike(self, info: StepInfo) -> int | None:
        """Takes this step's loss and checks the previous one; returns the step at which a spike began, once per spike."""
        assert self._sum is not None
        sums = self._sum.read()
        self._sum.send(_loss(info.metrics, self.policy.metric))
        self._draws.append((info.step, _draws(info)[0]))
        if sums is None or not sums[1]:
            return None
        return self.judged(info.step - 1, sums[0] / sums[1])

    def judged(self, step: int, loss: float) -> int | None:
        """The step of the first of `in_a_row` high losses that end here, or None."""
        if not math.isfinite(loss):
            return None  # the step was skipped
        high = len(self._window) >= max(20, self.policy.window // 4) and self._is_high(loss)
        self._window.append(loss)
        self._high = self._high + 1 if high else 0
        return step + 1 - self._high if self._high == self.policy.in_a_row else None

    def _is_high(self, loss: float) -> bool:
        self.last, self.usual = loss, median(self._window)
        deviation = 1.4826 * median(abs(value - self.usual) for value in self._window)
        return loss > self.usual + self.policy.sigmas * max(deviation, 1e-6 * abs(self.usual))


def _loss(metrics: Mapping[str, tuple[Any, Any]], name: str) -> tuple[float, float]:
    """(sum, count) of the first metric of that name, in whatever phase."""
    for key, (total, count) in metrics.items():
        if key.rpartition("/")[2] == name:
            return total, count
    raise UserError(f"callbacks.guard.spike.metric: got {name!r}; this run has {sorted(metrics)}")
