"""A group of workers on Ray's public API: placed together, numbered, started, waited for; and the spares that stand by for them."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from nexus_scale.orchestration.rank import Outcome, Rank, Seat
from nexus_scale.orchestration.standby import missing

logger = logging.getLogger(__name__)

CALLS_AT_ONCE = 4
"""The work, a sign of life, a list of modules, and one to spare."""

SIGN_OF_LIFE_EVERY_S = 2.0
SILENT_S = 600.0
"""A process that has not answered for so long is gone: stopped, or without its interpreter's lock. Its own watchdog acts sooner."""

NODE_LABEL = "ray.io/node-id"
"""A label that every node of Ray has, with its id."""


@dataclass(frozen=True)
class Worker:
    """A process of the group: its actor, and where it runs. Its rank is its place in `Group.workers`."""

    actor: Any
    seat: Seat


class Group:
    """Workers that run one task together. Ends with its context (`placed`)."""

    def __init__(self, workers: Sequence[Worker]):
        self.workers = by_node_and_gpu(workers)
        self._runs: dict[Any, int] = {}  # by the reference of its call, the rank
        self._signs: dict[int, tuple[Any, float]] = {}  # by rank: a sign of life that was asked for, and when
        self._next_sign = 0.0

    @property
    def nodes(self) -> list[str]:
        return [worker.seat.node for worker in self.workers]

    def start(self, task: Mapping[str, Any], attempt: str) -> None:
        """Lets all ranks begin.

        Raises:
            RayError: one died before.
        """
        import ray

        port = ray.get(self.workers[0].actor.free_port.remote())
        variables = variables_of([worker.seat for worker in self.workers], port)
        for rank, (worker, own) in enumerate(zip(self.workers, variables, strict=True)):
            call = worker.actor.run.remote(dict(task), {**own, "NEXUS_ATTEMPT": attempt})
            self._runs[call] = rank

    def ended(self, seconds: float) -> dict[int, Outcome]:
        """Outcomes that were not told before, by rank; waits so long for the first."""
        import ray
        from ray.exceptions import RayError

        found: dict[int, Outcome] = {}
        ready, _ = ray.wait(list(self._runs), num_returns=1, timeout=seconds)
        if ready:  # and all that have come with it
            ready, _ = ray.wait(list(self._runs), num_returns=len(self._runs), timeout=0)
        for call in ready:
            rank = self._runs.pop(call)
            try:
                found[rank] = ray.get(call)
            except RayError as error:
                found[rank] = Outcome("gone", type(error).__name__, str(error))
        found |= self._silent()
        return found

    @property
    def running(self) -> int:
        return len(self._runs)

    def _silent(self) -> dict[int, Outcome]:
        """Ranks that have shown no sign of life for too long."""
        import ray

        now = time.monotonic()
        if now < self._next_sign:
            return {}
        self._next_sign = now + SIGN_OF_LIFE_EVERY_S
        running = {rank: call for call, rank in self._runs.items()}
        for rank in running:
            call, _ = self._signs.get(rank, (None, now))
            if call is None or ray.wait([call], timeout=0)[0]:
                self._signs[rank] = self.workers[rank].actor.answers.remote(), now
        silent = {rank for rank in running if now - self._signs[rank][1] > SILENT_S}
        for rank in silent:
            del self._runs[running[rank]]
        return {rank: Outcome("gone", "silent", f"no sign of life for {SILENT_S:g} s") for rank in silent}


@contextmanager
def placed(
    workers: int,
    resources: Mapping[str, float],
    *,
    nodes: Collection[str] | None,
    deadline_s: float,
    spares: Spares | None = None,
) -> Iterator[Group | None]:
    """A group of so many workers within; all of its processes end with it. None where there was no room within the deadline.

    Args:
        resources: of each, `CPU` and `GPU`.
        nodes: machines that may be used; None: all.
        spares: processes that may take workers' places.
    Raises:
        RayError: a process died while it was started.
    """
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    # Ray would place workers on a machine that is gone until its heartbeat is missed.
    labels = [{NODE_LABEL: f"in({','.join(sorted(nodes))})"}] * workers if nodes is not None else None
    room = placement_group([dict(resources)] * workers, strategy="PACK", bundle_label_selector=labels)
    actors: list[Any] = []
    try:
        if not room.wait(deadline_s):
            yield None
            return
        actors += (spares.take(room, workers) if spares is not None else None) or _actors(room, workers, resources)
        seats: list[Seat] = ray.get([actor.seat.remote() for actor in actors])
        yield Group([Worker(actor, seat) for actor, seat in zip(actors, seats, strict=True)])
    finally:
        # At once: a process group with a dead peer does not close, and what a run keeps is on disk.
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(room)


def _actors(room: Any, workers: int, resources: Mapping[str, float]) -> list[Any]:
    # Without an environment of their own they can have the processes that Ray starts ahead (0.5 s).
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    made = ray.remote(num_cpus=resources.get("CPU", 0), num_gpus=resources.get("GPU", 0))(Rank)
    return [
        made.options(
            max_concurrency=CALLS_AT_ONCE,
            scheduling_strategy=PlacementGroupSchedulingStrategy(room, placement_group_bundle_index=index),
        ).remote()
        for index in range(workers)
    ]


def by_node_and_gpu(workers: Sequence[Worker]) -> list[Worker]:
    """In the order of ranks: nodes as they come, and on each by its GPU."""
    nodes = {node: index for index, node in reversed(list(enumerate(worker.seat.node for worker in workers)))}
    return sorted(workers, key=lambda worker: (nodes[worker.seat.node], _gpu_order(worker.seat.gpus)))


def _gpu_order(gpus: Sequence[str]) -> list[tuple[int, str]]:
    return sorted((int(gpu) if gpu.isdecimal() else 0, gpu) for gpu in gpus)


def variables_of(seats: Sequence[Seat], port: int) -> list[dict[str, str]]:
    """The environment of each rank, by torchrun's names.

    The GPUs of a node's workers are visible to all of them, as NCCL copies directly only between GPUs that both processes see.
    """
    nodes = list(dict.fromkeys(seat.node for seat in seats))
    members = {node: [rank for rank, seat in enumerate(seats) if seat.node == node] for node in nodes}
    found = []
    for rank, seat in enumerate(seats):
        peers = members[seat.node]
        own = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(seats)),
            "LOCAL_RANK": str(peers.index(rank)),
            "LOCAL_WORLD_SIZE": str(len(peers)),
            "NODE_RANK": str(nodes.index(seat.node)),
            "MASTER_ADDR": seats[0].address,
            "MASTER_PORT": str(port),
        }
        if seat.gpus:
            gpus = {gpu for peer in peers for gpu in seats[peer].gpus}
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for _, gpu in _gpu_order(sorted(gpus)))
        found.append(own)
    return found


class Spares:
    """A process for each worker on its node, started once the workers have imported what they need.

    By Ray's count a spare takes no CPU: the group whose place it takes holds the CPUs. Ray hides the GPUs from an actor that takes
    none, so that spares are for processors alone.

    Args:
        settings: see `rank.settle`.
    """

    LOOK_S = 4.0
    """Time between two looks at what a worker has imported. Where the second finds no more than the first, the workers have settled;
    earlier, spares would take the processors from their start, and would lack what they import last."""

    LATER_LOOK_S = 60.0

    def __init__(self, settings: Mapping[str, Any]):
        self._settings = dict(settings)
        self._spares: dict[str, list[Any]] = defaultdict(list)  # by node
        self._modules: list[str] = []
        self._look: Any = None
        self._next = 0.0

    def begin(self) -> None:
        """A group has started."""
        self._look, self._modules, self._next = None, [], time.monotonic() + self.LOOK_S

    def tend(self, group: Group) -> None:
        """Starts what is missing when the time has come; called again and again while the group runs."""
        import ray
        from ray.exceptions import RayError

        if time.monotonic() < self._next:
            return
        if self._look is None:
            self._look = group.workers[0].actor.modules.remote()
        elif ray.wait([self._look], timeout=0)[0]:
            try:
                modules: list[str] = ray.get(self._look)
            except RayError as error:  # the worker died; its outcome says so
                logger.debug("a worker did not say what it has imported: %s", error)
                return
            settled = len(modules) == len(self._modules)
            self._look, self._modules = None, modules
            self._next = time.monotonic() + (self.LATER_LOOK_S if settled else self.LOOK_S)
            if settled:
                self._fill(group.nodes)

    def _fill(self, nodes: Sequence[str]) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = [node for node, spares in self._spares.items() for _ in spares]
        for node in missing(nodes, there):
            affinity = NodeAffinitySchedulingStrategy(node, soft=False)
            spare = ray.remote(num_cpus=0)(Rank).options(max_concurrency=CALLS_AT_ONCE, scheduling_strategy=affinity)
            self._spares[node].append(spare.remote())
        for spare in self._all():
            spare.prepare.remote(self._modules, self._settings)

    def take(self, room: Any, workers: int) -> list[Any] | None:
        """A spare for each bundle of a placement group, on its node; None where one is missing: the slowest worker decides anyway."""
        import ray
        from ray.util.placement_group import placement_group_table

        nodes = placement_group_table(room)["bundles_to_node_id"]
        taken: list[Any] = []
        for index in range(workers):
            spare = self._take(nodes[index])
            if spare is None:
                for each in taken:
                    ray.kill(each)
                return None
            taken.append(spare)
        return taken

    def _take(self, node: str) -> Any | None:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError

        while self._spares[node]:
            spare = self._spares[node].pop()
            try:
                ray.get(spare.prepare.remote(self._modules, self._settings), timeout=60)  # a new worker's come later
                return spare
            except (GetTimeoutError, RayActorError) as error:
                logger.info("a spare worker is lost: %s", error)
        return None

    def _all(self) -> list[Any]:
        return [spare for spares in self._spares.values() for spare in spares]

    def end(self) -> None:
        import ray

        for spare in self._all():
            ray.kill(spare)
        self._spares.clear()
