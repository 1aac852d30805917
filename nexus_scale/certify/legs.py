"""The legs of a proof: the same recipe trained without interruption, with kills, and on other numbers of workers."""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nexus_scale import main_job, train
from nexus_scale.certify.kills import Kill, as_faults
from nexus_scale.certify.left_out import items, leave_out
from nexus_scale.config import recipe
from nexus_scale.contracts import Preempted, RunFolder, UserError
from nexus_scale.io import faults
from nexus_scale.orchestration.train import launch
from nexus_scale.run.runs import locked, prepare_run

log = logging.getLogger(__name__)

RESCALED_STEPS = 20
"""Over so many steps the loss is held to the limit; later, training itself amplifies the last bits."""

LEAVING_STEPS = 5
"""Within so many steps a run leaves when asked: a thread carries the request, and the ranks agree one step later."""


def settings(steps: int, every: int) -> list[str]:
    """Overrides of a recipe for its legs, which only train, save and write digests."""
    return [
        f"steps={steps}",
        f"callbacks.checkpoint={{every: {every}, keep: 3}}",
        "callbacks.metrics={every: 10, wandb: false}",
        "callbacks.validate=null",
        "callbacks.samples=null",
        "callbacks.throughput=null",
    ]


def resolved(
    name: str, overrides: Sequence[str], cluster: str | None, tiny: bool, workers: Sequence[int], steps: int, every: int,
    folder: Path | None,
) -> Work:  # fmt: skip
    if not workers or min(workers) < 1:
        raise UserError(f"--workers: got {list(workers)}; expected numbers of at least 1, like 2,1,4")
    if steps < 4 * every:
        raise UserError(f"--steps {steps}: expected at least {4 * every}, four checkpoints")
    if steps <= LEAVING_STEPS * len(workers):
        raise UserError(
            f"--steps {steps}: expected more than {LEAVING_STEPS * len(workers)} for {len(workers)} numbers of workers"
        )
    target = main_job.resolve(
        name, [*overrides, *settings(steps, every), f"cluster.workers={workers[0]}"], cluster=cluster, tiny=tiny
    )
    # First: a callback that ends the run after a step would leave that step without a digest.
    callbacks = {"digest": {}, **target.recipe.callbacks}
    target = replace(target, recipe=target.recipe.model_copy(update={"callbacks": callbacks}))
    where = target.cluster
    for count in workers:
        recipe.accumulation(target.recipe.global_batch, count, where.fixed_micro_batch)
    if where.nodes == 1 and not where.gpus_per_worker and not os.environ.get("RAY_ADDRESS"):
        # On one machine, more workers than cores share the cores.
        share = len(os.sched_getaffinity(0)) / max(workers)
        where = where.model_copy(update={"cpus_per_worker": min(where.cpus_per_worker, share)})
    if folder is None:
        folder = target.place.runs_root / f"certify_{target.recipe.name}_{time.strftime('%Y%m%d-%H%M%S')}"
    folder = folder.resolve()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: is not empty; --output expects a new folder", code=5)
    as_faults([], folder)
    return Work(replace(target, cluster=where), folder, list(workers), steps, every)


def changes_of_workers(seed: int, steps: int, counts: int) -> list[int]:
    """Random steps, in order, at which the number of workers changes.

    They lie within the last RESCALED_STEPS where so many fit, and at least LEAVING_STEPS apart and before the end, so that each ends a
    start of the run.
    """
    if counts == 1:
        return []
    first = max(1, steps - max(RESCALED_STEPS, LEAVING_STEPS * counts))
    widened = LEAVING_STEPS - 1  # between two steps, after a draw from a window that is as much shorter
    last = steps - LEAVING_STEPS - widened * (counts - 2)
    drawn = sorted(random.Random(seed + 1).sample(range(first, last + 1), counts - 1))
    return [step + widened * i for i, step in enumerate(drawn)]


@dataclass(frozen=True)
class Work:
    """How the legs are trained: one target, and a folder for all."""

    target: main_job.Target
    folder: Path
    workers: Sequence[int]
    steps: int
    every: int

    def at(self, leg: str, workers: int) -> main_job.Target:
        place = train.Place(RunFolder(self.folder / leg), self.target.place.data_root, self.target.place.runs_root)
        return replace(self.target, cluster=self.target.cluster.model_copy(update={"workers": workers}), place=place)

    def uninterrupted(self, leg: str) -> None:
        main_job.train_target(self.at(leg, self.workers[0]))

    def launched(self, leg: str, workers: int, orders: str = "", restarts: int = 0) -> None:
        """One supervised start; the caller handles Preempted and RuntimeError."""
        target = self.at(leg, workers)
        cluster = target.cluster
        with locked(target.place.run):
            prepare_run(target.place.run, target.recipe, cluster, target.place.data_root)
            launch(
                "nexus_scale.orchestration.worker:work",
                main_job.worker_config(target),
                workers=workers,
                cpus_per_worker=cluster.cpus_per_worker,
                gpus_per_worker=cluster.gpus_per_worker,
                run_folder=target.place.run.path,
                environment={**main_job.worker_environment(cluster), **({faults.VARIABLE: orders} if orders else {})},
                max_failures=restarts,
                backoff_s=0.0,  # the failures are our own, so that no machine needs a rest
                start_deadline_s=cluster.start_deadline_s,
                timeout_s=cluster.collective_timeout_s,
                threads_per_worker=cluster.threads_per_worker,
                nodes=cluster.nodes,
            )

    def marks(self, leg: str) -> Path:
        folder = self.folder / leg / "faults"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def stopped(self, leg: str, workers: int, step: int, action: str) -> None:
        """Trains to a step and stops there: SIGKILL leaves the newest checkpoint before it, SIGTERM one of that step."""
        mark = self.marks(leg) / f"stop-{step:06d}"
        try:
            self.launched(leg, workers, f"rank:0,step:{step},phase:data,action:{action},once:{mark}")
        except (Preempted, RuntimeError):
            if not mark.exists():
                raise
            return
        raise RuntimeError(f"{leg}: {action} at step {step} did not end the run")

    def killed(self, leg: str, kills: Sequence[Kill], left_out: str | None) -> None:
        marks = self.marks(leg)
        if left_out is not None:
            self.stopped(leg, self.workers[0], self.steps // 2, "SIGKILL")
            leave_out(left_out, self.folder / leg / "checkpoints")
        orders = as_faults(kills, marks)
        while True:
            try:
                # A kill of all ranks may count as more than one failure.
                self.launched(leg, self.workers[0], orders, restarts=2 * len(kills) * self.workers[0] + 3)
                return
            except Preempted as left:
                log.info("%s: %s; started again", leg, left)

    def rescaled(self, leg: str, workers: Sequence[int], changes: Sequence[int]) -> None:
        for number, (count, step) in enumerate(zip(workers, changes, strict=False)):
            self.stopped(leg, count, step, ("SIGKILL", "SIGTERM")[number % 2])
        self.launched(leg, workers[-1])

    def controls(self) -> list[str]:
        """What the reference holds at half of its steps, and a resume could go without."""
        self.stopped("half", self.workers[0], self.steps // 2, "SIGKILL")
        return items(self.folder / "half" / "checkpoints")

    def control(self, item: str) -> None:
        """A copy of the reference at half of its steps, where `controls` left it, without the item, trained to the end."""
        leg = f"without_{item}"
        shutil.copytree(self.folder / "half", self.folder / leg)
        leave_out(item, self.folder / leg / "checkpoints")
        self.launched(leg, self.workers[0])
