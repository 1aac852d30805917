"""Two workers on two machines whose network grows slow, loses frames, or is cut: training goes on, or ends by its deadline."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from nexus_scale.callbacks.watchdog import DEADLINES
from nexus_scale.io import incidents
from nexus_scale.orchestration.supervise import failure_of, last_line
from tests.links import link, missing
from tests.training_ranks import Ranks, assert_same_end, newest_step, rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=f"a network of two machines {missing()}")]

STEPS = 40
COLLECTIVE_S = 8.0
WATCHED = {"watchdog": {"beat_seconds": 0.2, "deadlines": dict.fromkeys(DEADLINES, 20.0)}}
"""Tight deadlines in all of these tests, so that a false alarm would end the run."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training on one machine."""
    return Ranks(tmp_path_factory.mktemp("whole") / "run", 2, steps=STEPS).done().root


def test_a_slow_link_that_loses_frames_costs_time_and_nothing_else(whole: Path, tmp_path: Path) -> None:
    with link(tmp_path / "link") as between:
        run = Ranks(tmp_path / "run", 2, steps=STEPS, link=between, collective_timeout_s=20.0, callbacks=WATCHED)
        try:
            run.reached(2)
            between.becomes(delay_s=0.2, loss=0.01, seed=7)
            slow, before = time.monotonic(), len(rows(run.root))
            run.reached(before + 3)
            seconds, passed = time.monotonic() - slow, len(rows(run.root)) - before
            state = between.state()
            between.becomes()
            run.done()
        finally:
            run.kill()
    print(f"{passed} steps in {seconds:.1f} s; {state['carried']} frames carried, {state['lost']} lost")
    assert state["lost"] > 0
    assert seconds / passed > 1, "a step has several collectives, and each waits for the link"
    assert not any(Path(namespace).exists() for namespace in between.namespaces), (
        "the machines are gone with their link"
    )
    kinds = {row["kind"] for row in incidents.read(run.root)}
    assert kinds <= {"straggler"}, "nobody is killed for the network"
    assert_same_end(whole, run.root)


def test_a_partition_ends_both_workers_by_the_deadline_of_collectives(whole: Path, tmp_path: Path) -> None:
    with link(tmp_path / "link") as between:
        run = Ranks(
            tmp_path / "run", 2, steps=STEPS, link=between, collective_timeout_s=COLLECTIVE_S, callbacks=WATCHED
        )
        try:
            run.reached(6)
            between.becomes(loss=1.0)
            cut = time.monotonic()
            codes = run.wait(COLLECTIVE_S + 15)
            seconds = time.monotonic() - cut
        finally:
            run.kill()
        print(f"both had ended {seconds:.1f} s after the cut")
        assert codes == [1, 1], run.said()
        assert COLLECTIVE_S - 1 < seconds < COLLECTIVE_S + 5
        errors = {rank: ("RuntimeError", run.log(rank).read_text(), False) for rank in (0, 1)}
        for _, text, _ in errors.values():
            assert re.search(f"Timed out waiting {COLLECTIVE_S * 1000:.0f}ms for (recv|send)", last_line(text)), text
        assert failure_of(errors).message.startswith("rank 0 waited in vain for another: ")
        assert 0 < newest_step(run.root) < STEPS
        between.becomes()
        Ranks(run.root, 2, steps=STEPS, link=between, collective_timeout_s=COLLECTIVE_S, callbacks=WATCHED).done()
    assert_same_end(whole, run.root)
