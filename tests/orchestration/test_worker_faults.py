"""Faults in the midst of a real training: the stages strike where they are asked to, and what goes on afterwards is the same run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.training_ranks import Ranks, assert_same_end, newest_step, rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps in one process that nothing befell."""
    return Ranks(tmp_path_factory.mktemp("whole") / "run", steps=8).done().root


@pytest.mark.parametrize("stage", ["data", "forward", "backward", "step", "save"])
def test_a_kill_in_any_stage_changes_no_bit(whole: Path, tmp_path: Path, stage: str) -> None:
    step = 8 if stage == "save" else 6
    killed = Ranks(tmp_path / "run", steps=8, fault=f"step:{step},phase:{stage},action:SIGKILL")
    assert killed.wait() == [-signal.SIGKILL], killed.said()
    assert newest_step(tmp_path / "run") in (0, 4), "the write behind may not have come to its end"
    Ranks(tmp_path / "run", steps=8).done()
    assert_same_end(whole, tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 9)), "each step has one row"


def test_a_kill_while_the_run_is_built_leaves_nothing_behind(whole: Path, tmp_path: Path) -> None:
    killed = Ranks(tmp_path / "run", steps=8, fault="phase:start,action:SIGKILL")
    assert killed.wait() == [-signal.SIGKILL]
    Ranks(tmp_path / "run", steps=8).done()
    assert_same_end(whole, tmp_path / "run")
