"""Detects a stalled run, records the stacks of all threads and, optionally, ends the process for a restart."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from nexus_scale.callbacks.stalls import Visits, blamed, calls, oddity
from nexus_scale.config.registry import nearest
from nexus_scale.contracts import Batch, Callback, Engine, Progress, RunFolder, StepInfo, UserError
from nexus_scale.engine import distributed
from nexus_scale.io import incidents
from nexus_scale.io.durable import atomic_write
from nexus_scale.run.files import read_beats

log = logging.getLogger(__name__)

STALLED = 75
"""Exit code of a process that the watchdog ended (EX_TEMPFAIL: try again): the supervisor restarts from the newest checkpoint."""

DEADLINES = {"start": 1800.0, "data": 600.0, "forward": 900.0, "backward": 900.0, "step": 900.0, "save": 1800.0}
"""Seconds that one visit to a stage may take. Wide: the first forward may compile, and a false alarm costs more than a late one."""


STAGES = (*DEADLINES, "validate", "samples", "monitor", "other")
"""Stages that may have their own deadline."""

_NO_BEAT: Mapping[str, Any] = {"beat": 0, "at": 0.0}


class StageClock:
    """The run's clock of stages: `clock("forward")` ends the current stage and begins the next.

    Callable from the training thread alone; any thread may read. A call takes a fraction of a microsecond.

    Attributes:
        accounted, accounted_until: seconds by stage that an earlier record of this process has counted, and until when (see `goodput`).
    """

    def __init__(self) -> None:
        # One tuple, replaced whole, so that other threads never see a name with another stage's start.
        self._now: tuple[str, int] = ("start", time.perf_counter_ns())
        self._nanoseconds: dict[str, int] = {}
        self._count: Callable[[], int] | None = None
        self._ends: list[tuple[str, int]] = []
        self.accounted: dict[str, float] = {}
        self.accounted_until: float | None = None

    def __call__(self, name: str) -> None:
        now = time.perf_counter_ns()
        stage, begin = self._now
        self._now = (name, now)
        spent = self._nanoseconds
        spent[stage] = spent.get(stage, 0) + now - begin
        if self._count is not None:
            self._ends.append((stage, self._count()))

    def counting(self, count: Callable[[], int]) -> None:
        """Records the value of `count` at the end of each stage from now on (one microsecond more)."""
        self._count, self._ends = count, []

    def ends(self) -> list[tuple[str, int]]:
        """Stages that have ended since `next_step`, and the current one, each with its count."""
        return [*self._ends, (self._now[0], 0 if self._count is None else self._count())]

    def next_step(self) -> None:
        self._ends = []

    @property
    def visit(self) -> tuple[str, int]:
        """The current stage and its start in nanoseconds of the monotonic clock; the pair identifies one visit."""
        return self._now

    def seconds(self) -> dict[str, float]:
        """Seconds spent in each stage so far, including the current one."""
        stage, begin = self._now
        seconds = {name: nanoseconds / 1e9 for name, nanoseconds in self._nanoseconds.copy().items()}
        seconds[stage] = seconds.get(stage, 0.0) + (time.perf_counter_ns() - begin) / 1e9
        return seconds


class Watchdog(Callback):
    """A thread per rank that writes heartbeats and checks each stage against its deadline.

    Heartbeats are `heartbeats/rank<r>.json` in the run folder (`step`, `draws`, `stage`, `in_stage_s`, `pid`, `at`, ...). A stage past
    its deadline is a stall, once per visit: the first rank to notice asks all others, by a file, for their stacks; each writes the
    stacks of its threads, its last collectives, the batch in hand and the place in the data to `incidents/`. Then the first rank
    names the one that the others wait for (see `stalls.blamed`), in the run's record.

    A process that was stopped or slept (SIGSTOP, a closed laptop) is not blamed by itself: only time during which this thread
    itself ran counts. The others see its heartbeat stop.

    Args:
        deadlines: seconds by stage, over the defaults; `other` is for stages without one of their own.
        action: `report` writes the incident, `exit` also ends the process with code 75 (`STALLED`).
        beat_seconds: time between heartbeats. A stall is noticed within one of the deadline, and named within three.
        run, stage, batch: the run's folder; its clock; what the loop was given last.
    """

    def __init__(
        self,
        *,
        deadlines: dict[str, Annotated[float, Field(gt=0, le=1e9)]] | None = None,
        action: Literal["report", "exit"] = "exit",
        beat_seconds: Annotated[float, Field(gt=0, le=86400)] = 0.5,
        run: RunFolder,
        stage: StageClock,
        batch: Callable[[], Batch | None] = lambda: None,
    ):
        self.deadlines = {**DEADLINES, "other": 1800.0, **(deadlines or {})}
        for name in self.deadlines:
            if name not in STAGES:
                raise UserError(f"callbacks.watchdog.deadlines: no stage {name!r}; {nearest(name, list(STAGES))}")
        self.action, self.beat_seconds = action, beat_seconds
        self.run, self.stage, self.batch = run, stage, batch
        self._step = self._rank = self._beats = 0
        self._world_size, self._life = 1, ""
        self._progress = Progress()
        self._habit: Visits = ()
        self._odd = ""
        self._seen: set[str] = set()
        self._answered = ("", 0)
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def before_run(self, engine: Engine, progress: Progress) -> None:
        self._rank, self._world_size = engine.rank, engine.world_size
        self._step, self._progress = progress.step, progress
        self._life = distributed.shared_token()
        if self._world_size > 1:
            self.stage.counting(distributed.begun_collectives)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def after_step(self, info: StepInfo) -> None:
        self._step = info.step
        if self._world_size > 1:
            visits = calls(self.stage.ends())
            if visits != self._habit:
                self._odd = oddity(self._habit, visits) if self._habit else ""
                self._habit = visits
            elif self._odd:
                self._odd = ""
            self.stage.next_step()

    def close(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    # ------------------------------------------------------------------------------------------ the thread

    def _watch(self) -> None:
        visit, reported = self.stage.visit, ("", 0)
        watched, last, failed = 0.0, time.perf_counter(), False
        while not self._end.wait(self.beat_seconds):
            now = time.perf_counter()
            gap, last = now - last, now
            if self.stage.visit != visit:
                visit, watched = self.stage.visit, 0.0
            else:
                # A gap far longer than a beat means that the whole process was stopped, and the stage with it.
                watched += min(gap, 5.0 * self.beat_seconds)
            try:
                self._beat(visit[0], watched)
                if watched > self._deadline(visit[0]) and visit != reported:
                    reported = visit
                    self._stall(visit[0], watched)
                elif self._world_size > 1:
                    self._answer(visit[0], watched)
                failed = False
            except OSError as error:
                if not failed:
                    log.warning("watchdog: cannot write to %s: %s", self.run.path, error)
                failed = True

    def _deadline(self, stage: str) -> float:
        return self.deadlines.get(stage, self.deadlines["other"])

    def _beat(self, stage: str, seconds: float) -> None:
        self._beats += 1
        odd = self._odd
        if self._world_size > 1 and not odd and self._habit:
            odd = oddity(self._habit, calls(self.stage.ends()), complete=False)
        beat = {
            "rank": self._rank,
            "pid": os.getpid(),
            "life": self._life,
            "beat": self._beats,
            "step": self._step,
            "draws": self._progress.draws,
            "stage": stage,
            "in_stage_s": round(seconds, 1),
            "collectives": distributed.begun_collectives() if self._world_size > 1 else 0,
            "odd": odd,
            "at": time.time(),
        }
        path = self.run.path / "heartbeats" / f"rank{self._rank}.json"
        atomic_write(path, json.dumps(beat), synced=False)  # a heartbeat need not survive a power cut

    # ------------------------------------------------------------------------------------------ a stall

    def _stall(self, stage: str, seconds: float) -> None:
        words = (
            f"rank {self._rank} has been in stage {stage!r} for {seconds:.0f} s after step {self._step}; "
            f"its deadline is {self._deadline(stage):g} s"
        )
        log.error("%s", words)
        try:
            first = self._call()
            self._dump(words)
            others = self._gathered(stage, seconds)
            if first:
                self._name(words, others)
        finally:
            if self.action == "exit":
                log.error(
                    "rank %d exits with code %d; the run restarts from the newest checkpoint", self._rank, STALLED
                )
                logging.shutdown()
                # Only this ends a thread that hangs in a collective.
                os._exit(STALLED)

    def _calls(self) -> set[str]:
        return {path.name for path in (self.run.path / "incidents").glob(f"stall_{self._life}_*")}

    def _call(self) -> bool:
        """Asks all ranks for their stacks. False if another rank has asked since this stage began: it is the same stall."""
        folder = self.run.path / "incidents"
        folder.mkdir(parents=True, exist_ok=True)
        there = self._calls()
        new, self._seen = there - self._seen, there
        if new or self._answered == self.stage.visit:
            return False
        name = f"stall_{self._life}_{len(there)}"
        try:
            os.close(os.open(folder / name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            return False
        finally:
            self._seen.add(name)
        return True

    def _answer(self, stage: str, seconds: float) -> None:
        there = self._calls()
        if there - self._seen:
            self._seen = there
            self._dump(
                f"asked by another rank; rank {self._rank} is {seconds:.0f} s in stage {stage!r}, {self._step} steps done"
            )

    def _dump(self, words: str) -> None:
        path = self.run.path / "incidents" / f"rank{self._rank}_step{self._step:08d}_{os.getpid()}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        log.error("stacks of all threads of rank %d: %s", self._rank, path)
        batch = self.batch()
        in_hand = (
            "none"
            if batch is None
            else f"global batch {batch.draw}, bucket {batch.bucket!r}, samples {batch.samples.tolist()}"
        )
        shapes = {} if batch is None else {name: list(value.shape) for name, value in batch.fields.items()}
        lines = [
            words,
            f"global batches drawn: {self._progress.draws}",
            f"first micro-batch in hand: {in_hand}",
            *(f"  {name} {shape}" for name, shape in shapes.items()),
            f"unlike the step before: {self._odd or 'nothing'}",
            "last collectives:",
            *(f"  {line}" for line in distributed.last_collectives()),
        ]
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)

    def _gathered(self, stage: str, seconds: float) -> tuple[dict[int, Mapping[str, Any]], list[int]]:
        """Newest heartbeats by rank, and the ranks without one meanwhile and for half the deadline before: on a busy machine a beat may
        come late. A rank that was stopped before its first beat has none. Keeps beating meanwhile: others may be gathering too."""
        self._beat(stage, seconds)
        before = after = self._heartbeats()
        silent = [rank for rank in range(self._world_size) if rank != self._rank]
        begin = beaten = time.perf_counter()
        while silent and (now := time.perf_counter()) - begin < max(2.5 * self.beat_seconds, 0.5):
            if now - beaten > self.beat_seconds:
                self._beat(stage, seconds + now - begin)
                beaten = now
            time.sleep(min(0.05, self.beat_seconds))
            after = self._heartbeats()
            silent = [
                rank for rank in silent if after.get(rank, _NO_BEAT)["beat"] == before.get(rank, _NO_BEAT)["beat"]
            ]
        self._beat(stage, seconds)
        old = time.time() - self._deadline(stage) / 2
        return after, [rank for rank in silent if after.get(rank, _NO_BEAT)["at"] < old]

    def _heartbeats(self) -> dict[int, Mapping[str, Any]]:
        beats = read_beats(self.run.path)
        return {rank: beat for rank, beat in beats.items() if beat.get("life") == self._life}

    def _name(self, words: str, gathered: tuple[dict[int, Mapping[str, Any]], list[int]]) -> None:
        beats, silent = gathered
        rank, why, message = self._rank, "it is alone", words
        if self._world_size > 1:
            rank, why = blamed(beats, silent)
            message = f"rank {rank} holds up the others: {why} ({words})"
            log.error("%s", message)
        beat = beats.get(rank, {})
        facts = {key: beat[key] for key in ("step", "stage", "draws", "in_stage_s") if key in beat}
        incidents.note(self.run.path, "stalled", message, rank=rank, noticed_by=self._rank, why=why, **facts)
