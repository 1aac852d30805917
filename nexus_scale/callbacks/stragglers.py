"""Reports ranks that are slower than the others, by the time of their own work. It never ends a rank."""

from __future__ import annotations

import logging
from statistics import median_low
from typing import Annotated

from pydantic import Field

from nexus_scale.callbacks.watchdog import StageClock
from nexus_scale.contracts import Callback, Engine, Progress, RunFolder, StepInfo
from nexus_scale.engine import distributed
from nexus_scale.io import incidents

log = logging.getLogger(__name__)

OWN = ("data", "forward")
"""Stages in which a rank works alone. In the others it also waits for its peers, so that fast ranks look slow."""

TRAINING = ("data", "forward", "backward", "step")


class Stragglers(Callback):
    """Every `every` steps ranks tell each other how long their own stages took: a sum that is sent after one step and read after the
    next, so that no step waits for it. A rank is a straggler in a stage that took it `factor` times as long as the median rank, and
    more by at least `share` of the step, twice in a row. It is noted once, and again when it comes back after having caught up.

    Time is the host's: where a GPU computes by itself, `forward` shows
    a slow host, not a slow GPU; and where a network is gathered module by module, its forward holds waits for peers too.

    Args:
        run, stage: the run's folder and its clock.
    """

    def __init__(
        self,
        *,
        every: Annotated[int, Field(ge=2)] = 5,
        factor: Annotated[float, Field(gt=1)] = 1.5,
        share: Annotated[float, Field(ge=0, lt=1)] = 0.1,
        run: RunFolder,
        stage: StageClock,
    ):
        self.every, self.factor, self.share = every, factor, share
        self.run, self.stage = run, stage
        self._times: distributed.LateSum | None = None
        self._before: dict[str, float] = {}
        self._rank, self._world_size = 0, 1
        self._suspects: set[tuple[int, str]] = set()
        self._known: set[tuple[int, str]] = set()

    def before_run(self, engine: Engine, progress: Progress) -> None:
        self._rank, self._world_size = engine.rank, engine.world_size
        self._before = self.stage.seconds()
        if engine.world_size > 1:
            self._times = distributed.LateSum()

    def after_step(self, info: StepInfo) -> None:
        if self._times is None:
            return
        place = info.step % self.every
        if place == 0:
            self._send()
        elif place == 1 and (sums := self._times.read()) is not None:
            self._judge(info.step, sums)

    def _send(self) -> None:
        assert self._times is not None
        now = self.stage.seconds()
        spent = {name: now.get(name, 0.0) - self._before.get(name, 0.0) for name in TRAINING}
        self._before = now
        values = [0.0] * (self._world_size * (len(OWN) + 1))
        first = self._rank * (len(OWN) + 1)
        values[first : first + len(OWN) + 1] = [*(spent[name] for name in OWN), sum(spent.values())]
        self._times.send(values)

    def _judge(self, step: int, sums: list[float]) -> None:
        """`sums`: for each rank in order, seconds in its own stages and in whole steps."""
        width = len(OWN) + 1
        ranks = [sums[i : i + width] for i in range(0, len(sums), width)]
        whole = max(times[-1] for times in ranks)
        slow: dict[tuple[int, str], tuple[float, float]] = {}
        for i, stage in enumerate(OWN):
            usual = median_low(times[i] for times in ranks)
            for rank, times in enumerate(ranks):
                if times[i] - usual >= self.share * whole and times[i] > self.factor * usual:
                    slow[(rank, stage)] = (times[i], usual)
        for (rank, stage), (own, usual) in slow.items():
            if (rank, stage) in self._suspects and (rank, stage) not in self._known:
                self._known.add((rank, stage))
                self._note(step, rank, stage, own / self.every, usual / self.every)
        self._suspects = set(slow)
        self._known &= self._suspects

    def _note(self, step: int, rank: int, stage: str, own: float, usual: float) -> None:
        if self._rank == 0:
            words = f"rank {rank} is slow in {stage!r}: {own:.3g} s a step, the median rank {usual:.3g} s"
            log.warning("%s", words)
            facts = {"rank": rank, "stage": stage, "step": step, "seconds": round(own, 6), "median": round(usual, 6)}
            incidents.note(self.run.path, "straggler", words, **facts)
