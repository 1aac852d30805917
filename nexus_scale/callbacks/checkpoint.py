"""Saves the run every N steps, so that at most N steps can be lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, Protocol

from pydantic import AfterValidator, PositiveInt

from nexus_scale.callbacks.context import post
from nexus_scale.contracts import Callback, Engine, Objective, Progress, Shard, Stage, StepInfo
from nexus_scale.engine.checkpoint import allowed_url
from nexus_scale.run.resume import KeepBest


class Store(Protocol):
    """What this callback needs of the checkpoint store: `save` copies the shards, returns, and writes them in the background."""

    def save(self, step: int, shards: dict[str, Shard], state: dict[str, Any]) -> bool: ...

    def wait(self) -> None: ...


class Checkpoint(Callback):
    """Saves every `every` steps and at the end.

    Adds `checkpoint_s` to the context: the seconds for which training waited, without the write in the background.

    Args:
        every: steps between checkpoints.
        at_end: whether the last step is saved, whatever its number.
        keep, keep_every, keep_best: how many of the newest stay, the steps whose multiples stay for ever, and the best by a figure of
            validation. The store sees to these and to the next three.
        busy: what a save does while the previous one is still being written: `wait` for it, or `skip` itself.
        failures: the run stops after this many failed saves in a row; before that a failed save costs only itself.
        to: URL of an object store's prefix that is this run's own (`s3://bucket/runs/name`, or any that fsspec knows), where
            checkpoints go instead of the run's folder.
    """

    def __init__(
        self,
        *,
        every: PositiveInt = 1000,
        keep: PositiveInt = 2,
        keep_every: PositiveInt | None = None,
        keep_best: KeepBest | None = None,
        busy: Literal["wait", "skip"] = "wait",
        failures: PositiveInt = 3,
        to: Annotated[str, AfterValidator(allowed_url)] | None = None,
        at_end: bool = True,
        checkpoints: Store,
        state: Callable[[], dict[str, Any]],
        objective: Objective,
        stage: Stage,
        context: dict[str, float],
    ):
        self.every, self.at_end = every, at_end
        self.keep, self.keep_every, self.keep_best = keep, keep_every, keep_best
        self.busy, self.failures, self.to = busy, failures, to
        self.checkpoints, self.state, self.objective = checkpoints, state, objective
        self.stage, self.context = stage, context

    def after_step(self, info: StepInfo) -> None:
        if info.step % self.every == 0 or (self.at_end and info.step == info.steps):
            info.settle()
            self.stage("save")
            begin = time.perf_counter()
            self.checkpoints.save(info.step, self.shards(info.engine), self.state())
            post(self.context, info.step, {"checkpoint_s": time.perf_counter() - begin})

    def after_run(self, engine: Engine, progress: Progress) -> None:
        self.stage("save")
        self.checkpoints.wait()

    def shards(self, engine: Engine) -> dict[str, Shard]:
        """This rank's part of the engine's state; on rank 0 also the objective's own, which is the same on all ranks."""
        shards = dict(engine.shards())
        if engine.rank == 0:
            for name, tensor in self.objective.state_dict().items():
                shards[f"objective/{name}"] = Shard(tensor.detach().reshape(-1), 0, tuple(tensor.shape))
        return shards
