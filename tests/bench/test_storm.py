"""The account of a storm of kills, and a short one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from nexus_scale.bench import measure, storm
from nexus_scale.bench.storm import EVERY, Account
from nexus_scale.contracts import UserError
from nexus_scale.io import leaving

SOON = 165
"""A seed whose first kill is due at once, and whose second is minutes later."""


def test_only_steps_never_done_before_are_productive() -> None:
    account = Account()
    for second, step in enumerate((0, 100, 110, 110, 120)):
        account.see(float(second), 7, step)
    assert account.training and account.furthest == 120 > EVERY
    assert account.productive_s == 3.0, "a second without a step is not"
    account.kill(5.0, 120)
    account.see(5.1, 7, 121)  # the survivor ends its step
    assert not account.training
    for second, step in ((20.0, 100), (21.0, 110), (22.0, 120), (23.0, 125)):
        account.see(second, 8, step)
    assert account.productive_s == 4.0, "neither the recovery nor what was done again"
    assert account.recovered == [16.0] and account.training
    assert account.kills == [(5.0, 120)]


def test_a_benchmark_without_minutes_says_so() -> None:
    with pytest.raises(UserError, match="bench loader: has no option --minutes"):
        measure("loader", minutes=1.0)


@pytest.mark.slow
@pytest.mark.ray
def test_a_short_storm_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One kill and the recovery from it, however long they take here: then the run is asked to leave, and the storm is over."""
    see = Account.see

    def seen(account: Account, *beat: Any) -> None:
        see(account, *beat)
        if account.recovered:
            for run in tmp_path.glob("nexus-storm-*/storm"):
                leaving.ask(run, "one kill is enough")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(Account, "see", seen)
    result = storm.run(minutes=6.0, window_minutes=2.0, seed=SOON)
    assert result["kills"] >= 1 and result["steps"] >= 2 * EVERY
    assert 0 < result["effective_training_time"] < 1
    assert result["recovery_s"]["worst"] > 0
    assert result["lost_steps"]["worst"] < 2 * EVERY
