"""Euler's method in sigma / alpha, which is DDIM's step, with churn where it is asked for.

Without churn it differs from `ddim` in the size of the first noise where a chain does not end in noise alone, and from `ode` in its grid.

Source: Karras et al. 2022, algorithm 2 without the correction; k-diffusion, sample_euler.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nexus_scale.samplers.churn import Churned
from nexus_scale.samplers.grid import Point, Walk


@dataclass(kw_only=True)
class Euler(Churned):
    """First order."""

    def step(self, walk: Walk, y: Tensor, here: Point, there: Point) -> tuple[Tensor, Tensor]:
        x0, eps = walk.predict(here.alpha * y, here)
        return y + (there.ratio - here.ratio) * eps, x0
