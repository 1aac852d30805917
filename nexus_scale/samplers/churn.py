"""EDM's churn: before a step, a little noise is added, and the step begins at the higher level that x then has.

Source: Karras et al. 2022, algorithm 2.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor

from nexus_scale.processes.paths import EDM
from nexus_scale.samplers.grid import NoiseLevel, Point, Stepwise, Walk

# No `from __future__ import annotations`: see grid.py.


@dataclass(kw_only=True)
class Churned(Stepwise):
    """A solver of dy = eps d(sigma / alpha) for y = x / alpha, with churn.

    Attributes:
        s_churn: in all steps together; 0: none. Each step's level grows by the factor 1 + min(s_churn / steps, sqrt(2) - 1).
        s_tmin, s_tmax: levels sigma / alpha between which noise is added.
        s_noise: its standard deviation, a little above 1 where a network removes too much.
    """

    s_churn: NoiseLevel = 0.0
    s_tmin: NoiseLevel = 0.0
    s_tmax: NoiseLevel = 1e9
    s_noise: NoiseLevel = 1.0

    ends_at_ratio = True

    @property
    def needs_signal(self) -> bool:
        return True

    def step(self, walk: Walk, y: Tensor, here: Point, there: Point) -> tuple[Tensor, Tensor]:
        """y at `there`, and x0 at `here`."""
        raise NotImplementedError

    def solve(self, walk: Walk, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        y = x / walk.points[0].alpha
        for i, (here, there) in enumerate(walk.pairs):
            y, begin = self._churn(walk, y, here, i)
            y, x0 = self.step(walk, y, begin, there)
            yield there.alpha * y, x0

    def _churn(self, walk: Walk, y: Tensor, here: Point, i: int) -> tuple[Tensor, Point]:
        growth = min(self.s_churn / self.steps, math.sqrt(2) - 1)
        if growth <= 0 or not self.s_tmin <= here.ratio <= self.s_tmax:
            return y, here
        begin = raised(walk, here, here.ratio * (1 + growth))
        spread = math.sqrt(max(begin.ratio**2 - here.ratio**2, 0.0)) * self.s_noise
        return y + spread * walk.noise(f"noise_{i}", y), begin


def raised(walk: Walk, here: Point, ratio: float) -> Point:
    """The point of a higher noise level, or `here` where the path ends below it. EDM's path has every level."""
    if isinstance(walk.path, EDM):
        return replace(here, t=ratio, sigma=ratio)
    point = walk.at_ratio(ratio)
    return point if here.ratio < point.ratio < math.inf else here
