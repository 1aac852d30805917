"""A slow rank is reported with its stage, soon and once, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from nexus_scale.callbacks.stragglers import Stragglers
from nexus_scale.callbacks.watchdog import StageClock
from nexus_scale.config import registry
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.io import incidents
from tests.training_ranks import Ranks


def test_a_rank_that_sleeps_in_its_forward_is_reported_with_that_stage(tmp_path: Path) -> None:
    slow = "rank:1,phase:forward,action:sleep,seconds:0.25"
    run = Ranks(tmp_path / "run", 2, steps=22, fault=slow, callbacks={"stragglers": {"every": 5}}).done()
    # A busy machine may have made others slow as well.
    slow = [row for row in incidents.read(run.root) if row["kind"] == "straggler"]
    (row,) = [row for row in slow if (row["rank"], row["stage"]) == (1, "forward")]
    assert row["step"] <= 20
    assert row["seconds"] > 0.25 > row["median"]


def straggling(run: RunFolder, times: list[list[float]]) -> Stragglers:
    """Judged by hand: `times` are seconds of data, forward and all stages of one rank each, the same at every look."""
    stragglers = Stragglers(run=run, stage=StageClock())
    for step in (6, 11, 16):
        stragglers._judge(step, [second for rank in times for second in rank])
    return stragglers


@pytest.mark.parametrize(
    ("times", "noted"),
    [
        ([[0.1, 1.0, 5.0]] * 4, []),
        ([[0.1, 1.0, 5.0]] * 3 + [[0.1, 2.0, 5.0]], [(3, "forward")]),
        ([[0.1, 1.0, 5.0]] * 3 + [[0.3, 1.0, 5.0]], []),  # three times as slow, in what is 2 % of the step
        ([[0.1, 1.0, 5.0], [2.0, 1.0, 5.0]], [(1, "data")]),
        ([[0.1, 1.0, 5.0], [2.0, 2.0, 5.0]], [(1, "data"), (1, "forward")]),
    ],
)
def test_who_is_slow_and_in_what(tmp_path: Path, times: list[list[float]], noted: list[tuple[int, str]]) -> None:
    straggling(RunFolder(tmp_path), times)
    assert [(row["rank"], row["stage"]) for row in incidents.read(tmp_path)] == noted, "once each"


def test_a_rank_that_caught_up_and_falls_back_is_noted_again(tmp_path: Path) -> None:
    stragglers = straggling(RunFolder(tmp_path), [[0.1, 1.0, 5.0], [0.1, 2.0, 5.0]])
    stragglers._judge(21, [0.1, 1.0, 5.0] * 2)
    for step in (26, 31):
        stragglers._judge(step, [0.1, 1.0, 5.0, 0.1, 2.0, 5.0])
    assert [row["step"] for row in incidents.read(tmp_path)] == [11, 31]


def test_settings_that_cannot_work_are_refused() -> None:
    for arguments, words in (({"every": 1}, r"stragglers\.every: .*; got 1"), ({"factor": 1}, r"factor: .*; got 1")):
        with pytest.raises(UserError, match=words):
            registry.check_arguments(Stragglers, arguments, "callbacks.stragglers", frozenset({"run", "stage"}))
