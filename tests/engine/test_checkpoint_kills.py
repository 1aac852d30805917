"""F3: SIGKILL at any moment loses no committed checkpoint, leaves no torn one with a checkpoint's name, and changes no bit.

NEXUS_KILLS=200 kills so many times at random (slow); CI's sample is every phase of a save on every rank that has it.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.checkpoint_victims import finish, live, strike_after

KILLS = int(os.environ.get("NEXUS_KILLS", "0"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> str:
    return finish(tmp_path_factory.mktemp("unbroken"), 0)


PHASES = [
    *((phase, rank) for phase in ("save_begin", "save_mid", "save_between") for rank in (0, 1)),
    ("save_commit", 0),
    ("save_prune", 0),
]


@pytest.mark.parametrize(("phase", "rank"), PHASES)
def test_a_kill_in_any_phase_of_a_save(tmp_path: Path, unbroken: str, phase: str, rank: int) -> None:
    fault = f"rank:{rank},step:7,phase:{phase},action:SIGKILL,once:{tmp_path / 'struck'}"
    life = live(tmp_path, 1, fault=fault, settled=phase == "save_prune")
    assert (tmp_path / "struck").exists()
    assert not life.ended
    assert finish(tmp_path, 2) == unbroken


def test_all_ranks_at_once_and_a_kill_of_the_run_that_resumed(tmp_path: Path, unbroken: str) -> None:
    both = "; ".join(f"rank:{rank},step:{5 + rank},phase:save_mid,action:SIGKILL" for rank in (0, 1))
    assert not live(tmp_path, 1, fault=both).ended
    again = "step:8,phase:save_between,action:SIGKILL"
    assert not live(tmp_path, 2, fault=again).ended
    assert finish(tmp_path, 3) == unbroken


@pytest.mark.slow
@pytest.mark.skipif(not KILLS, reason="NEXUS_KILLS is not set: 200 kills take some minutes")
def test_kills_at_random_times(tmp_path: Path, unbroken: str) -> None:
    dice = random.Random(0)
    killed = within_save = runs = attempt = 0
    while killed < KILLS:
        runs += 1
        run = tmp_path / str(runs)
        run.mkdir()
        while True:
            attempt += 1
            whom = dice.choice([(0,), (1,), (0, 1)])
            life = live(run, attempt, kill=strike_after(run, dice.uniform(0, 0.3), whom))
            if life.ended:
                break
            killed += 1
            within_save += life.within_save
        assert finish(run, attempt + 1) == unbroken
    print(
        f"{killed} kills over {runs} runs, {within_save} of them within a save: nothing lost, nothing torn, same bits"
    )
    assert within_save >= KILLS // 4
