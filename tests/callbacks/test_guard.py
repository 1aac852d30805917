"""What is not finite is left out and counted; what keeps being so is gone back from and passed over, for good."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale.callbacks.guard import Guard, Losses, Spike
from nexus_scale.config import registry
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.io import incidents
from nexus_scale.run.skipped import SkippedRange, all_skipped, skip, skipped_ranges
from tests.training_ranks import Ranks, assert_same_end, final, newest_step, rows

STEPS = 14
GUARDED = {"guard": {"patience": 2}}
BAD = {"0": [8, 9]}


def kinds(root: Path) -> list[str]:
    return [row["kind"] for row in incidents.read(root)]


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose global batches 8 and 9 are not finite: it goes back to step 8 and past them."""
    return Ranks(tmp_path_factory.mktemp("guard") / "run", steps=STEPS, poison=BAD, callbacks=GUARDED).done().root


def test_batches_that_keep_being_bad_are_gone_back_from_and_passed_over(rolled_back: Path) -> None:
    assert kinds(rolled_back) == ["nonfinite", "nonfinite", "rolled_back"]
    first, second, back = incidents.read(rolled_back)
    assert (first["step"], first["draws"], second["draws"], first["ranks"]) == (9, [8, 8], [9, 9], [0])
    assert len(first["samples"]["0"]) == 4
    assert (back["step"], back["back_to"], back["passed_over"]) == (10, 8, [8, 9])
    tensors, progress = final(rolled_back)
    assert progress == {"step": STEPS, "draws": STEPS + 2, "skipped": [[8, 9]]}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values() if tensor.is_floating_point())
    assert [row["step"] for row in rows(rolled_back)] == list(range(1, STEPS + 1))
    assert all(row["skipped"] == 0 for row in rows(rolled_back))


@pytest.mark.parametrize("fault", ["step:10,phase:step", "step:13,phase:forward"])
def test_killed_before_or_after_the_next_save_it_still_passes_them_over(
    rolled_back: Path, tmp_path: Path, fault: str
) -> None:
    settings = {"steps": STEPS, "poison": BAD, "callbacks": GUARDED}
    killed = Ranks(tmp_path / "run", fault=f"{fault},action:SIGKILL", **settings)
    assert killed.wait() == [-signal.SIGKILL], killed.said()
    assert kinds(killed.root)[-1] == "rolled_back"
    Ranks(tmp_path / "run", **settings).done()
    assert kinds(killed.root).count("rolled_back") == 1, "what was decided is not decided again"
    assert_same_end(rolled_back, killed.root)


def test_read_a_step_late_the_run_is_the_same_and_no_row_is_lost(rolled_back: Path, tmp_path: Path) -> None:
    """As on a GPU, with a SIGTERM in between: what bad steps are judged late, before a save at once."""
    settings: dict[str, Any] = {"steps": STEPS, "poison": BAD, "callbacks": GUARDED, "late": True}
    left = Ranks(tmp_path / "run", fault="step:5,phase:step,action:SIGTERM", **settings)
    assert left.wait() == [75], left.said()
    done = newest_step(left.root)
    assert [row["step"] for row in rows(left.root)] == list(range(1, done + 1)), "also the last row before leaving"
    assert done in (6, 7)
    Ranks(tmp_path / "run", **settings).done()
    first, second, back = [row for row in incidents.read(left.root) if row["kind"] in ("nonfinite", "rolled_back")]
    assert (first["step"], second["step"], second["draws"]) == (9, 10, [9, 9])
    assert (back["step"], back["back_to"], back["passed_over"]) == (11, 8, [8, 9]), "one step later than on a CPU"
    assert_same_end(rolled_back, left.root)
    numbers = [{key: row[key] for key in ("step", "loss", "grad_norm", "skipped")} for row in rows(left.root)]
    assert numbers == [{key: row[key] for key in numbers[0]} for row in rows(rolled_back)]
    assert all("host_wait" in row for row in rows(left.root) if "data_wait" in row)


def test_a_save_has_every_step_judged_first(tmp_path: Path) -> None:
    """Read late, a save at the second bad step would otherwise be the newest checkpoint to go back to."""
    saving = {**GUARDED, "checkpoint": {"every": 5}}
    run = Ranks(tmp_path / "run", steps=12, poison=BAD, callbacks=saving, late=True).done()
    (back,) = [row for row in incidents.read(run.root) if row["kind"] == "rolled_back"]
    assert (back["step"], back["back_to"]) == (10, 5)


def test_one_rank_sees_it_and_all_ranks_skip(tmp_path: Path) -> None:
    """Read late, as on a GPU: ranks talk about a bad step when the next one is under way."""
    run = Ranks(tmp_path / "run", 2, steps=4, poison={"1": [1]}, late=True).done()
    assert [row["skipped"] for row in rows(run.root)] == [0, 1, 0, 0]
    (incident,) = incidents.read(run.root)
    assert (incident["kind"], incident["step"], incident["ranks"]) == ("nonfinite", 2, [1])
    assert list(incident["samples"]) == ["1"]


def test_a_run_that_keeps_going_back_ends_and_says_so(tmp_path: Path) -> None:
    run = Ranks(
        tmp_path / "run",
        steps=40,
        poison={"0": list(range(8, 500))},
        callbacks={"guard": {"patience": 2, "rollbacks": 2}},
    )
    assert run.wait() == [1]
    assert "has already rolled back 2 times within 1000 steps (callbacks.guard.rollbacks: 2)" in run.said()
    assert kinds(run.root).count("rolled_back") == 2
    assert [(one.first, one.last) for one in skipped_ranges(RunFolder(run.root))] == [(8, 9), (10, 13)]


def test_a_spike_rolls_back_to_before_it_and_passes_over_it(tmp_path: Path) -> None:
    spike = {
        "action": "rollback", "sigmas": 3, "window": 20, "in_a_row": 1, "steps_back": 2, "passes_over": 6
    }  # fmt: skip
    settings = {"steps": 40, "callbacks": {"guard": {"spike": spike}, "checkpoint": {"every": 5, "keep": 10}}}
    run = Ranks(tmp_path / "run", louder=[31], **settings).done()
    assert kinds(run.root) == ["spike", "rolled_back"]
    noted, back = incidents.read(run.root)
    assert noted["step"] == 32
    assert noted["loss"] > 3 * noted["usual"]
    assert (back["back_to"], back["passed_over"]) == (25, [29, 34])
    assert final(run.root)[1] == {"step": 40, "draws": 46, "skipped": [[29, 34]]}


# ------------------------------------------------------------------------------------------------ its parts


def judged(trace: list[float], **policy: float) -> list[int]:
    losses = Losses(Spike(**policy))  # type: ignore[arg-type]
    return [begin for step, loss in enumerate(trace, 1) if (begin := losses.judged(step, loss)) is not None]


def test_spikes_of_a_trace_are_found_once_each_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.05 * torch.randn(3000, generator=generator)
    trace = [float(value) for value in 0.3 + torch.linspace(1.0, 0.0, 3000) + noise]
    assert judged(trace) == []
    begins = [700, 1500, 2600]
    for begin in begins:
        for step in range(begin, begin + 12):
            trace[step - 1] += 1.0
    trace[1000] += 5.0  # one step alone is no spike
    trace[1200] = float("nan")  # nor is one that was left out
    assert judged(trace) == begins
    assert judged(trace, in_a_row=1) == [700, 1001, 1500, 2600]


def test_what_is_passed_over_is_kept_and_merged(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert skipped_ranges(run) == []
    for entry in (SkippedRange(10, 8, 9, "a"), SkippedRange(30, 20, 24, "b")):
        skip(run, entry)
    assert all_skipped([(8, 9), (2, 3)], skipped_ranges(run)) == [(2, 3), (8, 9), (20, 24)]


def test_settings_that_cannot_work_are_refused() -> None:
    for arguments, words in (
        ({"patience": 0}, r"guard\.patience: .*; got 0"),
        ({"spike": {"passes_over": 50}}, r"passes_over: got 50; expected at least steps_back \+ in_a_row = 103"),
    ):
        with pytest.raises(UserError, match=words):
            registry.check_arguments(Guard, arguments, "callbacks.guard", frozenset({"run"}))
