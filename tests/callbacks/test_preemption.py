"""Asked to leave: by a signal to any worker or by a request in the run's folder, no step is lost and no bit changes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nexus_scale.callbacks.preemption import Terminations
from nexus_scale.io import incidents, leaving
from tests.training_ranks import Ranks, assert_same_end, final, newest_step, rows

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 30
SLOWLY = "phase:data,action:sleep,seconds:0.1"


def left_after(root: Path) -> int:
    """The step that the record names."""
    (row,) = [row for row in incidents.read(root) if row["kind"] == "preempted"]
    return int(row["step"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that nobody disturbed, by number of ranks."""
    root = tmp_path_factory.mktemp("whole")
    return {ranks: Ranks(root / str(ranks), ranks, steps=STEPS).done().root for ranks in (1, 2)}


@pytest.mark.parametrize(("world_size", "told"), [(1, [0]), (2, [1])])
def test_a_signal_to_any_worker_loses_no_step(
    whole: dict[int, Path], tmp_path: Path, world_size: int, told: list[int]
) -> None:
    run = Ranks(tmp_path / "run", world_size, steps=STEPS, fault=SLOWLY, callbacks={"checkpoint": {"every": 1000}})
    run.reached(5)
    for rank in told:
        run.send(rank, signal.SIGTERM)
    reached = rows(run.root)[-1]["step"]
    assert run.wait() == [leaving.LEFT] * world_size, run.said()
    step = left_after(run.root)
    assert newest_step(run.root) == step == rows(run.root)[-1]["step"]
    assert reached <= step <= reached + 10, "within a second of steps, most of which the machine had for itself"
    Ranks(run.root, world_size, steps=STEPS).done()
    assert_same_end(whole[world_size], run.root)
    assert [row["step"] for row in rows(run.root)] == list(range(1, STEPS + 1))


def test_a_request_in_the_folder_is_heard_and_a_saved_step_is_not_saved_again(tmp_path: Path) -> None:
    run = Ranks(tmp_path / "run", 2, steps=STEPS, fault=SLOWLY, callbacks={"checkpoint": {"every": 1, "keep": 100}})
    run.reached(3)
    leaving.ask(run.root, "the night is over")
    assert run.wait() == [leaving.LEFT] * 2, run.said()
    step = left_after(run.root)
    (row,) = incidents.read(run.root)
    assert "the night is over" in row["message"]
    folders = sorted(path.name for path in (run.root / "checkpoints").glob("step_*"))
    assert folders == [f"step_{n:08d}" for n in range(1, step + 1)], "each once, and nothing beside them"
    assert final(run.root)[1]["step"] == step


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    run = Ranks(tmp_path / "run", steps=STEPS, fault="step:6,phase:data,action:sleep,seconds:600")
    run.reached(6)
    run.send(0, signal.SIGTERM)
    time.sleep(Terminations.same_s + 0.5)
    assert run.processes[0].is_alive(), "the step that it is in is not over"
    run.send(0, signal.SIGTERM)
    assert run.wait(30) == [leaving.LEFT]
    assert newest_step(run.root) == 4


def test_signals_are_heard_from_a_thread_beside_another_owner() -> None:
    """As in a Ray worker: the main thread and its handler are another's, and sit in a native call."""
    code = """
import os, signal, sys, threading, time
from nexus_scale.callbacks.preemption import Terminations
heard = threading.Event()
theirs = []
signal.signal(signal.SIGTERM, lambda *_: theirs.append(1))
def work():
    terminations = Terminations(heard.set)
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard.wait(30) and not theirs
    terminations.close()
    os.kill(os.getpid(), signal.SIGTERM)
thread = threading.Thread(target=work)
thread.start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
thread.join()
print(theirs)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[1]\n"), done.stderr


def test_the_folder_is_looked_at_while_nothing_is_signalled() -> None:
    looked = threading.Event()
    terminations = Terminations(os.abort, every=looked.set, seconds=0.01)
    assert looked.wait(30)
    terminations.close()
