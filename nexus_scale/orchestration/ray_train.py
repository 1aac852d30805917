"""Ray Train V2, with its controller in the driver.

Stock Ray Train starts, one after the other, a controller actor, a placement-group cleaner, an autoscaling coordinator, a
synchronisation actor, a preemption watcher and then the workers: processes that each import torch or pandas before the first worker
may. Here the same controller class runs in the driver, which has imported all that already, and what only a shared or growing
cluster needs is left out on a local one. Ray Train still places the workers, joins them, watches and restarts them. A controller
that is no actor cannot die alone either: its actor's death ends a stock run for good.

The classes are Ray's own, from below its public interface; tests/orchestration/test_orchestration.py starts and kills real workers, so
that a Ray that moves them is noticed.
"""

from __future__ import annotations

import asyncio
import builtins
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._raylet import RAY_NODE_ID_KEY
from ray.exceptions import RayActorError
from ray.train import FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
    WorkerHealthCheckTimeoutError,
)
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import FailureDecision
from ray.train.v2._internal.execution.failure_handling import FailurePolicy as BaseFailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus
from ray.train.v2._internal.logging.patch_print import _original_print
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from nexus_scale.contracts import Preempted, UserError
from nexus_scale.io import incidents, leaving
from nexus_scale.orchestration import elastic
from nexus_scale.orchestration.ray_workers import DriverWorkerGroup, Standby
from nexus_scale.orchestration.supervise import (
    Failure,
    Supervision,
    Supervisor,
    Verdict,
    failure_of,
    is_collateral,
    last_line,
    set_attempt,
)

logger = logging.getLogger(__name__)


class DriverController(TrainController):
    """Ray Train's controller, to be run in the driver."""

    CAUSE_S = 2.0
    """How long to look for the cause of a failure that was seen by its consequence."""

    worker_group_cls = DriverWorkerGroup

    def _shutdown_worker_group(self) -> None:
        # A process group with a dead peer does not close: the survivors are ended without waiting for that (5 s, by default 30).
        group = self.get_worker_group()
        status = group.get_latest_poll_status()
        if status is not None and status.errors:
            group.abort()
            self._worker_group = None
        else:
            super()._shutdown_worker_group()

    async def _poll_workers(self) -> WorkerGroupPollStatus:
        # A rank that lost its peer may be seen before the peer's own end, which names the cause.
        status = await super()._poll_workers()
        end = time.monotonic() + self.CAUSE_S
        while status.errors and all(is_collateral(str(error)) for error in status.errors.values()):
            if time.monotonic() > end:
                break
            await asyncio.sleep(0.1)
            status = self.get_worker_group().poll_status(timeout=0.2)
        return status

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


class ElasticScalingPolicy(ScalingPolicy):
    """The largest allowed number of workers that the machines hold.

    Ray's own elastic policy asks an autoscaling coordinator, takes any number between least and most, and restarts a running group
    without a word to it. Here the batch says which numbers are allowed, machines are asked directly, so that a dead one is not
    counted on while Ray waits for its heartbeat, and a running group grows by being asked to save and leave (`Watch`).

    Args:
        sizes: allowed numbers of workers.
        deadline_s: how long to wait for machines that hold the least of them.
        local: whether the cluster is this machine, which has no autoscaler.
    """

    def __init__(self, config: ScalingConfig, sizes: Sequence[int], deadline_s: float, local: bool):
        super().__init__(config)
        self.sizes, self.deadline_s, self.local = sizes, deadline_s, local
        self.held: list[str] = []  # nodes of the workers that were started last
        self._usable: dict[str, Any] = {}
        self._waits_since: float | None = None

    def best(self) -> int:
        """The number of workers to have now; 0 where not even the least fits."""
        self._usable = elastic.machines()
        resources = self.scaling_config._resources_per_worker_not_none
        return elastic.largest(self.sizes, elastic.room_for_workers(self._usable, self.held, resources))

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._maybe_send_resource_request()
        now = time.monotonic()
        if self._waits_since is None:
            self._waits_since = now
        workers = self.best()
        if workers:
            self._waits_since = None
            return ResizeDecision(workers, self.scaling_config._resources_per_worker_not_none)
        if now - self._waits_since > self.deadline_s:
            raise UserError(
                f"no room for {min(self.sizes)} workers, the least that this run may have, within {self.deadline_s:g} s: "
                f"{len(self._usable)} machines answer. Add machines, or lower the least of cluster.workers",
                code=4,
            )
        time.sleep(1.0)
        return NoopDecision()

    def make_decision_for_running_worker_group(self, **status: Any) -> ScalingDecision:
        self._maybe_send_resource_request()
        return NoopDecision()

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> dict[str, str] | None:
        if self.local:
            return None
        return {
            RAY_NODE_ID_KEY: f"in({','.join(self._usable)})"
        }  # Ray would still place workers on a machine that is gone

    def _get_num_workers_for_resource_request(self) -> int:
        return max(self.sizes)

    def after_controller_start(self, train_run_context: Any) -> None:
        if not self.local:
            super().after_controller_start(train_run_context)

    def _maybe_send_resource_request(self) -> None:
        if not self.local:
            super()._maybe_send_resource_request()


class FailurePolicy(BaseFailurePolicy):
    """Asks the supervisor; a user's mistake, and a run that was asked to leave for good, are final."""

    def __init__(self, config: FailureConfig, supervisor: Supervisor, is_final: Callable[[], bool], waits: bool):
        super().__init__(config)
        self._supervisor, self._is_final, self._waits = supervisor, is_final, waits

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        error = training_failed_error
        if self._is_final():
            return FailureDecision.RAISE
        if isinstance(error, ControllerError) and not isinstance(
            error.controller_failure, WorkerGroupStartupFailedError
        ):
            # An elastic group that was not placed in time is sized anew, by what machines answer then.
            is_late = isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)
            return FailureDecision.RETRY if is_late and self._waits else FailureDecision.RAISE
        mistake = next((one for one in _failures(error) if isinstance(one, UserError)), None)
        if mistake is not None:  # it could not be written into the run folder, where the launch looks for it
            self._supervisor.end("failed", str(mistake))
            self._supervisor.gave_up = Verdict(False, words=str(mistake), code=mistake.code)
            return FailureDecision.RAISE
        request = leaving.asked(self._supervisor.run)
        if isinstance(error, WorkerGroupError) and request is not None and request.restart and _all_left(error):
            verdict = self._supervisor.judge(Failure("left", request.reason))
        elif isinstance(error, WorkerGroupError):
            told = {rank: _told(failure) for rank, failure in error.worker_failures.items()}
            verdict = self._supervisor.judge(failure_of(told, details=str(error)))
        else:
            verdict = self._supervisor.judge(Failure("controller", last_line(str(error)), details=str(error)))
        if verdict.restart:
            time.sleep(verdict.wait_s)
        return FailureDecision.RETRY if verdict.restart else FailureDecision.RAISE


def _failures(error: TrainingFailedError) -> list[Exception]:
    return list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []


def _told(error: Exception) -> tuple[str, str, bool]:
    """Type, text and whether the process is gone."""
    gone = isinstance(error, WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError | RayActorError)
    return type(error).__name__, str(error), gone


def _all_left(error: WorkerGroupError) -> bool:
    """Whether the workers left as asked; one that is still in a collective may see its peer leave."""
    failures = error.worker_failures.values()
    left = [failure for failure in failures if isinstance(failure, Preempted)]
    return bool(left) and all(isinstance(failure, Preempted) or is_collateral(str(failure)) for failure in failures)


class Watch(WorkerGroupCallback):
    """Beside the workers while they run: tells them their attempt, and asks them to leave where a machine goes or more have come.

    Args:
        growth: asked how many workers there could be; None: their number is fixed.
        machines_come_and_go: whether machines may be taken away with a notice.
    """

    EVERY_S = 2.0

    def __init__(self, supervisor: Supervisor, growth: ElasticScalingPolicy | None, machines_come_and_go: bool):
        self._supervisor, self._growth, self._comes_and_goes = supervisor, growth, machines_come_and_go
        self._workers: list[Any] = []
        self._names: dict[str, str] = {}
        self._next = math.inf
        self._larger = 0

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        workers = worker_group.get_workers()
        nodes = [worker.metadata.node_id for worker in workers]
        attempt = self._supervisor.begin(len(workers))
        ray.get([worker.execute_async(set_attempt, attempt) for worker in workers])
        self._names |= {worker.metadata.node_id: worker.metadata.hostname for worker in workers}
        if self._growth is not None:
            self._note_lost(set(self._growth.held) - set(elastic.machines()))
            self._growth.held = nodes
        self._workers, self._next, self._larger = nodes, time.monotonic() + self.EVERY_S, 0

    def _note_lost(self, nodes: set[str]) -> None:
        for node in nodes:
            name = self._names.get(node, "?")
            incidents.note(
                self._supervisor.run, "node_lost", f"machine {name} ({node[:8]}) left the cluster", node=node
            )

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        if time.monotonic() < self._next or worker_group_status.errors:
            return
        self._next = time.monotonic() + self.EVERY_S
        run = self._supervisor.run
        if leaving.asked(run) is not None:
            return
        if self._comes_and_goes:
            going = sorted(set(elastic.draining()) & set(self._workers))
            if going:
                words = f"machine {self._names[going[0]]} ({going[0][:8]}) is about to be taken away"
                incidents.note(run, "preempted", words, node=going[0])
                leaving.ask(run, words, restart=True)
                return
        if self._growth is not None:
            best = self._growth.best()
            # Seen twice, so that a machine that comes and goes costs no restart.
            if best > len(self._workers) and best == self._larger:
                leaving.ask(run, f"there is room for {best} workers, {len(self._workers)} run", restart=True)
            self._larger = best

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self._next = math.inf

    after_worker_group_abort = after_worker_group_shutdown


class Trainer(TorchTrainer):
    """TorchTrainer that runs its controller here; see `fit`."""

    def __init__(self, worker: Callable[[dict[str, Any]], None], *, supervision: Supervision, **options: Any):
        super().__init__(worker, **options)
        self._supervision = supervision

    def _create_default_callbacks(self) -> list[Any]:
        # The dataset manager is a process that serves ray.data shards, which we do not train from (1.5 s of a core at start).
        # The cleaner removes the workers' placement group when the controller actor dies. Here the driver owns the group, and Ray
        # removes it with the driver. Without a dashboard, stopping the cleaner took ten seconds at the end of each run.
        unused = (PlacementGroupCleanerCallback, DatasetsCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

    def _initialize_and_run_controller(self, **parts: Any) -> Result:
        given = self._supervision
        growth: ElasticScalingPolicy | None = None
        if given.sizes is not None:
            growth = ElasticScalingPolicy(self.scaling_config, given.sizes, given.start_deadline_s, given.local)
            parts["scaling_policy"] = growth
        elif given.local:
            parts["scaling_policy"] = LocalScalingPolicy(self.scaling_config)
        parts["failure_policy"] = FailurePolicy(
            self.run_config.failure_config, given.supervisor, given.is_final, waits=growth is not None
        )
        standby = Standby(self.train_loop_config) if given.standby else None
        # Handed over here and not by RunConfig, whose callbacks travel to the workers.
        parts["callbacks"] += [Watch(given.supervisor, growth, not given.local), *([standby] if standby else [])]
        controller = DriverController(**parts)
        try:
            asyncio.run(controller.run())
        finally:
            controller.stop_workers()
            if standby is not None:
                standby.end()
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
    supervision: Supervision,
) -> None:
    """Runs `worker(config)` on all ranks until it ends everywhere.

    Args:
        resources: what each worker takes, `CPU` and `GPU`.
        storage, name: where Ray Train keeps its own state; a name that was used before would end at once as finished.
        timeout_s: of collectives between workers.
    Raises:
        WorkerGroupError: the supervisor gave up. ControllerError: the workers could not be started.
    """
    gpus = resources.get("GPU", 0)
    Trainer(
        worker,
        train_loop_config=config,
        # Flags and counters travel by gloo also where GPUs speak nccl.
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo", timeout_s=int(timeout_s)),
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=bool(gpus), resources_per_worker=resources),
        run_config=RunConfig(name=name, storage_path=str(storage)),
        supervision=supervision,
    ).fit()


def keep_output_plain() -> None:
    """Undoes, in a worker, that Ray Train prints through its own logger, where the cluster was started without our settings."""
    builtins.print = _original_print
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)


__all__ = ["ControllerError", "Trainer", "WorkerGroupError", "fit", "keep_output_plain"]
