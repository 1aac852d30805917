"""Intervals hold what they promise: no more false differences than 5 in 100 on equal sets, real ones found, pairs told apart sooner."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nexus_scale.metrics.frechet import frechet_distance
from nexus_scale.metrics.statistics import Estimate, Resampling, as_normal, as_students, holm

REPEATS = 40


def measures(x: Tensor, y: Tensor) -> dict[str, float]:
    """A Fréchet distance, and recall: the share of y within the third-nearest neighbour's distance of some x."""
    radius = torch.cdist(x, x).kthvalue(4, dim=1).values
    return {"distance": frechet_distance(x, y), "recall": float((torch.cdist(y, x) <= radius).any(1).double().mean())}


def of_one_pool(shift: float = 0.0) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Two sets and a reference, 90 rows each, drawn apart from one pool, the second moved by `shift`, for each repeat."""
    pool = torch.randn(2000, 8, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.3, 2, 8)
    orders = [torch.randperm(2000, generator=torch.Generator().manual_seed(repeat)) for repeat in range(REPEATS)]
    return [(pool[o[:90]], pool[o[90:180]] + shift, pool[o[180:270]]) for o in orders]


def claimed(found: Estimate, share: float = 1.0) -> bool:
    """Whether the interval, or one so much narrower, leaves zero out."""
    return abs(found.value) > share * (found.high - found.value)


def test_equal_sets_are_called_different_by_chance_alone() -> None:
    """Subsamples of one pool: at most 5 of 100 differences are claimed. Intervals a third as wide would claim more."""
    found = [
        Resampling(halves=16, seed=n).differences(measures, a, b, ref, paired=False)
        for n, (a, b, ref) in enumerate(of_one_pool())
    ]
    for name in ("distance", "recall"):
        assert sum(claimed(one[name]) for one in found) <= 0.05 * REPEATS
        assert sum(claimed(one[name], 1 / 3) for one in found) > 0.05 * REPEATS, "the bound can be broken"


def test_sets_that_differ_are_told_apart() -> None:
    found = [
        Resampling(halves=16, seed=n).differences(measures, a, b, ref, paired=False)["distance"]
        for n, (a, b, ref) in enumerate(of_one_pool(shift=0.7))
    ]
    assert sum(claimed(one) and one.value > 0 for one in found) >= 0.9 * REPEATS


def test_means_of_equal_values_are_called_different_as_often_as_promised() -> None:
    pairs = [torch.randn(2, 50, generator=torch.Generator().manual_seed(n)) for n in range(200)]
    found = [Resampling(seed=n).mean_difference(a, b, paired=n % 2 == 0) for n, (a, b) in enumerate(pairs)]
    assert 2 <= sum(map(claimed, found)) <= 20, "10 of 200 in the mean"


def test_errors_are_those_of_a_mean_and_of_a_distance() -> None:
    x = torch.randn(400, generator=torch.Generator().manual_seed(3)).double()
    found = Resampling().mean(torch.cat([x, torch.tensor([math.inf])]))
    assert found.value == pytest.approx(float(x.mean())) and found.error == pytest.approx(float(x.std()) / 20, rel=0.1)
    assert found.high - found.value == pytest.approx(1.966 * found.error, rel=1e-3)
    # of a mean, halves say what the bootstrap does
    halves = Resampling(halves=400).figures(lambda rows, _: {"mean": float(rows.mean())}, x[:, None], x[:, None])
    assert halves["mean"].error == pytest.approx(found.error, rel=0.15)
    with pytest.raises(ValueError, match="at least 2"):
        Resampling().mean(torch.ones(1))
    with pytest.raises(ValueError, match="at least 4"):
        Resampling().figures(measures, torch.ones(3, 2), torch.ones(9, 2))


def test_intervals_are_students() -> None:
    """Quantiles of published tables, for 5 %."""
    for freedom, quantile in ((5, 2.571), (10, 2.228), (49, 2.010), (199, 1.972)):
        assert as_students(1.95996, freedom) == pytest.approx(quantile, rel=0.003)
        assert Estimate(quantile, 1.0, 0, 0, freedom).p == pytest.approx(0.05, rel=0.02)
        assert as_normal(as_students(3.0, freedom), freedom) == pytest.approx(3.0)
    few, many = (Resampling(halves=n).figures(measures, torch.eye(12), torch.eye(12) + 1)["distance"] for n in (5, 200))
    assert (few.high - few.value) / few.error > 2.7 > 2 > (many.high - many.value) / many.error


def test_pairs_show_a_small_difference_that_their_means_do_not() -> None:
    """The same prompts and seeds: what all of them share is no part of the difference."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(60, 4, generator=generator)
    b, reference = (
        a + 0.1 + 0.05 * torch.randn(60, 4, generator=generator),
        torch.randn(200, 4, generator=generator) + 2,
    )
    rows = Resampling()
    assert claimed(rows.mean_difference(a[:, 0], b[:, 0], paired=True))
    assert not claimed(rows.mean_difference(a[:, 0], b[:, 0], paired=False))
    together = rows.differences(measures, a, b, reference, paired=True)["distance"]
    apart = rows.differences(measures, a, b, reference, paired=False)["distance"]
    assert claimed(together) and not claimed(apart) and together.value == pytest.approx(apart.value)
    with pytest.raises(ValueError, match="as many"):
        rows.mean_difference(a[:9, 0], b[:, 0], paired=True)


def test_several_at_once_are_corrected_for_their_number() -> None:
    """The example of Holm's method in Wikipedia's article on it: 0.01, 0.04, 0.03, 0.005."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]
    assert Estimate(1.96, 1.0, 0, 0).p == pytest.approx(0.05, abs=1e-4) and Estimate(0.0, 0.0, 0, 0).p == 1
