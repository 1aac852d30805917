"""The numbers and the environment that ranks get, by where their processes are, and what is made of how they end. Nothing starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nexus_scale.contracts import UserError
from nexus_scale.io import leaving
from nexus_scale.orchestration import controller
from nexus_scale.orchestration.controller import Controller, Plan
from nexus_scale.orchestration.group import Worker, by_node_and_gpu, variables_of
from nexus_scale.orchestration.rank import Outcome, Seat
from nexus_scale.orchestration.supervise import Failure, Limits, Supervisor


def seat(node: str, *gpus: str) -> Seat:
    return Seat(node, f"10.0.0.{node}", f"host{node}", gpus)


def test_ranks_go_node_by_node_and_by_their_gpus() -> None:
    seats = [seat("2", "10"), seat("1", "1"), seat("2", "9"), seat("1", "0")]
    ordered = by_node_and_gpu([Worker(None, one) for one in seats])
    assert [worker.seat for worker in ordered] == [seat("2", "9"), seat("2", "10"), seat("1", "0"), seat("1", "1")]
    assert [w.seat.node for w in by_node_and_gpu([Worker(None, seat(n)) for n in "313"])] == ["3", "3", "1"]


def test_each_rank_is_told_its_place_and_sees_its_nodes_gpus() -> None:
    found = variables_of([seat("2", "9"), seat("2", "10"), seat("1", "0")], port=1234)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "CUDA_VISIBLE_DEVICES")
    assert [tuple(own[name] for name in names) for own in found] == [
        ("0", "3", "0", "2", "0", "9,10"),
        ("1", "3", "1", "2", "0", "9,10"),
        ("2", "3", "0", "1", "1", "0"),
    ]
    assert {(own["MASTER_ADDR"], own["MASTER_PORT"]) for own in found} == {("10.0.0.2", "1234")}
    assert "CUDA_VISIBLE_DEVICES" not in variables_of([seat("1")], 1)[0], "what the user has set stays"


GONE = Outcome("gone", "ActorDiedError", "the actor is dead")
RESET = Outcome("failed", "RuntimeError", "Read error: Connection reset by peer")
BUG = Outcome("failed", "KeyError", "Traceback ...\nKeyError: 'text'")
LEFT = Outcome("left", "Preempted", "after step 41")
DONE = Outcome("done")


class FakeGroup:
    """Ranks that end one by one, as told."""

    nodes = ("a", "a")
    workers = tuple(Worker(None, seat("a")) for _ in range(2))

    def __init__(self, ends: list[dict[int, Outcome]]):
        self.ends, self.running = ends, 2

    def start(self, task: Any, attempt: str) -> None:
        assert attempt

    def ended(self, seconds: float) -> dict[int, Outcome]:
        found = self.ends.pop(0) if self.ends else {}
        self.running -= len(found)
        return found


def failure(run: Path, *ends: dict[int, Outcome]) -> Failure | None:
    run.mkdir(exist_ok=True)
    plan = Plan([2], False, {"CPU": 1.0}, True, lambda: False, standby=False, start_deadline_s=1)
    return Controller({}, plan, Supervisor(run, Limits()))._watched(FakeGroup(list(ends)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ends", "kind", "rank"),
    [
        ([{0: RESET}, {}, {1: GONE}], "lost", 1),
        ([{0: RESET}, {1: BUG}], "failed", 1),
        ([{0: RESET}], "lost", 0),
        ([{0: DONE}, {1: GONE}], "lost", 1),
    ],
    ids=["the cause comes late", "a bug", "no cause comes", "one is done"],
)
def test_the_cause_is_waited_for(
    ends: list[dict[int, Outcome]], kind: str, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "CAUSE_S", 0.05)
    found = failure(tmp_path, *ends)
    assert found is not None and (found.kind, found.rank) == (kind, rank)


def test_all_done_is_no_failure(tmp_path: Path) -> None:
    assert failure(tmp_path, {0: DONE}, {}, {1: DONE}) is None


def test_leaving_to_be_restarted_is_no_failure_of_the_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "CAUSE_S", 0.05)
    monkeypatch.setattr(Supervisor, "begin", lambda *_: "a")  # it takes a request that stands for answered
    leaving.ask(tmp_path, "the machine goes", restart=True)
    assert failure(tmp_path, {0: LEFT}, {1: RESET}) == Failure("left", "the machine goes")
    assert failure(tmp_path, {0: BUG}, {1: RESET}).kind == "failed"  # type: ignore[union-attr]


def test_a_mistake_that_could_not_be_written_down_comes_home(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the disk is full") as caught:
        failure(tmp_path, {1: Outcome("mistake", "UserError", "the disk is full", 6)})
    assert caught.value.code == 6


def test_errors_of_ray_are_judged_as_its_own_and_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import ActorDiedError, RaySystemError

    errors = [ActorDiedError(), RaySystemError("the store is gone"), RaySystemError("the store is gone")]
    monkeypatch.setattr(Controller, "_started", lambda _: (_ for _ in ()).throw(errors.pop(0)))
    plan = Plan([2], False, {"CPU": 1.0}, True, lambda: False, standby=False, start_deadline_s=1)
    supervisor = Supervisor(tmp_path, Limits(failures=100, backoff_s=0))
    supervisor.begin(2)
    verdict = Controller({}, plan, supervisor).run()
    assert verdict is not None and "same error came twice" in verdict.words and not errors
