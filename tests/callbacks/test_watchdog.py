"""A stall is noticed in time, every rank says where it stands, and the one that the others wait for is named."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from nexus_scale.callbacks.stalls import blamed, calls, oddity
from nexus_scale.callbacks.watchdog import DEADLINES
from nexus_scale.io import incidents, leaving
from tests.training_ranks import Ranks, newest_step

DEADLINE = 4.0
WATCHED = {"watchdog": {"beat_seconds": 0.2, "deadlines": {name: DEADLINE for name in DEADLINES if name != "start"}}}


def stalled(root: Path) -> dict[str, Any]:
    (row,) = [row for row in incidents.read(root) if row["kind"] == "stalled"]
    return row


def stacks(root: Path, rank: int) -> str:
    (path,) = (root / "incidents").glob(f"rank{rank}_*.txt")
    return path.read_text()


def test_a_stopped_rank_is_named_by_the_other(tmp_path: Path) -> None:
    run = Ranks(tmp_path / "run", 2, steps=40, fault="rank:1,step:6,phase:forward,action:SIGSTOP", callbacks=WATCHED)
    try:
        assert run.wait_for(0) == leaving.LEFT
    finally:
        run.kill()
    row = stalled(run.root)
    assert (row["rank"], row["noticed_by"]) == (1, 0)
    assert "its heartbeat stopped" in row["message"]
    assert f"its deadline is {DEADLINE:g} s" in row["message"]
    text = stacks(run.root, 0)
    assert "first micro-batch in hand: global batch 6" in text
    assert "moments [2, 8, 8, 8]" in text
    assert "gloo:all_reduce" in text
    assert "in backward" in text


def test_a_rank_that_waits_for_data_is_named_and_all_say_where_they_stand(tmp_path: Path) -> None:
    fault = "rank:0,step:6,phase:data,action:sleep,seconds:600"
    run = Ranks(tmp_path / "run", 2, steps=40, fault=fault, callbacks=WATCHED)
    try:
        assert leaving.LEFT in (run.wait_for(0), run.wait_for(1))
    finally:
        run.kill()
    row = stalled(run.root)
    assert (row["rank"], row["stage"], row["step"]) == (0, "data", 6)
    assert "faults.py" in stacks(run.root, 0)
    assert stacks(run.root, 1)


@pytest.mark.parametrize("what", ["extra", "missing"])
def test_a_rank_that_parts_from_the_others_is_named(tmp_path: Path, what: str) -> None:
    # No metrics of the step at hand: their collective would take the place of the one that is missing at its end.
    callbacks = {**WATCHED, "metrics": {"every": 20}}
    run = Ranks(tmp_path / "run", 2, steps=40, trick=(1, 6, what), callbacks=callbacks)
    try:
        assert leaving.LEFT in (run.wait_for(0), run.wait_for(1)), run.said()
    finally:
        run.kill()
    assert stalled(run.root)["rank"] == 1, stalled(run.root)


def test_a_rank_with_a_micro_batch_less_ends_the_run_before_the_step_counts(tmp_path: Path) -> None:
    """gloo compares the sizes of what meets: the rank that is ahead, and waits for fewer bytes, aborts, and its peer fails."""
    run = Ranks(tmp_path / "run", 2, steps=40, trick=(1, 6, "short"), micro_batch=1, callbacks=WATCHED)
    try:
        assert run.wait_for(1) == -signal.SIGABRT, run.said()
        assert run.wait_for(0) != 0
    finally:
        run.kill()
    assert newest_step(run.root) <= 6


# ------------------------------------------------------------------------------------------------ its parts


def test_a_step_that_is_unlike_the_one_before_is_told() -> None:
    ends = [("step", 7), ("save", 7), ("data", 7), ("forward", 7), ("backward", 9), ("step", 12)]
    habit = calls(ends)
    assert habit == [("data", 0), ("forward", 0), ("backward", 2), ("step", 3)]
    assert oddity(habit, habit) == ""
    assert oddity(habit, habit[:3], complete=False) == ""
    assert oddity(habit, [*habit[:2], ("backward", 1)], complete=False) == "", "it has begun one and will begin more"
    assert oddity(habit, [("data", 1)], complete=False) == "it began 1 collectives in 'data', and 0 in the step before"
    assert "began 1 collectives in 'backward', and 2" in oddity(
        habit, [*habit[:2], ("backward", 1), ("step", 0)], False
    )
    assert "'step' where 'backward' came" in oddity(habit, [*habit[:2], ("step", 0)], complete=False)


def beat(step: int, stage: str, collectives: int = 0, odd: str = "") -> dict[str, Any]:
    return {"step": step, "stage": stage, "collectives": collectives, "odd": odd, "in_stage_s": 1.0}


def test_whom_a_stall_is_laid_on() -> None:
    even = {rank: beat(5, "backward", 40) for rank in range(4)}
    assert blamed(even, [2])[0] == 2
    assert blamed({**even, 3: beat(5, "data", 38)}, [])[0] == 3
    assert blamed({**even, 1: beat(4, "step", 38)}, [])[0] == 1
    assert blamed({**even, 2: beat(6, "forward", 41, odd="one less")}, []) == (2, "one less")
    all_odd = {rank: beat(5, "backward", 40, odd="a new phase") for rank in range(4)}
    assert blamed({**all_odd, 3: beat(5, "data", 38, odd="a new phase")}, [])[0] == 3


def test_ranks_have_processes_of_their_own(tmp_path: Path) -> None:
    """The helper of these tests itself: what it starts it ends."""
    run = Ranks(tmp_path / "run", steps=4, fault="phase:start,action:SIGSTOP")
    pid = run.processes[0].pid
    run.kill()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
