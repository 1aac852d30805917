"""The midpoint method in sigma / alpha, at the geometric mean of two levels: DPM-Solver-2.

Source: Karras et al. 2022, appendix D; Lu et al. 2022, algorithm 1; k-diffusion, sample_dpm_2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from nexus_scale.samplers.churn import Churned
from nexus_scale.samplers.grid import Point, Walk


@dataclass(kw_only=True)
class Midpoint(Churned):
    """Second order: a step with the slope half-way."""

    def step(self, walk: Walk, y: Tensor, here: Point, there: Point) -> tuple[Tensor, Tensor]:
        x0, slope = walk.predict(here.alpha * y, here)
        if there.sigma > 0:
            half = walk.at_ratio(math.sqrt(here.ratio * there.ratio))
            _, slope = walk.predict(half.alpha * (y + (half.ratio - here.ratio) * slope), half)
        return y + (there.ratio - here.ratio) * slope, x0
