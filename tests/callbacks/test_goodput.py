"""The account of a run's time: it adds up, whatever befell the run, and lays each second where it belongs."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nexus_scale.callbacks.goodput import MOST_MARKS, Goodput, account, added_up
from nexus_scale.callbacks.watchdog import StageClock
from nexus_scale.contracts import Preempted, Progress, Rollback, RunFolder, StepInfo
from tests.training_ranks import Ranks


def attempt(begun: float, first: int, last: int, ended: str | None, /, **seconds: float) -> dict[str, Any]:
    return {
        "begun": begun, "at": begun + sum(seconds.values()), "first": first, "step": last, "ended": ended,
        "starting": seconds.get("start", 0.0), "seconds": seconds, "marks": [],
    }  # fmt: skip


def test_a_run_without_trouble_is_productive_but_for_its_start_and_what_it_does_beside() -> None:
    kept = added_up(
        [attempt(0, 0, 100, "done", start=5, data=2, forward=30, backward=40, step=10, save=3, validate=6, samples=4)]
    )
    assert kept.parts == {
        "productive": 80, "start": 5, "recovery": 0, "saving": 3, "data": 2, "validation": 10, "other": 0
    }  # fmt: skip
    assert (kept.wall, kept.away, kept.effective) == (100, 0, 0.8)


def test_steps_that_are_done_again_and_the_way_back_are_recovery() -> None:
    killed = attempt(0, 0, 30, None, start=10, forward=60)  # 2 s a step; its last save was step 20
    again = attempt(100, 20, 50, "done", start=10, forward=60)
    kept = added_up([killed, again])
    assert kept.parts["productive"] == 40 + 60
    assert kept.parts["recovery"] == (60 - 40) + 30 + 10, "steps done again, the gap, the second start"
    assert kept.wall == again["at"] - killed["begun"] == 170


def test_marks_say_which_steps_were_slow() -> None:
    killed = {**attempt(0, 0, 30, None, forward=60), "marks": [(10, 5.0), (20, 10.0)]}  # the last ten took 50 s
    assert added_up([killed, attempt(60, 20, 21, "done", forward=1)]).parts["productive"] == 11
    assert added_up([killed, attempt(60, 15, 21, "done", forward=1)]).parts["productive"] == 8.5


def test_a_pause_that_was_wanted_is_no_part_of_the_wall_time() -> None:
    left = attempt(0, 0, 30, "left", start=10, forward=60)
    kept = added_up([left, attempt(1000, 30, 60, "done", start=10, forward=60)])
    assert (kept.away, kept.wall, kept.parts["start"], kept.parts["recovery"]) == (930, 140, 20, 0)


def test_a_clock_that_was_set_back_makes_no_time_negative() -> None:
    kept = added_up([attempt(1000, 0, 10, None, forward=10), attempt(900, 10, 20, "done", forward=10)])
    assert kept.wall == 20


@pytest.mark.parametrize(
    ("error", "ended"), [(None, "rolled_back"), (Preempted(3), "left"), (RuntimeError("lost"), "failed")]
)
def test_how_an_attempt_ended_is_kept_and_the_next_goes_on_where_it_stopped(
    tmp_path: Path, error: Exception | None, ended: str
) -> None:
    run, clock = RunFolder(tmp_path), StageClock()
    engine: Any = SimpleNamespace(rank=0, world_size=1)
    time.sleep(0.05)
    first = Goodput(run=run, stage=clock, beat_seconds=0.01)
    first.before_run(engine, Progress())
    for step in range(1, 4):
        clock("forward")
        time.sleep(0.05)
        first.after_step(StepInfo(step, 9, {}, engine, Progress(step=step)))
    try:
        try:
            raise error or Rollback("a spike", 1, 2)
        except Rollback:
            clock("start")
        finally:
            first.close()
    except (Preempted, RuntimeError):
        clock("start")
    second = Goodput(run=run, stage=clock)
    second.before_run(engine, Progress(step=2))
    second.after_run(engine, Progress(step=2))
    second.close()
    one, two = sorted(
        (json.loads(path.read_text()) for path in (tmp_path / "goodput").iterdir()), key=lambda a: a["begun"]
    )
    assert (one["ended"], two["ended"]) == (ended, "done")
    assert one["starting"] >= 0.05
    assert len(one["marks"]) <= MOST_MARKS
    assert two["begun"] == pytest.approx(one["at"], abs=1e-6), "no time is lost between them, and none counted twice"
    kept = account(run)
    assert kept is not None
    assert kept.attempts == 2
    assert kept.parts["productive"] + kept.parts["recovery"] >= 0.15


def test_a_real_run_that_is_killed_accounts_for_all_of_its_time(tmp_path: Path) -> None:
    callbacks = {"goodput": {"beat_seconds": 0.05}}
    begun = time.time()
    killed = Ranks(tmp_path / "run", steps=12, fault="step:10,phase:step,action:SIGKILL", callbacks=callbacks)
    assert killed.wait() == [-signal.SIGKILL]
    slow = "phase:data,action:sleep,seconds:0.2"
    Ranks(tmp_path / "run", steps=12, fault=slow, callbacks=callbacks).done()
    kept = account(RunFolder(tmp_path / "run"))
    assert kept is not None
    assert kept.attempts == 2
    assert 0 < kept.wall <= time.time() - begun
    assert kept.parts["data"] >= 0.8
    assert min(kept.parts["recovery"], kept.parts["start"], kept.parts["productive"]) > 0
    assert kept.effective is not None
    assert 0 < kept.effective < 1
