"""The sampler of latent consistency models: each answer is the data, noised again to the next time.

Source: Luo et al. 2023, "Latent Consistency Models", algorithm 3; the boundary's scaling is that of its code.
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
from nexus_scale.processes.paths import Path
from nexus_scale.samplers.grid import NoiseLevel, Steps, Stepwise, Walk, chain_of

SIGMA_DATA = 0.5


@dataclass(kw_only=True)
class LCM(Stepwise):
    """One evaluation a step and fresh noise between, for networks that were distilled to jump to the data.

    Attributes:
        original_steps: of the sampler that was distilled; the walk takes every so many of its times, and not `spacing`.
        timestep_scaling: how fast the share of x_t in the answer falls with the step of the chain; 0: the answer is x0.
    """

    steps: Steps = 4
    original_steps: Annotated[int, Field(ge=1, le=10_000)] = 50
    timestep_scaling: NoiseLevel = 10.0

    chain_alone = True

    def spaced(self, path: Path) -> list[float]:
        return distilled_times(self.steps, self.original_steps, chain_of(path))

    def solve(self, walk: Walk, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for i, (here, there) in enumerate(walk.pairs):
            x0, _ = walk.predict(x, here)
            scaled = (here.t * chain_of(walk.path) - 1) * self.timestep_scaling
            if self.timestep_scaling > 0:
                total = scaled**2 + SIGMA_DATA**2
                x0 = scaled / math.sqrt(total) * x0 + SIGMA_DATA**2 / total * x
            x = x0
            if i + 1 < walk.steps:
                x = there.alpha * x0 + there.sigma * walk.noise(f"noise_{i}", x)
            yield x, x0


def distilled_times(steps: int, original: int, chain: int) -> list[float]:
    """`steps` of the `original` times of a chain that a network was distilled at, from noise to data, evenly spaced among them.

    Raises:
        UserError: more times than there are.
    """
    if not 1 <= steps <= original <= chain:
        raise UserError(
            f"sample.steps: got {steps} of original_steps {original} on a chain of {chain}; expected steps <= original_steps <= chain"
        )
    places = np.floor(np.linspace(0, original, num=steps, endpoint=False))
    return [float((original - place) * (chain // original) / chain) for place in places]
