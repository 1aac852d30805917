"""The loop around the workers: how many, start, watch, judge, again. It runs in the driver, and is the only one that restarts anything.

A controller in a process of its own, as stock Ray Train has it, imports all that the driver has imported already, and ends the run
when it dies alone.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.io import incidents, leaving
from nexus_scale.orchestration import ray_internals
from nexus_scale.orchestration.elastic import Room
from nexus_scale.orchestration.group import Group, Spares, placed
from nexus_scale.orchestration.rank import Outcome
from nexus_scale.orchestration.supervise import (
    Failure,
    Supervisor,
    Verdict,
    failure_of,
    is_collateral,
    last_line,
    normalised,
)

logger = logging.getLogger(__name__)

LOOK_S = 0.2
"""Between two looks at the machines and the spares while nobody ends; an end is seen at once."""

CAUSE_S = 2.0
"""How long to look for the cause of a failure that was seen by its consequence."""


@dataclass(frozen=True)
class Plan:
    """How a run is watched over.

    Attributes:
        sizes: allowed numbers of workers, ascending.
        elastic: whether the run is sized anew while it runs.
        resources: what each worker takes, `CPU` and `GPU`.
        local: the cluster is this machine and cannot grow.
        is_final: asked after each failure whether a restart is pointless.
        standby: whether spares stand by for the workers.
    """

    sizes: Sequence[int]
    elastic: bool
    resources: Mapping[str, float]
    local: bool
    is_final: Callable[[], bool]
    standby: bool
    start_deadline_s: float


class Controller:
    """Runs a task to its end, or to the last restart.

    Args:
        task: see `train.launch`.
    """

    def __init__(self, task: Mapping[str, Any], plan: Plan, supervisor: Supervisor):
        self._task, self._plan, self._supervisor = task, plan, supervisor
        self._room = Room(plan.sizes, plan.resources, plan.start_deadline_s)
        self._spares = Spares(task) if plan.standby else None
        self._watch = Watch(supervisor, self._room, plan)
        self._demand = Demand(plan)

    def run(self) -> Verdict | None:
        """None when all ranks are done; otherwise why there is no further restart, without words where the run was ended for good.

        Raises:
            UserError: too small a cluster; a worker's mistake that it could not write down.
        """
        try:
            while (failure := self._attempt()) is not None:
                if self._plan.is_final():
                    return Verdict(False)
                verdict = self._supervisor.judge(failure)
                if not verdict.restart:
                    return verdict
                time.sleep(verdict.wait_s)
        finally:
            if self._spares is not None:
                self._spares.end()
            self._demand.end()
        self._supervisor.end("finished")
        return None

    def _attempt(self) -> Failure | None:
        """One start of the workers, and what ended it; None: they are done."""
        from ray.exceptions import RayActorError, RayError

        try:
            return self._started()
        except RayActorError as error:
            return Failure("lost", f"a worker died while it was started: {last_line(str(error))}", details=str(error))
        except RayError as error:
            words = f"Ray failed: {last_line(str(error))}"
            return Failure("controller", words, error=normalised(repr(error)), details=str(error))

    def _started(self) -> Failure | None:
        plan = self._plan
        while True:
            self._demand.renew()
            workers = self._room.wait()
            nodes = None if plan.local else set(self._room.usable)
            deadline, spares = plan.start_deadline_s, self._spares
            with placed(workers, plan.resources, nodes=nodes, deadline_s=deadline, spares=spares) as group:
                if group is not None:
                    return self._watched(group)
            if not plan.elastic:  # an elastic one is sized anew, by what machines answer then
                raise UserError(f"the cluster did not start {workers} workers within {deadline:g} s", code=4)

    def _watched(self, group: Group) -> Failure | None:
        """Starts the ranks and waits until all are done or one is not."""
        group.start(self._task, self._watch.begin(group))
        if self._spares is not None:
            self._spares.begin()
        while group.running:
            bad = _bad(group.ended(LOOK_S))
            if bad:
                return self._failure(self._with_cause(bad, group))
            self._watch.look()
            self._demand.renew()
            if self._spares is not None:
                self._spares.tend(group)
        return None

    def _with_cause(self, bad: dict[int, Outcome], group: Group) -> dict[int, Outcome]:
        """A rank that lost its peer may be seen before the peer's own end, which names the cause."""
        end = time.monotonic() + CAUSE_S
        while group.running and time.monotonic() < end and all(is_collateral(one.text) for one in bad.values()):
            bad |= _bad(group.ended(0.1))
        return bad

    def _failure(self, bad: Mapping[int, Outcome]) -> Failure:
        mistake = next((one for one in bad.values() if one.kind == "mistake"), None)
        if mistake is not None and not self._plan.is_final():  # it could not be written into the run folder
            self._supervisor.end("failed", mistake.text)
            raise UserError(mistake.text, code=mistake.code)
        request = leaving.asked(self._supervisor.run)
        if request is not None and request.restart and _all_left(bad.values()):
            return Failure("left", request.reason)
        told = {rank: (one.error, one.text, one.kind == "gone") for rank, one in bad.items()}
        return failure_of(told, details="\n".join(f"rank {rank}: {one.text}" for rank, one in sorted(bad.items())))


def _bad(ended: Mapping[int, Outcome]) -> dict[int, Outcome]:
    return {rank: outcome for rank, outcome in ended.items() if outcome.kind != "done"}


def _all_left(outcomes: Any) -> bool:
    """Whether the workers left as asked; one that is still in a collective may see its peer leave."""
    kinds = [outcome.kind for outcome in outcomes if not is_collateral(outcome.text)]
    return bool(kinds) and set(kinds) == {"left"}


class Watch:
    """Beside the workers while they run: gives them their attempt's id, and asks them to leave where a machine goes or more have come."""

    EVERY_S = 2.0

    def __init__(self, supervisor: Supervisor, room: Room, plan: Plan):
        self._supervisor, self._room, self._plan = supervisor, room, plan
        self._names: dict[str, str] = {}  # of machines, by node
        self._nodes: list[str] = []
        self._next = 0.0
        self._larger = 0

    def begin(self, group: Group) -> str:
        """A group is about to start; returns the attempt's id."""
        attempt = self._supervisor.begin(len(group.workers))
        self._names |= {worker.seat.node: worker.seat.hostname for worker in group.workers}
        for node in set(self._room.held) - set(self._room.usable):
            name = self._names.get(node, "?")
            words = f"machine {name} ({node[:8]}) left the cluster"
            incidents.note(self._supervisor.run, "node_lost", words, node=node)
        self._room.held = self._nodes = group.nodes
        self._next, self._larger = time.monotonic() + self.EVERY_S, 0
        return attempt

    def look(self) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self.EVERY_S
        if leaving.asked(self._supervisor.run) is None and not self._drained() and self._plan.elastic:
            self._grow()

    def _drained(self) -> bool:
        """Whether a machine of the run is about to be taken away; the run is then asked to leave."""
        if self._plan.local:
            return False  # nobody takes this machine away with a notice
        going = sorted(set(ray_internals.draining_nodes()) & set(self._nodes))
        if going:
            words = f"machine {self._names[going[0]]} ({going[0][:8]}) is about to be taken away"
            incidents.note(self._supervisor.run, "preempted", words, node=going[0])
            self._ask_to_leave(words)
        return bool(going)

    def _grow(self) -> None:
        best = self._room.best()
        # Seen twice, so that a machine that comes and goes costs no restart.
        if best > len(self._nodes) and best == self._larger:
            self._ask_to_leave(f"there is room for {best} workers, {len(self._nodes)} run")
        self._larger = best

    def _ask_to_leave(self, words: str) -> None:
        try:
            leaving.ask(self._supervisor.run, words, restart=True)
        except OSError as error:  # a full disk; asked again at the next look
            logger.error("the run cannot be asked to leave (%s): %s", words, error)


class Demand:
    """Keeps a growing cluster's autoscaler told of the most workers that the run may have; nothing on a local one."""

    EVERY_S = 20.0

    def __init__(self, plan: Plan):
        self._bundles = [] if plan.local else [plan.resources] * max(plan.sizes)
        self._name = f"nexus-{secrets.token_hex(8)}"
        self._next = 0.0

    def renew(self) -> None:
        if self._bundles and time.monotonic() >= self._next:
            self._next = time.monotonic() + self.EVERY_S
            self._say(self._bundles)

    def end(self) -> None:
        if self._bundles:
            self._say([])

    def _say(self, bundles: Sequence[Mapping[str, float]]) -> None:
        from ray.exceptions import RayError

        try:
            ray_internals.ask_for_machines(self._name, bundles)
        except RayError as error:  # a cluster of fixed size needs no demand
            logger.warning("the cluster's autoscaler was not told what this run needs: %s", error)
