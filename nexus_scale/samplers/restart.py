"""Restart: Heun's walk, which goes back up to a noise level and down again several times.

The noise between shrinks the errors that were made before it, and Heun's steps make few new ones.
Source: Xu et al. 2023, "Restart Sampling for Improving Generative Processes", algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.processes.sigmas import find_levels
from nexus_scale.samplers.churn import raised
from nexus_scale.samplers.grid import NoiseLevel, Point, Stepwise, Walk
from nexus_scale.samplers.heun import heun_step


@dataclass(kw_only=True)
class Restart(Stepwise):
    """Second order, with noise from `low` back up to `high` each time.

    The defaults of `low`, `high` and `repeats` are those that AUTOMATIC1111/stable-diffusion-webui takes of itself (at 36 steps and more);
    the paper's differ by data set, with several intervals each. `substeps` is ours.

    Attributes:
        repeats: how often it goes back up; 0 is `heun`.
        substeps: Heun's steps of each way down again.
        low: the walk goes back up from the first of its levels sigma / alpha that is not above this.
        high: the level it goes up to.
    """

    repeats: Annotated[int, Field(ge=0, le=1000)] = 2
    substeps: Annotated[int, Field(ge=1, le=1000)] = 3
    low: NoiseLevel = 0.1
    high: NoiseLevel = 2.0

    ends_at_ratio = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise UserError(f"sample.low: got {self.low}, and high {self.high}; expected low below high")

    @property
    def needs_signal(self) -> bool:
        return True

    def solve(self, walk: Walk, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        y = x / walk.points[0].alpha
        bottom = next((point for point in walk.points[1:-1] if point.ratio <= self.low), None)
        for here, there in walk.pairs:
            y, x0 = heun_step(walk, y, here, there)
            if there is bottom:
                y = self._again(walk, y, there)
            yield there.alpha * y, x0

    def _again(self, walk: Walk, y: Tensor, bottom: Point) -> Tensor:
        top = raised(walk, bottom, self.high)
        places = np.linspace(0, 1, self.substeps + 1)[1:-1]
        between = find_levels("karras").between(bottom.ratio, top.ratio, places)
        way = [top, *(walk.at_ratio(float(ratio)) for ratio in between), bottom]
        for repeat in range(self.repeats):
            y = y + math.sqrt(top.ratio**2 - bottom.ratio**2) * walk.noise(f"restart_{repeat}", y)
            for here, there in pairwise(way):
                y, _ = heun_step(walk, y, here, there)
        return y
