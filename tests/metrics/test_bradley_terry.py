"""Scores of pairwise choices, agreement of raters and loudness of sounds, each against a figure that others published."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from nexus_scale.metrics.agreement import alpha_of_pairs, krippendorff_alpha
from nexus_scale.metrics.bradley_terry import strengths
from nexus_scale.metrics.loudness import loudness_lufs

GOLDEN = Path(__file__).parents[1] / "golden"


def test_citations_of_journals_as_bradleyterry2_has_them() -> None:
    """R's BradleyTerry2, `citations`: abilities of Comm Statist, JASA and JRSS-B beside Biometrika (Turner and Firth 2012)."""
    cited = np.array([[714, 730, 498, 221], [33, 425, 68, 17], [320, 813, 1072, 142], [284, 276, 325, 188]])
    scores = strengths(cited, prior=0).scores
    assert scores - scores[0] == pytest.approx([0, -2.94907, -0.47957, 0.26895], abs=2e-5)
    assert scores.sum() == pytest.approx(0, abs=1e-12)


def test_ties_by_davidson() -> None:
    """Of two systems in closed form; of more, what the model expects is what was seen, which is what its maximum means."""
    two = strengths(np.array([[0, 20], [10, 0]]), np.array([[0, 5], [5, 0]]), prior=0)
    assert two.scores[0] - two.scores[1] == pytest.approx(math.log(2))
    assert two.ties == pytest.approx(math.log(5 / math.sqrt(200)))
    rng = np.random.default_rng(0)
    wins, ties = rng.integers(1, 30, (3, 4, 4)).astype(float), rng.integers(0, 9, (3, 4, 4))
    ties = (ties + ties.swapaxes(1, 2)).astype(float)
    wins[:, range(4), range(4)] = ties[:, range(4), range(4)] = 0
    found = strengths(wins, ties, prior=0)
    s = np.exp(found.scores)
    middle = np.exp(found.ties)[:, None, None] * np.sqrt(s[:, :, None] * s[:, None, :])
    whole = s[:, :, None] + s[:, None, :] + middle
    played = wins + wins.swapaxes(1, 2) + ties
    assert (played * (s[:, :, None] + middle / 2) / whole).sum(2) == pytest.approx((wins + ties / 2).sum(2), rel=1e-6)
    assert (played * middle / whole).sum((1, 2)) == pytest.approx(ties.sum((1, 2)), rel=1e-6)


def test_one_that_always_wins_has_a_score_with_a_prior_and_none_without() -> None:
    always = np.array([[0, 9], [0, 0]])
    assert 1 < strengths(always).scores[0] < 3
    with pytest.raises(ValueError, match="no likeliest scores"):
        strengths(always, prior=0)


def test_krippendorffs_own_example() -> None:
    """Krippendorff (2011), C: four observers, twelve units, nominal, missing data: 0.743."""
    seen = ("1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 .")
    counts = np.zeros((12, 5))
    for observer in seen:
        for unit, value in enumerate(observer.split()):
            if value != ".":
                counts[unit, int(value) - 1] += 1
    assert krippendorff_alpha(counts) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(np.array([[3, 0], [0, 3]])) == 1
    assert math.isnan(krippendorff_alpha(np.array([[1, 0]]))) and math.isnan(krippendorff_alpha(np.array([[3, 0]])))
    chance = np.random.default_rng(0).multinomial(4, [0.2, 0.3, 0.5], 4000)
    assert abs(krippendorff_alpha(chance)) < 0.02


def test_agreement_about_pairs_as_the_package_krippendorff_has_it() -> None:
    """Whichever is called the first of a pair."""
    golden = json.loads((GOLDEN / "agreement.json").read_text())
    for one in golden:
        counts = np.array(one["counts"])
        assert alpha_of_pairs(counts) == pytest.approx(one["alpha"], abs=1e-12)
        counts[::2] = counts[::2, [1, 0, 2]]
        assert alpha_of_pairs(counts) == pytest.approx(one["alpha"], abs=1e-12)


@pytest.mark.parametrize("rate", [48_000, 44_100, 16_000])
def test_loudness_of_the_recommendation(rate: int) -> None:
    """ITU-R BS.1770-4: a full-scale sine of 997 Hz in one channel is -3.01 LUFS; EBU Tech 3341, test 3: what is 10 LU below is gated."""
    tone = np.sin(2 * np.pi * 997 * np.arange(3 * rate) / rate)[None]
    assert loudness_lufs(tone, rate) == pytest.approx(-3.01, abs=0.05)
    assert loudness_lufs(np.concatenate([tone, tone]) / 10, rate) == pytest.approx(-20, abs=0.05)
    assert loudness_lufs(np.concatenate([tone, tone / 100, tone * 0], 1), rate) == pytest.approx(-3.01, abs=0.3)
    assert loudness_lufs(tone * 0, rate) == -math.inf == loudness_lufs(tone[:, :0], rate)
    assert loudness_lufs(tone[:, : rate // 10], rate) == pytest.approx(-3.01, abs=0.3)
