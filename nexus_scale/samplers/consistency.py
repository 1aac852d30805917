"""The sampler of consistency models: each answer is the data, noised again to the next level.

Source: Song et al. 2023, "Consistency Models", algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.processes.paths import EDM
from nexus_scale.samplers.grid import EDM_LOW, Steps, Stepwise, Walk


@dataclass(kw_only=True)
class Consistency(Stepwise):
    """One evaluation a step and fresh noise between, for networks whose x0 is a consistency function.

    Attributes:
        scales: how many levels of noise training had; by levels, the walk takes every (scales // steps)th of them from the highest down.
    """

    steps: Steps = 1
    scales: Annotated[int, Field(ge=2, le=100_000)] = 40

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps > self.scales:
            raise UserError(f"sample.steps: got {self.steps}; expected at most scales, {self.scales}")

    def places(self) -> np.ndarray:
        return np.arange(self.steps) * (self.scales // self.steps) / (self.scales - 1)

    def solve(self, walk: Walk, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        # the answer is as noisy as the lowest level of training
        low = (self.lowest or EDM_LOW) if isinstance(walk.path, EDM) else 0.0
        for i, (here, there) in enumerate(walk.pairs):
            x0, _ = walk.predict(x, here)
            x = x0
            if i + 1 < walk.steps:
                x = there.alpha * x0 + math.sqrt(there.sigma**2 - low**2) * walk.noise(f"noise_{i}", x)
            yield x, x0
