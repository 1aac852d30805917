"""Jobs that make one folder of shards from another, shard by shard, by Ray Data: their options, and the job that a plan of them makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from data_pipelines.command import Progress
from data_pipelines.job import Job, Roots
from data_pipelines.options import JobOptions, option
from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import DataError, Manifest
from nexus_scale.orchestration.data_jobs import THREADS, ShardJob, is_done, run_job


class ShardOptions(JobOptions):
    """Options of a job whose computing is a matter of the CPU."""

    input: str = option(description="folder of shards to read, below the data root")
    workers: int | None = option(
        None, ge=0, description="actors of Ray Data; 0: in this process (default: one for two cores)"
    )

    def placing(self) -> dict[str, Any]:
        """Where it is computed, as `run_job` takes it."""
        return {"workers": self.workers, "device": "cpu"}


class EncoderOptions(ShardOptions):
    """Options of a job whose encoder is a network."""

    threads: int = option(THREADS, ge=1, description="threads of each actor")
    device: str = option(
        "auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        description="where the encoder computes: auto, cpu, cuda, or cuda:1 in this process",
    )

    def placing(self) -> dict[str, Any]:
        return {"workers": self.workers, "threads": self.threads, "device": self.device}


O = TypeVar("O", bound=ShardOptions)  # noqa: E741


def shard_job(
    module: str,
    options: type[O],
    plan: Callable[[O, Roots], ShardJob],
    *,
    may_wait: bool = False,
    after: Callable[[O, Roots, Manifest], None] | None = None,
) -> Job[O]:
    """The job that makes the folder of a plan.

    Args:
        module, options: see `Job`.
        plan: what is made of what; raises UserError where that cannot be.
        may_wait: an earlier step of a recipe may make more than the input, such as the encoder: what lacks it is not made yet, and not
            wrong.
        after: what is done once the folder is made.
    """

    def make(options: O, roots: Roots, progress: Progress | None) -> Manifest:
        made = run_job(plan(options, roots), **options.placing(), progress=progress)
        if after is not None:
            after(options, roots, made)
        return made

    def is_made(options: O, roots: Roots) -> bool:
        try:
            Manifest.load(roots.data_root / options.input)
        except DataError:
            return False  # an earlier step of the recipe makes it
        try:
            return is_done(plan(options, roots))
        except UserError:
            if may_wait:
                return False
            raise

    return Job(module, options, make, is_made)
