"""Notices that a run stands still, says where every thread of it stands, and, where asked to, ends the process for a restart."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from nexus_scale.contracts import Callback, Engine, Progress, RunFolder, StepInfo, UserError

log = logging.getLogger(__name__)

STALLED = 75
"""Exit code of a process that the watchdog ended (EX_TEMPFAIL: try again): the supervisor restarts from the newest checkpoint."""

DEADLINES = {"start": 1800.0, "data": 600.0, "forward": 900.0, "backward": 900.0, "step": 900.0, "save": 1800.0}
"""Seconds that one visit to a stage may take. Wide: the first forward may compile, and a false alarm costs more than a late one."""


class StageClock:
    """The run's one account of where its time goes: `clock("forward")` ends the stage before and begins the next.

    Callable from the training thread alone; any thread may read. A call takes a fraction of a microsecond.
    """

    def __init__(self) -> None:
        # One tuple, replaced whole, so that a reader on another thread never sees a name with another stage's begin.
        self._now: tuple[str, int] = ("start", time.perf_counter_ns())
        self._nanoseconds: dict[str, int] = {}

    def __call__(self, name: str) -> None:
        now = time.perf_counter_ns()
        stage, begin = self._now
        self._now = (name, now)
        spent = self._nanoseconds
        spent[stage] = spent.get(stage, 0) + now - begin

    @property
    def visit(self) -> tuple[str, int]:
        """The present stage and when it began, in nanoseconds of the monotonic clock: one visit has one such pair."""
        return self._now

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each stage since the clock was made, the present one included so far."""
        stage, begin = self._now
        seconds = {name: nanoseconds / 1e9 for name, nanoseconds in self._nanoseconds.copy().items()}
        seconds[stage] = seconds.get(stage, 0.0) + (time.perf_counter_ns() - begin) / 1e9
        return seconds


class Watchdog(Callback):
    """A thread per rank that writes a heartbeat and holds each stage against its deadline.

    Heartbeats are `heartbeats/rank<r>.json` in the run folder (`step`, `stage`, `in_stage_s`, `pid`, `at`). A stage past its
    deadline is an incident: all threads' stacks go to `incidents/`, once per visit to the stage.

    A process that was stopped or slept (SIGSTOP, a closed laptop) is not blamed for it: only time during which this thread
    itself ran counts. A native call that holds Python's global lock stops this thread too; then the heartbeat goes stale.

    Args:
        deadlines: seconds by stage, over the defaults; `other` is for stages without one of their own.
        action: `report` writes the incident, `exit` also ends the process with code 75 (`STALLED`).
        beat_seconds: time between heartbeats.
        run, stage: the run's folder; its clock.
    """

    def __init__(
        self,
        *,
        deadlines: dict[str, float] | None = None,
        action: Literal["report", "exit"] = "exit",
        beat_seconds: float = 1.0,
        run: RunFolder,
        stage: StageClock,
    ):
        self.deadlines = {**DEADLINES, "other": 1800.0, **(deadlines or {})}
        for name, seconds in self.deadlines.items():
            if seconds <= 0:
                raise UserError(f"callbacks.watchdog.deadlines.{name}: got {seconds:g}; expected more than 0 seconds")
        if beat_seconds <= 0:
            raise UserError(f"callbacks.watchdog.beat_seconds: got {beat_seconds:g}; expected more than 0")
        self.action, self.beat_seconds = action, beat_seconds
        self.run, self.stage = run, stage
        self._step = self._rank = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def before_run(self, engine: Engine, progress: Progress) -> None:
        self._rank, self._step = engine.rank, progress.step
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def after_step(self, info: StepInfo) -> None:
        self._step = info.step

    def close(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        visit, reported = self.stage.visit, ("", 0)
        watched, last, failed = 0.0, time.perf_counter(), False
        while not self._end.wait(self.beat_seconds):
            now = time.perf_counter()
            gap, last = now - last, now
            if self.stage.visit != visit:
                visit, watched = self.stage.visit, 0.0
            else:
                # A gap far over a beat means that this process did not run; then neither could the stage.
                watched += min(gap, 5.0 * self.beat_seconds)
            try:
                self._beat(visit[0], watched)
                if watched > self.deadlines.get(visit[0], self.deadlines["other"]) and visit != reported:
                    reported = visit
                    self._incident(visit[0], watched)
                failed = False
            except OSError as error:
                if not failed:
                    log.warning("watchdog: cannot write to %s: %s", self.run.path, error)
                failed = True

    def _beat(self, stage: str, seconds: float) -> None:
        beat = {
            "rank": self._rank,
            "pid": os.getpid(),
            "step": self._step,
            "stage": stage,
            "in_stage_s": round(seconds, 1),
            "at": time.time(),
        }
        path = self.run.path / "heartbeats" / f"rank{self._rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place, so that readers see a whole one; not synced: a heartbeat need not outlive a power cut.
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(beat), encoding="utf-8")
        partial.replace(path)

    def _incident(self, stage: str, seconds: float) -> None:
        deadline = self.deadlines.get(stage, self.deadlines["other"])
        path = self.run.path / "incidents" / f"rank{self._rank}_step{self._step:08d}_{os.getpid()}.txt"
        words = f"rank {self._rank} has been in stage {stage!r} for {seconds:.0f} s after step {self._step}; its deadline is {deadline:g} s"
        log.error("%s. Stacks of all threads: %s", words, path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(words + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        finally:
            if self.action == "exit":
                log.error("rank %d exits with code %d, to be restarted from the newest checkpoint", self._rank, STALLED)
                logging.shutdown()
                # Nothing else ends a thread that hangs in a collective.
                os._exit(STALLED)


def read_heartbeats(run: RunFolder) -> dict[int, Mapping[str, object]]:
    """The newest heartbeat of each rank."""
    beats: dict[int, Mapping[str, object]] = {}
    for path in sorted(Path(run.path / "heartbeats").glob("rank*.json")):
        beat = json.loads(path.read_text(encoding="utf-8"))
        beats[int(beat["rank"])] = beat
    return beats
