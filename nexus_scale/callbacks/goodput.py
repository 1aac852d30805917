"""Goodput of a run over all its attempts: how much time became part of the result, and where the rest went."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat

from nexus_scale.callbacks.watchdog import StageClock
from nexus_scale.contracts import Callback, Engine, Preempted, Progress, RunFolder, StepInfo
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_json import read_json_or

log = logging.getLogger(__name__)

FOLDER = "goodput"
STEPPING = ("forward", "backward", "step")
PARTS = {"save": "saving", "data": "data", "validate": "validation", "samples": "validation", "monitor": "validation"}
"""Category of each stage's time. That of steps and of the start depends on whether they lasted."""

MOST_MARKS = 200


class Goodput(Callback):
    """Rank 0 keeps a record of this attempt in `goodput/`, rewritten every `beat_seconds`: after a SIGKILL its last state counts,
    and what came after it belongs to the recovery. A rollback begins a new account.

    Comes early in a recipe's callbacks, so that its last word is about as late as the run's.

    Args:
        run, stage: the run's folder; its clock.
    """

    def __init__(
        self, *, beat_seconds: Annotated[float, Field(gt=0, le=86400)] = 2.0, run: RunFolder, stage: StageClock
    ):
        self.beat_seconds, self.run, self.stage = beat_seconds, run, stage
        self._before = dict(stage.accounted)
        elapsed = sum(self._since(stage.seconds()).values())
        self._begun = time.time() - elapsed if stage.accounted_until is None else stage.accounted_until
        self._first = self._step = 0
        self._starting: float | None = None
        self._marks: list[tuple[int, float]] = []
        self._done = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def before_run(self, engine: Engine, progress: Progress) -> None:
        self._first = self._step = progress.step
        if engine.rank == 0:
            self._thread = threading.Thread(target=self._work, name="goodput", daemon=True)
            self._thread.start()

    def after_step(self, info: StepInfo) -> None:
        self._step = info.step
        if self._starting is None:
            self._starting = self._since(self.stage.seconds()).get("start", 0.0)

    def after_run(self, engine: Engine, progress: Progress) -> None:
        self._done = True

    def close(self) -> None:
        # Called while the exception that ends the attempt propagates; rollbacks have been handled by then.
        error = sys.exc_info()[0]
        ended = "done" if self._done else "rolled_back" if error is None else "left" if error is Preempted else "failed"
        if self._thread is not None:
            self._end.set()
            self._thread.join()
            self._thread = None
            totals = self._write(ended)
            self.stage.accounted = totals
            self.stage.accounted_until = self._begun + sum(self._since(totals).values())

    def _since(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Of the clock's seconds, those of this account."""
        return {name: total - self._before.get(name, 0.0) for name, total in totals.items()}

    def _work(self) -> None:
        self._write(None)
        while not self._end.wait(self.beat_seconds):
            self._write(None)

    def _write(self, ended: str | None) -> dict[str, float]:
        totals, step = self.stage.seconds(), self._step
        seconds = self._since(totals)
        self._marks.append((step, round(sum(seconds.get(name, 0.0) for name in STEPPING), 4)))
        if len(self._marks) > MOST_MARKS:
            del self._marks[1:-1:2]
        account = {
            "begun": self._begun,
            # By the monotonic clock: setting the wall clock changes no duration.
            "at": self._begun + sum(seconds.values()),
            "first": self._first,
            "step": step,
            "starting": self._starting,
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "marks": self._marks,
            "ended": ended,
        }
        try:
            atomic_write(self.run.path / FOLDER / f"{self._begun:.3f}.json", json.dumps(account), synced=False)
        except OSError as error:
            log.warning("the record of where time went could not be written: %s", error)
        return totals


# ------------------------------------------------------------------------------------------------ read back


@dataclass(frozen=True)
class Account:
    """Where a run's time went, in seconds.

    Attributes:
        parts: `productive` (steps that are part of the result), `start`, `recovery` (from a failure to the next new step, and steps
            that were done again), `saving`, `data` (waiting for it), `validation` (and samples), `other`.
        away: between a clean leave or end and the next start, when nobody wanted the run to run; no part of the wall time.
    """

    parts: dict[str, float]
    away: float
    attempts: int

    @property
    def wall(self) -> float:
        return sum(self.parts.values())

    @property
    def effective(self) -> float | None:
        """Effective training time: productive over wall."""
        return self.parts["productive"] / self.wall if self.wall else None


class Written(BaseModel):
    """The record of one attempt's time."""

    begun: FiniteFloat
    at: FiniteFloat
    first: Annotated[int, Field(ge=0, lt=2**53)]
    step: Annotated[int, Field(ge=0, lt=2**53)]
    starting: FiniteFloat | None
    seconds: dict[str, FiniteFloat]
    marks: list[tuple[Annotated[int, Field(ge=0, lt=2**53)], FiniteFloat]]
    ended: str | None


def account(run: RunFolder) -> Account | None:
    """The record of all attempts so far; None if there is none."""
    read = (read_json_or(path, Written, None) for path in sorted((run.path / FOLDER).glob("*.json")))
    attempts = sorted((one.model_dump() for one in read if one is not None), key=lambda one: one["begun"])
    return added_up(attempts) if attempts else None


def added_up(attempts: Sequence[Mapping[str, Any]]) -> Account:
    """`attempts`: what Goodput wrote of each, in order. The parts and `away` add up to the time from the first to the last."""
    parts = dict.fromkeys(("productive", "start", "recovery", "saving", "data", "validation", "other"), 0.0)
    away = 0.0
    before: Mapping[str, Any] | None = None
    for i, one in enumerate(attempts):
        wanted = before is None or before["ended"] in ("left", "done")  # started by a person, not after a failure
        if before is not None:
            gap = max(0.0, one["begun"] - before["at"])
            if wanted:
                away += gap
            else:
                parts["recovery"] += gap
        seconds = dict(one["seconds"])
        in_all, starting = seconds.pop("start", 0.0), one["starting"]
        starting = in_all if starting is None else min(starting, in_all)
        parts["start" if wanted else "recovery"] += starting
        parts["recovery"] += in_all - starting
        stepping = sum(seconds.pop(name, 0.0) for name in STEPPING)
        kept = min((later["first"] for later in attempts[i + 1 :]), default=one["step"])
        productive = min(stepping, _until(one, kept, stepping))
        parts["productive"] += productive
        parts["recovery"] += stepping - productive
        for stage, value in seconds.items():
            parts[PARTS.get(stage, "other")] += value
        before = one
    return Account(parts, away, len(attempts))


def _until(one: Mapping[str, Any], step: int, stepping: float) -> float:
    """Seconds of an attempt's steps up to a step, between the marks nearest to it."""
    if step >= one["step"]:
        return stepping
    if step <= one["first"]:
        return 0.0
    low, high = (one["first"], 0.0), (one["step"], stepping)
    for done, seconds in one["marks"]:
        if low[0] < done <= step:
            low = (done, seconds)
        elif step < done < high[0]:
            high = (done, seconds)
    return float(low[1] + (high[1] - low[1]) * (step - low[0]) / (high[0] - low[0]))
