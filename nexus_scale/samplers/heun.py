"""Heun's method in sigma / alpha with churn: EDM's sampler.

Source: Karras et al. 2022, algorithm 2; k-diffusion, sample_heun.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nexus_scale.samplers.churn import Churned
from nexus_scale.samplers.grid import Point, Walk


@dataclass(kw_only=True)
class Heun(Churned):
    """Second order: a step with the mean of the slopes at its beginning and at its end."""

    def step(self, walk: Walk, y: Tensor, here: Point, there: Point) -> tuple[Tensor, Tensor]:
        return heun_step(walk, y, here, there)


def heun_step(walk: Walk, y: Tensor, here: Point, there: Point) -> tuple[Tensor, Tensor]:
    """y at `there`, and x0 at `here`; Euler's step to the data, where eps is undetermined."""
    x0, slope = walk.predict(here.alpha * y, here)
    ahead = y + (there.ratio - here.ratio) * slope
    if there.sigma > 0:
        _, after = walk.predict(there.alpha * ahead, there)
        ahead = y + (there.ratio - here.ratio) * (slope + after) / 2
    return ahead, x0
