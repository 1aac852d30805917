"""The supervisor's judgement, without any process: what is restarted, when, how often, and what is written down."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from nexus_scale.io import incidents, leaving
from nexus_scale.orchestration.supervise import Failure, Limits, Supervisor, failure_of, normalised

LOST = Failure("lost", "the process of rank 1 is gone", 1)


def mistake(text: str) -> Failure:
    return failure_of({0: ("ValueError", f"Traceback ...\nValueError: {text}", False)})


def commit(run: Path, step: int) -> None:
    (run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


def beat(run: Path, rank: int, step: int) -> None:
    path = run / "heartbeats" / f"rank{rank}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"rank": rank, "step": step, "at": time.time() + 1}))


def test_restarts_are_bounded_and_wait_longer_each_time(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, Limits(failures=4, backoff_s=2))
    waits = []
    for _ in range(4):
        supervisor.begin(2)
        verdict = supervisor.judge(LOST)
        assert verdict.restart
        waits.append(verdict.wait_s)
    assert waits == [0, 2, 4, 8]
    supervisor.begin(2)
    assert not supervisor.judge(LOST).restart
    assert supervisor.gave_up is not None and "5 times" in supervisor.gave_up.words
    assert [row["kind"] for row in incidents.read(tmp_path)][-1] == "gave_up"


def test_a_new_checkpoint_makes_the_count_begin_anew(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, Limits(failures=1))
    for step in range(1, 6):
        supervisor.begin(2)
        commit(tmp_path, step)
        assert supervisor.judge(LOST).restart
    supervisor.begin(2)
    assert not supervisor.judge(LOST).restart


def test_the_same_error_twice_at_the_same_step_ends_the_run(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, Limits(failures=100))
    supervisor.begin(2)
    beat(tmp_path, 0, 7)
    assert supervisor.judge(mistake("tensor at 0x7f12 has 3 rows")).restart
    supervisor.begin(2)
    beat(tmp_path, 0, 7)
    verdict = supervisor.judge(mistake("tensor at 0x9e00 has 4 rows"))
    assert not verdict.restart and "same error came twice at step 7" in verdict.words


@pytest.mark.parametrize(("step", "text"), [(8, "3 rows"), (7, "another thing")])
def test_another_step_or_another_error_is_tried_again(tmp_path: Path, step: int, text: str) -> None:
    supervisor = Supervisor(tmp_path, Limits(failures=100))
    supervisor.begin(2)
    beat(tmp_path, 0, 7)
    assert supervisor.judge(mistake("3 rows")).restart
    supervisor.begin(2)
    beat(tmp_path, 0, step)
    assert supervisor.judge(mistake(text)).restart


def test_a_lost_process_is_always_retried_within_the_bound(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, Limits(failures=3, backoff_s=0))
    for _ in range(3):
        supervisor.begin(2)
        assert supervisor.judge(LOST).restart


def test_preemptions_are_counted_apart(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, Limits(failures=0, preemptions=2))
    for _ in range(2):
        supervisor.begin(2)
        leaving.ask(tmp_path, "the machine goes", restart=True)
        assert supervisor.judge(Failure("left", "the machine goes")).restart
    supervisor.begin(2)
    assert leaving.asked(tmp_path) is None, "the restart is the answer to the request"
    assert not supervisor.judge(Failure("left", "the machine goes")).restart


def test_the_cause_is_told_from_what_it_causes() -> None:
    reset = (
        "RuntimeError",
        "RuntimeError: [gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer",
        False,
    )
    gone = ("WorkerHealthCheckFailedError", "The actor is dead", True)
    bug = ("KeyError", "'text'", False)
    assert failure_of({0: reset, 1: gone}) == LOST
    assert failure_of({0: reset, 2: bug}).message == "rank 2 raised KeyError: 'text'"
    assert failure_of({0: reset}).kind == "lost"
    silent = ("RuntimeError", "[unbound_buffer.cc:78] Timed out waiting 8000ms for recv operation to complete", False)
    assert failure_of({0: silent, 1: gone}) == LOST
    assert failure_of({0: silent, 2: bug}).message == "rank 2 raised KeyError: 'text'"
    assert failure_of({0: reset, 1: silent}).message.startswith("rank 1 waited in vain for another: [unbound_buffer")


def test_ranks_that_wait_in_vain_twice_at_the_same_step_are_not_restarted_for_ever(tmp_path: Path) -> None:
    """A cut network is gone the next time; two ranks that make different collectives are not."""
    supervisor = Supervisor(tmp_path, Limits(failures=100))
    verdicts = []
    for waited in (8000, 8001):
        supervisor.begin(2)
        beat(tmp_path, 0, 7)
        text = f"Timed out waiting {waited}ms for recv operation to complete"
        verdicts.append(supervisor.judge(failure_of({0: ("RuntimeError", text, False)})))
    assert [verdict.restart for verdict in verdicts] == [True, False]
    assert [row["kind"] for row in incidents.read(tmp_path)] == ["worker_lost", "restarted", "worker_lost", "gave_up"]


def test_a_stall_that_the_watchdog_ended_is_named(tmp_path: Path) -> None:
    incidents.note(tmp_path, "stalled", "an old one", rank=0)
    time.sleep(0.01)
    supervisor = Supervisor(tmp_path, Limits())
    supervisor.begin(2)
    incidents.note(tmp_path, "stalled", "rank 1 has been in stage 'data' for 60 s", rank=1)
    assert supervisor.judge(LOST).restart
    attempt = json.loads((tmp_path / "attempts" / supervisor.name / "attempt.json").read_text())
    assert attempt["error"] == "rank 1 has been in stage 'data' for 60 s"
    assert [row["kind"] for row in incidents.read(tmp_path)] == ["stalled", "stalled"], "once is enough"


def test_attempts_say_what_they_did(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path, Limits())
    commit(tmp_path, 40)
    first = supervisor.begin(2)
    beat(tmp_path, 0, 55)
    supervisor.judge(LOST)
    second = supervisor.begin(1)
    supervisor.end("finished")
    one, two = (json.loads((tmp_path / "attempts" / name / "attempt.json").read_text()) for name in (first, second))
    assert (one["first_step"], one["last_step"], one["workers"], one["outcome"]) == (40, 55, 2, "failed")
    assert two["workers"] == 1 and two["outcome"] == "finished" and two["error"] == ""
    kinds = [row["kind"] for row in incidents.read(tmp_path)]
    assert kinds == ["worker_lost", "restarted", "resized"]


def test_what_differs_between_two_times_is_left_out_of_a_message() -> None:
    assert normalised("allocate 20.00 MiB at 0x7ffe on /tmp/x12") == normalised("allocate 3 MiB at 0x1 on /tmp/x7")
    assert normalised("a") != normalised("b")
