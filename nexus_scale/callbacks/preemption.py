"""Stops the run on request without losing a step: on SIGTERM to any worker, or on a request in its folder."""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from nexus_scale.callbacks.checkpoint import Checkpoint, Store
from nexus_scale.contracts import (
    Callback,
    Engine,
    Objective,
    Preempted,
    Progress,
    RunFolder,
    Stage,
    StepInfo,
)
from nexus_scale.engine import distributed
from nexus_scale.engine.checkpoint import committed_steps
from nexus_scale.io import incidents, leaving

log = logging.getLogger(__name__)


class Terminations:
    """Calls `first` at a SIGTERM, and ends the process with code 75 at a second one.

    Python runs handlers in the main thread alone, and only that thread may set one; in a Ray worker it belongs to Ray, whose handler
    would end the process, and a thread in a native call would keep any handler waiting. faulthandler's handlers are plain C and may
    be set from any thread: this one writes into a pipe, which a thread reads. Afterwards the previous handler is restored.

    Args:
        every: also called in that thread, every `seconds`; None for never.
    """

    same_s = 1.0
    """Signals closer than this are one: a process group and its leader often get theirs one after the other."""

    def __init__(self, first: Callable[[], None], every: Callable[[], None] | None = None, seconds: float = 1.0):
        self._first, self._every, self._seconds = first, every, seconds
        self._read, self._write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._end = threading.Event()
        faulthandler.register(signal.SIGTERM, file=self._write, all_threads=False, chain=False)
        self._thread = threading.Thread(target=self._listen, name="terminations", daemon=True)
        self._thread.start()

    def close(self) -> None:
        faulthandler.unregister(signal.SIGTERM)
        self._end.set()
        os.write(self._write, b"end")
        self._thread.join()
        os.close(self._read)
        os.close(self._write)

    def _listen(self) -> None:
        told: float | None = None
        while not self._end.is_set():
            ready, _, _ = select.select([self._read], [], [], None if self._every is None else self._seconds)
            if self._end.is_set():
                return
            if not ready:
                assert self._every is not None
                self._every()
                continue
            os.read(self._read, 65536)
            if told is None:
                told = time.monotonic()
                self._first()
            elif time.monotonic() - told > self.same_s:
                log.error("asked to stop a second time: exiting at once; the newest checkpoint resumes")
                os._exit(leaving.LEFT)


class Preemption(Callback):
    """On SIGTERM to any worker, or on `leaving.ask`, all ranks finish the same step, save it, wait for the commit and exit.

    They agree by a sum that is sent after each step and read after the next, so that no step waits for it. The run stops one step
    after the request reached a rank's loop, by `contracts.Preempted`; the step is saved unless it was. A second SIGTERM ends the
    process at once.

    Must come last among a recipe's callbacks, so that the others have finished with that step.

    Args:
        poll_seconds: how often rank 0 looks for a request in the run's folder.
        run, stage, checkpoints, state, objective, context: see `made.SERVICES`.
    """

    def __init__(
        self,
        *,
        poll_seconds: Annotated[float, Field(gt=0, le=86400)] = 1.0,
        run: RunFolder,
        stage: Stage,
        checkpoints: Store,
        state: Callable[[], dict[str, Any]],
        objective: Objective,
        context: dict[str, float],
    ):
        self.poll_seconds, self.run, self.stage = poll_seconds, run, stage
        self._saving = Checkpoint(
            checkpoints=checkpoints, state=state, objective=objective, stage=stage, context=context
        )  # only on request, never after a step
        self._asked = False
        self._reason = "SIGTERM"
        self._votes: distributed.LateSum | None = None
        self._terminations: Terminations | None = None

    def before_run(self, engine: Engine, progress: Progress) -> None:
        if engine.world_size > 1:
            self._votes = distributed.LateSum()
        every = self._look if engine.rank == 0 else None
        self._terminations = Terminations(self._ask, every, self.poll_seconds)

    def after_step(self, info: StepInfo) -> None:
        leave = self._asked
        if self._votes is not None:
            votes = self._votes.read()
            self._votes.send((self._asked,))
            leave = votes is not None and votes[0] > 0
        if leave and info.step < info.steps:
            self._leave(info)

    def close(self) -> None:
        if self._terminations is not None:
            self._terminations.close()
            self._terminations = None

    def _ask(self) -> None:
        log.warning("SIGTERM: the run stops after the current step")
        self._asked = True

    def _look(self) -> None:
        try:
            request = leaving.asked(self.run.path)
        except (OSError, ValueError, TypeError) as error:
            log.warning("%s: the stop request cannot be read: %s", self.run.path, error)
            return
        if request is not None and not self._asked:
            log.warning("asked to stop (%s): the run stops after the current step", request.reason)
            self._reason = request.reason
            self._asked = True

    def _leave(self, info: StepInfo) -> None:
        begun = time.monotonic()
        info.settle()
        self.stage("save")
        store = self._saving.checkpoints
        store.wait()
        saved = info.engine.rank == 0 and info.step in committed_steps(self.run.checkpoints)
        if not distributed.broadcast_int(int(saved)):
            store.save(info.step, self._saving.shards(info.engine), self._saving.state())
            store.wait()
        if info.engine.rank == 0:
            seconds = round(time.monotonic() - begun, 3)
            words = (
                f"left after step {info.step}, saved in {seconds:.1f} s: {self._reason if self._asked else 'SIGTERM'}"
            )
            incidents.note(self.run.path, "preempted", words, step=info.step, seconds=seconds)
        raise Preempted(info.step)
