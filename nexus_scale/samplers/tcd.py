"""The sampler of trajectory consistency distillation: a jump to a time s below the next, and noise back up to it.

Source: Zheng et al. 2024, "Trajectory Consistency Distillation", algorithm 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from nexus_scale.processes.paths import Path
from nexus_scale.samplers.grid import Share, Steps, Stepwise, Walk, chain_of, points_at
from nexus_scale.samplers.lcm import distilled_times


@dataclass(kw_only=True)
class TCD(Stepwise):
    """One evaluation a step, for networks that were distilled to jump along the ODE.

    Attributes:
        original_steps: of the sampler that was distilled; the walk takes every so many of its times, and not `spacing`.
        eta: gamma of the paper: 0 draws no noise, 1 jumps to the data's end in each step.
    """

    steps: Steps = 4
    final: Literal["data", "first"] = "first"
    original_steps: Annotated[int, Field(ge=1, le=10_000)] = 50
    eta: Share = 0.3

    chain_alone = True

    def spaced(self, path: Path) -> list[float]:
        return distilled_times(self.steps, self.original_steps, chain_of(path))

    def solve(self, walk: Walk, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        chain = chain_of(walk.path)
        for i, (here, there) in enumerate(walk.pairs):
            x0, eps = walk.predict(x, here)
            # to a whole step of the chain, (1 - eta) of the next one
            step = math.floor((1 - self.eta) * (there.t * chain - 1) + 1e-9)
            below = points_at(walk.path, [max(step + 1, 0) / chain])[0] if there.t > 0 else there
            x = below.alpha * x0 + below.sigma * eps
            if self.eta > 0 and i + 1 < walk.steps:
                ratio = there.alpha / below.alpha
                x = ratio * x + math.sqrt(max(there.sigma**2 - (ratio * below.sigma) ** 2, 0.0)) * walk.noise(
                    f"noise_{i}", x
                )
            yield x, x0
