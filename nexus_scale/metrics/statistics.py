"""How sure a figure is: its interval by resampling, the difference of two with theirs, and the correction for several at once.

Means over samples are bootstrapped (Efron 1979). Figures of whole sets, such as a Fréchet distance, a kernel distance or recall, are
computed anew of random halves of the sets, without replacement (the delete-half jackknife: Shao & Wu 1989, "A general theory for jackknife
variance estimation"): the deviation among halves is that of the figure itself, since a half has twice its variance and shares half of it
with the whole. The bootstrap's repeated rows would make nearest neighbours of themselves, and raise a Fréchet distance.

Intervals are Student's around the figure, since its deviation is itself estimated, from so many values or halves: by normal ones of 50
halves the surest of eight equal figures is called different 1.4 times as often as promised. What a set's figure owes to the number of its
samples is no part of them: compare figures of equal numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

Measure = Callable[[Tensor, Tensor], Mapping[str, float]]
"""Figures of a set (M, D) held against a reference (N, D), by name; the order of rows does not count."""

AT_ONCE = 1 << 22
"""Values that are drawn together."""


@dataclass(frozen=True)
class Estimate:
    """A figure, or the difference of two, with its standard `error`, known with so many degrees of `freedom`, and interval."""

    value: float
    error: float
    low: float
    high: float
    freedom: float = math.inf

    @property
    def p(self) -> float:
        """The probability of a value so far from 0, either way, where the truth is 0."""
        if not self.error:
            return float(self.value == 0)
        return math.erfc(as_normal(abs(self.value) / self.error, self.freedom) / math.sqrt(2))


def as_normal(t: float, freedom: float) -> float:
    """The normal deviate as unlikely as Student's `t` >= 0. Source: Wallace 1959; below 1 % off from 5 degrees of freedom on."""
    if math.isinf(freedom):
        return t
    return math.sqrt(freedom * math.log1p(t * t / freedom)) * (8 * freedom + 1) / (8 * freedom + 3)


def as_students(normal: float, freedom: float) -> float:
    """The inverse of `as_normal`."""
    if math.isinf(freedom):
        return normal
    return math.sqrt(freedom * math.expm1((normal * (8 * freedom + 3) / (8 * freedom + 1)) ** 2 / freedom))


@dataclass(frozen=True)
class Resampling:
    """How figures are resampled: `level` of the intervals, numbers of bootstrap samples and of halves, `seed`."""

    level: float = 0.95
    bootstraps: int = 1000
    halves: int = 100
    seed: int = 0

    def mean(self, values: Tensor) -> Estimate:
        """The mean of the values (N,) that are finite, over samples drawn anew from these.

        Raises:
            ValueError: fewer than two.
        """
        values = values.detach().cpu().double()
        values = values[values.isfinite()]
        if len(values) < 2:
            raise ValueError(f"statistics: got {len(values)} finite values; expected at least 2")
        generator = torch.Generator().manual_seed(self.seed)
        means, left = [], self.bootstraps
        while left:
            rows = min(left, max(1, AT_ONCE // len(values)))
            drawn = torch.randint(len(values), (rows, len(values)), generator=generator)
            means.append(values[drawn].mean(1))
            left -= rows
        count = len(values)  # what is drawn anew deviates from its own mean, by a little less than from the true one
        error = float(torch.cat(means).std()) * math.sqrt(count / (count - 1))
        return self._estimate(float(values.mean()), error, count - 1)

    def mean_difference(self, a: Tensor, b: Tensor, paired: bool) -> Estimate:
        """mean(b) - mean(a); `paired`: rows belong together, (N,) each, and are drawn anew together. A pair of which one is not finite is
        left out.

        Raises:
            ValueError: paired values of other numbers, or fewer than two.
        """
        if paired:
            if a.shape != b.shape:
                raise ValueError(
                    f"statistics: got {tuple(a.shape)} and {tuple(b.shape)} paired values; expected as many"
                )
            return self.mean(b.double() - a.double())
        first, second = self.mean(a), Resampling(self.level, self.bootstraps, self.halves, self.seed + 1).mean(b)
        error = math.hypot(first.error, second.error)
        parts = sum(one.error**4 / one.freedom for one in (first, second))  # Welch 1947
        return self._estimate(second.value - first.value, error, error**4 / parts if parts else math.inf)

    def figures(self, measure: Measure, x: Tensor, reference: Tensor) -> dict[str, Estimate]:
        """`measure(x, reference)`, over random halves of both."""
        halves = [
            measure(x[self._half(len(x), number, "x")], reference[self._half(len(reference), number, "reference")])
            for number in range(self.halves)
        ]
        return self._all_around(measure(x, reference), halves)

    def differences(
        self, measure: Measure, a: Tensor, b: Tensor, reference: Tensor, paired: bool
    ) -> dict[str, Estimate]:
        """measure(b, reference) - measure(a, reference), over random halves of all three: of a reference that is one for both, and of
        `paired` rows (the same prompts and seeds) that are one choice for both.

        Raises:
            ValueError: paired rows of other numbers, or fewer than four of a set.
        """
        if paired and len(a) != len(b):
            raise ValueError(f"statistics: got {len(a)} and {len(b)} paired rows; expected as many")
        halves = []
        for number in range(self.halves):
            of_reference = reference[self._half(len(reference), number, "reference")]
            first = self._half(len(a), number, "x")
            second = first if paired else self._half(len(b), number, "other")
            halves.append(_less(measure(b[second], of_reference), measure(a[first], of_reference)))
        return self._all_around(_less(measure(b, reference), measure(a, reference)), halves)

    def _half(self, count: int, number: int, what: str) -> Tensor:
        """Which rows a half has: the same for the same numbers."""
        if count < 4:
            raise ValueError(f"statistics: got a set of {count} samples; expected at least 4")
        seed = (self.seed * 1_000_003 + number * 3 + ("x", "other", "reference").index(what)) % 2**63
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: count // 2].sort().values

    def _all_around(self, values: Mapping[str, float], resampled: Sequence[Mapping[str, float]]) -> dict[str, Estimate]:
        return {
            name: self._around(value, torch.tensor([one[name] for one in resampled], dtype=torch.float64))
            for name, value in values.items()
        }

    def _around(self, value: float, resampled: Tensor) -> Estimate:
        return self._estimate(value, float(resampled.std()), len(resampled) - 1)

    def _estimate(self, value: float, error: float, freedom: float) -> Estimate:
        reach = as_students(NormalDist().inv_cdf(0.5 + self.level / 2), freedom) * error
        return Estimate(value, error, value - reach, value + reach, freedom)


def by_chance(hits: int, count: int, chance: float) -> float:
    """The probability of at least so many hits of `count`, each by `chance`: the upper tail of a binomial."""
    return math.fsum(math.comb(count, k) * chance**k * (1 - chance) ** (count - k) for k in range(hits, count + 1))


def _less(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: value - other[name] for name, value in one.items()}


def holm(p: Sequence[float]) -> list[float]:
    """Probabilities corrected for their number, in the given order: below 0.05 where the chance that any of them is there by chance is.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure".
    """
    corrected, highest = [0.0] * len(p), 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[place]))
        corrected[place] = highest
    return corrected
