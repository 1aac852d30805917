"""The number of workers of an elastic run: the largest that divides the global batch and for which there is room.

`machines` asks Ray what there is, and each machine whether it answers.
"""

from __future__ import annotations

import math
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nexus_scale.orchestration import ray_internals
from nexus_scale.orchestration.cluster import whole_workers

PROBE_S = 2.0
"""How long a machine may take to accept a connection. Ray takes tens of seconds to declare a silent one dead."""


def common_micro_batch(global_batch: int, least: int, most: int) -> int:
    """The largest micro-batch that fits every number of workers from `least` to `most` that divides the global batch.

    It is chosen once, so that a worker's memory does not grow when workers go: the accumulation grows instead.
    """
    shares = [global_batch // workers for workers in range(least, most + 1) if global_batch % workers == 0]
    return math.gcd(*shares) if shares else 1


def allowed_sizes(global_batch: int, least: int, most: int, micro_batch: int | None) -> list[int]:
    """Numbers of workers that split the global batch into whole micro-batches, ascending."""
    return [
        workers
        for workers in range(least, most + 1)
        if global_batch % workers == 0 and (micro_batch is None or (global_batch // workers) % micro_batch == 0)
    ]


def largest(sizes: Sequence[int], room: int) -> int:
    """The largest allowed number of workers that fits; 0 where none does."""
    return max((size for size in sizes if size <= room), default=0)


def room_for_workers(
    nodes: Mapping[str, Mapping[str, float]], held: Iterable[str], resources: Mapping[str, float]
) -> int:
    """How many whole workers fit on these nodes.

    Args:
        nodes: free resources of each usable node, by its id.
        held: nodes of workers that run, or ran, and still hold their share.
        resources: what one worker takes.
    """
    counts = Counter(held)
    free = [
        {name: values.get(name, 0.0) + counts[node] * need for name, need in resources.items()}
        for node, values in nodes.items()
    ]
    return whole_workers(free, resources.get("CPU", 0.0), resources.get("GPU", 0.0))


class Room:
    """The largest allowed number of workers that the machines hold, as it changes.

    Machines are asked directly, so that a dead one is not counted on while Ray waits for its heartbeat.

    Args:
        sizes: allowed numbers of workers.
        resources: what one worker takes.
        deadline_s: how long to wait for machines that hold the least of them.
    """

    def __init__(self, sizes: Sequence[int], resources: Mapping[str, float], deadline_s: float):
        self.sizes, self._resources, self._deadline_s = sizes, resources, deadline_s
        self.held: list[str] = []  # nodes of the workers that were started last
        self.usable: dict[str, Mapping[str, float]] = {}

    def best(self) -> int:
        """The number of workers to have now; 0 where not even the least fits."""
        self.usable, whole = machines()
        room = room_for_workers(self.usable, self.held, self._resources)
        # What ended workers held may be counted among the free already.
        return largest(self.sizes, min(room, room_for_workers(whole, (), self._resources)))

    def wait(self) -> int:
        """As `best`, once there is room.

        Raises:
            UserError: not within the deadline.
        """
        end = time.monotonic() + self._deadline_s
        while (workers := self.best()) == 0:
            if time.monotonic() > end:
                from nexus_scale.contracts import UserError

                raise UserError(
                    f"no room for {min(self.sizes)} workers within {self._deadline_s:g} s: {len(self.usable)} machines answer. "
                    "Add machines, or lower cluster.workers",
                    code=4,
                )
            time.sleep(1.0)
        return workers


def machines() -> tuple[dict[str, Mapping[str, float]], dict[str, Mapping[str, float]]]:
    """Free resources, and all of them, of each node that is alive, answers, and is not being drained, by Ray's id."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    leaving = ray_internals.draining_nodes()
    with ThreadPoolExecutor(max_workers=min(32, len(alive) or 1)) as pool:
        answers = list(pool.map(_answers, alive))
    free = ray_internals.free_resources()
    usable = {
        node["NodeID"]: node["Resources"]
        for node, answer in zip(alive, answers, strict=True)
        if answer and node["NodeID"] not in leaving
    }
    return {node: free.get(node, {}) for node in usable}, usable


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=PROBE_S).close()
    except OSError:
        return False
    return True
