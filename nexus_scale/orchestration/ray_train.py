"""Ray Train V2, with its controller in the driver.

Stock Ray Train starts, one after the other, a controller actor, a placement-group cleaner, an autoscaling coordinator, a
synchronisation actor, a preemption watcher and then the workers: processes that each import torch or pandas before the first worker
may. Here the same controller class runs in the driver, which has imported all that already, and what only a shared or growing
cluster needs is left out on a local one. Ray Train still places the workers, joins them, watches and restarts them. A controller
that is no actor cannot die alone either: its actor's death ends a stock run for good.

The classes are Ray's own, from below its public interface; tests/test_orchestration.py starts and kills real workers, so that a
Ray that moves them is noticed.
"""

from __future__ import annotations

import asyncio
import builtins
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.logging.patch_print import _original_print
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from nexus_scale.orchestration.ray_workers import DriverWorkerGroup, Standby

logger = logging.getLogger(__name__)


class DriverController(TrainController):
    """Ray Train's controller, to be run in the driver."""

    worker_group_cls = DriverWorkerGroup

    def _shutdown_worker_group(self) -> None:
        # A process group with a dead peer does not close: the survivors are ended without waiting for that (5 s, by default 30).
        status = self._worker_group.get_latest_poll_status()
        if status is not None and status.errors:
            self._worker_group.abort()
            self._worker_group = None
        else:
            super()._shutdown_worker_group()

    def stop_workers(self) -> None:
        """Ends the workers where the run is left by an exception; does nothing after its regular end."""
        group = self.get_worker_group()
        if group is not None and group.has_started():
            group.abort()


class LocalScalingPolicy(FixedScalingPolicy):
    """A fixed number of workers on a cluster that cannot grow: nothing is asked of an autoscaler (a process less, 1.5 s)."""

    def after_controller_start(self, train_run_context: Any) -> None:
        return None

    def _maybe_send_resource_request(self) -> None:
        return None


class FailurePolicy(DefaultFailurePolicy):
    """Restarts after a failure, but not where it would come again: a user's mistake, or a run that was asked to leave."""

    def __init__(self, config: FailureConfig, is_final: Callable[[], bool]):
        super().__init__(config)
        self._is_final = is_final

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        if self._is_final():
            return FailureDecision.RAISE
        decision = super().make_decision(training_failed_error)
        if decision is FailureDecision.RETRY and isinstance(training_failed_error, WorkerGroupError):
            logger.warning(
                "%s; restart %d of %d",
                _short(training_failed_error),
                self._worker_group_failures,
                self.failure_config.max_failures,
            )
        return decision

    def _log_decision(self, *args: Any, **kwargs: Any) -> None:
        return None  # the base class prints a traceback for each restart; `make_decision` says it in a line


def _short(error: WorkerGroupError) -> str:
    rank, failure = min(error.worker_failures.items())
    ranks = ", ".join(str(r) for r in sorted(error.worker_failures))
    last = str(failure).strip().splitlines()
    return f"worker {ranks} failed (rank {rank}: {last[-1].strip() if last else type(failure).__name__})"


class Trainer(TorchTrainer):
    """TorchTrainer that runs its controller here.

    `local`: the cluster is this machine and cannot grow. `is_final`: asked after each failure whether a restart is pointless.
    """

    def __init__(
        self,
        worker: Callable[[dict[str, Any]], None],
        *,
        local: bool,
        is_final: Callable[[], bool],
        standby: Standby | None,
        **options: Any,
    ):
        super().__init__(worker, **options)
        self._local, self._is_final, self._standby = local, is_final, standby

    def _create_default_callbacks(self) -> list[Any]:
        # The dataset manager is a process that serves ray.data shards, which we do not train from (1.5 s of a core at start).
        # The cleaner removes the workers' placement group when the controller actor dies. Here the driver owns the group, and Ray
        # removes it with the driver. Without a dashboard, stopping the cleaner took ten seconds at the end of each run.
        unused = (PlacementGroupCleanerCallback, DatasetsCallback)
        kept = [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]
        return kept if self._standby is None else [*kept, self._standby]  # RunConfig's own would travel to the workers

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        parts["failure_policy"] = FailurePolicy(self.run_config.failure_config, self._is_final)
        if self._local and not self.scaling_config.elasticity_enabled:
            parts["scaling_policy"] = LocalScalingPolicy(self.scaling_config)
        controller = DriverController(**parts)
        try:
            asyncio.run(controller.run())
        finally:
            controller.stop_workers()
            if self._standby is not None:
                self._standby.end()
        return controller.get_result()


def fit(
    worker: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    *,
    workers: int | tuple[int, int],
    resources: dict[str, float],
    storage: Path,
    name: str,
    timeout_s: float,
    max_failures: int,
    local: bool,
    is_final: Callable[[], bool],
    standby: bool,
) -> None:
    """Runs `worker(config)` on all ranks until it ends everywhere.

    Args:
        resources: what each worker takes, `CPU` and `GPU`.
        storage, name: where Ray Train keeps its own state; a name that was used before would end at once as finished.
        timeout_s: of collectives between workers.
        max_failures: restarts before giving up.
    Raises:
        WorkerGroupError: a worker failed once more than that. ControllerError: the workers could not be started.
    """
    gpus = resources.get("GPU", 0)
    Trainer(
        worker,
        train_loop_config=config,
        # Flags and counters travel by gloo also where GPUs speak nccl.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=int(timeout_s)),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=bool(gpus), resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=1),
        ),
        local=local,
        is_final=is_final,
        standby=Standby(config) if standby else None,
    ).fit()


def keep_output_plain() -> None:
    """Undoes, in a worker, that Ray Train prints through its own logger, where the cluster was started without our settings."""
    builtins.print = _original_print
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)


__all__ = ["ControllerError", "Trainer", "WorkerGroupError", "fit", "keep_output_plain"]
