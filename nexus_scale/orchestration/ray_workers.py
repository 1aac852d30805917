"""Ray Train's group of workers, made quick to start: without what our workers do not use, and with spares that stand by."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupPollStatus
from ray.train.v2._internal.execution.worker_group.execution_group import ReplicaGroup
from ray.train.v2._internal.execution.worker_group.state import (
    WorkerGroupState,
    WorkerGroupStateBuilder,
    _shutdown_workers,
)
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker, Worker
from ray.train.v2._internal.util import invoke_context_managers
from ray.util.placement_group import placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nexus_scale.orchestration.standby import import_all, loaded_modules, missing

logger = logging.getLogger(__name__)


class SpareWorker(RayTrainWorker):
    """A worker that was started ahead."""

    def prepare(self, modules: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Takes the run's settings and imports; returns what could not be imported."""
        from nexus_scale.orchestration.train import settle

        settle(settings)
        return import_all(modules)


class Standby(WorkerGroupCallback):
    """A spare for each worker on its node, once the workers have imported what they need.

    A spare is an actor that takes no CPU by Ray's count: the group whose place it takes holds the CPUs.
    """

    LOOK_S = 4.0
    """Time between two looks at what a worker has imported. Where the second finds no more than the first, the workers have settled;
    earlier, spares would take the processors from their start, and would lack what they import last."""

    LATER_LOOK_S = 60.0

    def __init__(self, settings: dict[str, Any]):
        self._settings = settings
        self._spares: dict[str, list[Any]] = defaultdict(list)  # by node
        self._group: WorkerGroup | None = None
        self._look: Any = None
        self._next = 0.0
        self._modules: list[str] = []

    def after_worker_group_training_start(self, worker_group: WorkerGroup) -> None:
        self._group, self._look, self._modules = worker_group, None, []
        self._next = time.monotonic() + self.LOOK_S

    def after_worker_group_poll_status(self, worker_group_status: WorkerGroupPollStatus) -> None:
        group = self._group
        if group is None or time.monotonic() < self._next or worker_group_status.errors:
            return
        if self._look is None:
            self._look = group.get_workers()[0].execute_async(loaded_modules)
        elif ray.wait([self._look], timeout=0)[0]:
            try:
                modules: list[str] = ray.get(self._look)
            except RayError as error:  # the worker died; the failure policy has the word
                logger.debug("a worker did not say what it has imported: %s", error)
                return
            settled = len(modules) == len(self._modules)
            self._look, self._modules = None, modules
            self._next = time.monotonic() + (self.LATER_LOOK_S if settled else self.LOOK_S)
            if settled:
                self._fill(group)

    def _fill(self, group: WorkerGroup) -> None:
        """Starts the spares that are missing; all import what they lack."""
        there = [node for node, spares in self._spares.items() for _ in spares]
        for node in missing([worker.metadata.node_id for worker in group.get_workers()], there):
            affinity = NodeAffinitySchedulingStrategy(node, soft=False)
            self._spares[node].append(
                ray.remote(num_cpus=0)(SpareWorker).options(scheduling_strategy=affinity).remote()
            )
        for spare in [spare for spares in self._spares.values() for spare in spares]:
            spare.prepare.remote(self._modules, self._settings)

    def after_worker_group_shutdown(self, worker_group_context: Any) -> None:
        self._group = None

    after_worker_group_abort = after_worker_group_shutdown

    def take(self, node: str) -> Any | None:
        """A spare on this node, which is the caller's from now on; None where there is none that lives."""
        while self._spares[node]:
            spare = self._spares[node].pop()
            try:
                ray.get(spare.get_metadata.remote(), timeout=60)  # after its imports, which are ahead of a new worker's
                return spare
            except (GetTimeoutError, RayActorError) as error:
                logger.info("a spare worker is lost: %s", error)
        return None

    def end(self) -> None:
        for spare in [spare for spares in self._spares.values() for spare in spares]:
            ray.kill(spare)
        self._spares.clear()


class _State(WorkerGroupState):
    """A running group that has no synchronisation actor to end."""

    def shutdown(self) -> None:
        _shutdown_workers(self.workers)
        self.placement_group_handle.shutdown()


class DriverWorkerGroup(WorkerGroup):
    """A worker group whose controller is the driver."""

    def _start_impl(self, worker_group_state_builder: WorkerGroupStateBuilder) -> None:
        # As in the base class, but without the actor that `ray.train.report` meets in, which ours never calls: it would take one of
        # the processes that Ray starts ahead.
        self._assert_inactive()
        context = self._worker_group_context
        self._check_cluster_resources_and_raise_if_insufficient(context.resources_per_worker, context.num_workers)
        with invoke_context_managers([callback.on_worker_group_start for callback in self._callbacks]):
            for callback in self._callbacks:
                callback.before_worker_group_start(context)
            group = self._create_placement_group(self._train_run_context.scaling_config, context)
            if not group.wait(self._worker_group_start_timeout_s):
                group.shutdown()
                raise WorkerGroupStartupTimeoutError(num_workers=context.num_workers)
            worker_group_state_builder.with_placement_group_handle(group)
            workers = self._create_workers(context.num_workers, group.placement_group, context.resources_per_worker)
            resources, callbacks = context.resources_per_worker, self._replica_group_callbacks
            self._replica_groups = [ReplicaGroup([worker], resources, callbacks) for worker in workers]
            self._worker_rank_to_replica_group_rank = {rank: rank for rank in range(len(workers))}
            worker_group_state_builder.with_workers(workers)
            try:
                self._init_train_context(workers, None)
                self._worker_group_state = _State(time.monotonic(), group, workers, sync_actor=None)
                for callback in self._callbacks:
                    callback.after_worker_group_start(self)
            except RayActorError as error:
                self._clear_state()  # the base class then ends what was started
                raise WorkerGroupStartupFailedError("a worker died while it was started") from error
        try:
            ray.get([worker.actor.run_train_fn.remote(context.train_fn_ref) for worker in workers])
        except RayActorError:
            # It died within the first moments of its work: no failure of the start. The next poll says which rank it was.
            logger.debug("a worker died at once")
        for callback in self._callbacks:
            callback.after_worker_group_training_start(self)

    def _create_workers(
        self, num_workers: int, placement_group: Any, resources_per_worker: dict[str, float], **options: Any
    ) -> list[Worker]:
        spares = self._spares_for(placement_group, num_workers)
        if spares is None:
            made: list[Worker] = super()._create_workers(num_workers, placement_group, resources_per_worker, **options)
            return made
        metadata = ray.get([spare.get_metadata.remote() for spare in spares])
        workers = [
            Worker(spare, data, resources_per_worker, placement_group_bundle_index=index)
            for index, (spare, data) in enumerate(zip(spares, metadata, strict=True))
        ]
        return self._assign_worker_ranks(workers, 0, None, None)

    def _spares_for(self, placement_group: Any, num_workers: int) -> list[Any] | None:
        """A spare for each bundle of the group, on its node; None where one is missing: the slowest worker decides anyway."""
        standby = next((callback for callback in self._callbacks if isinstance(callback, Standby)), None)
        if standby is None:
            return None
        nodes = placement_group_table(placement_group)["bundles_to_node_id"]
        spares: list[Any] = []
        for index in range(num_workers):
            spare = standby.take(nodes[index])
            if spare is None:
                for each in spares:
                    ray.kill(each)
                return None
            spares.append(spare)
        return spares

    def _init_train_context_on_workers(
        self, workers: list[Any], sync_actor: Any, train_context_args: dict[str, list[Any]]
    ) -> None:
        # As in the base class, but for the controller's actor handle, which only the list of reported checkpoints is asked
        # through; ours are found on disk.
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[i] for name, values in train_context_args.items()},
                )
                for i, worker in enumerate(workers)
            ]
        )
        self._decorate_worker_log_file_paths(workers)

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        # A worker takes its settings as arguments. With an environment of its own it could not have one of the processes that Ray
        # starts ahead (0.5 s), and would wait for the agent that makes environments.
        return dict(custom_runtime_env)
