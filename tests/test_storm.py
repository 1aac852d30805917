"""The account of a storm of kills, and a short one."""

from __future__ import annotations

import pytest

from nexus_scale.bench import measure
from nexus_scale.bench.storm import EVERY, Account
from nexus_scale.contracts import UserError


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
    with pytest.raises(UserError, match="bench loader: has no --minutes"):
        measure("loader", minutes=1.0)


@pytest.mark.slow
def test_a_short_storm_is_survived() -> None:
    from nexus_scale.bench.storm import run

    result = run(minutes=2.0, window_minutes=0.5)
    assert result["kills"] >= 1 and result["steps"] >= 2 * EVERY
    assert 0 < result["effective_training_time"] < 1
    assert result["recovery_s"]["worst"] > 0
    assert result["lost_steps"]["worst"] < 2 * EVERY
