"""The reverse SDE of an interpolant, with a diffusion coefficient that is free of the path: SiT's stochastic sampler.

With velocity v and score s, dx = (v - w s) dt - sqrt(2 w) dW has the path's distributions for every w(t) >= 0; w = 0 is the flow.
Source: Ma et al. 2024, "SiT", equation 8 and table 2; Albergo et al. 2023, "Stochastic Interpolants".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.processes.paths import Path
from nexus_scale.samplers.grid import Point, Stepwise, Walk, points_at


@dataclass(kw_only=True)
class InterpolantSDE(Stepwise):
    """Euler-Maruyama's steps of equal size, or Heun's, and a last one without noise.

    Attributes:
        diffusion: w(t): sigma (SiT's default), linear (t), constant, score (the SDE of score models, which is infinite where alpha is 0),
            decreasing, or increasing_decreasing.
        norm: a factor of w.
        method: `euler`, or `heun`, with two evaluations a step.
        last: of the last step: `mean` leaves its noise out, `euler` follows the flow, `tweedie` takes x0.
        last_size: its size; the others share the rest.
        first: the time that is begun at; below 1 for `score`, which is infinite at pure noise.
    """

    diffusion: Literal["sigma", "linear", "constant", "score", "decreasing", "increasing_decreasing"] = "sigma"
    norm: Annotated[float, Field(gt=0, le=100)] = 1.0
    method: Literal["euler", "heun"] = "euler"
    last: Literal["mean", "euler", "tweedie"] = "mean"
    last_size: Annotated[float, Field(gt=0, lt=1)] = 0.04
    first: Annotated[float, Field(gt=0, le=1)] = 1.0

    chain_alone = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.last_size < self.first:
            raise UserError(f"sample.last_size: got {self.last_size}; expected less than first, {self.first}")

    def points(self, path: Path) -> list[Point]:
        """From `first` evenly to `last_size`, and 0."""
        if (self.spacing, self.sigmas, self.offset, self.final, self.shift) != ("trailing", "spaced", 0, "data", 1.0):
            raise UserError(
                "sample: interpolant_sde takes equal steps to the data; leave spacing, sigmas, offset, final and shift out"
            )
        grid = torch.linspace(self.first, self.last_size, self.steps, dtype=torch.float64)
        return points_at(path, [*grid.tolist(), 0.0])

    def coefficient(self, path: Path, at: Point) -> float:
        """w(t). Source: SiT's table 2, with t running from data to noise."""
        t = at.t
        if self.diffusion == "score":
            time = torch.tensor([t], dtype=torch.float64)
            alpha_dot, sigma_dot = float(path.alpha_dot(time)), float(path.sigma_dot(time))
            if at.alpha <= 0:
                raise UserError(
                    f"sample.diffusion: 'score' is infinite at t = {t:g} on {path}; expected first below it, such as 0.999"
                )
            return self.norm * at.sigma * (sigma_dot - alpha_dot / at.alpha * at.sigma)
        return {
            "sigma": self.norm * at.sigma,
            "linear": self.norm * t,
            "constant": self.norm,
            "decreasing": 0.25 * (1 - self.norm * math.cos(math.pi * t)) ** 2,
            "increasing_decreasing": self.norm * math.sin(math.pi * t) ** 2,
        }[self.diffusion]

    def _slope(self, walk: Walk, x: Tensor, at: Point, noisy: bool = True) -> tuple[Tensor, Tensor]:
        """dx / dt of the SDE's mean, or of the flow, and x0."""
        x0, eps = walk.predict(x, at)
        time = torch.tensor([at.t], dtype=torch.float64)
        rise = float(walk.path.sigma_dot(time))
        if noisy:
            rise += self.coefficient(walk.path, at) / at.sigma  # - w s, and s = -eps / sigma
        return float(walk.path.alpha_dot(time)) * x0 + rise * eps, x0

    def solve(self, walk: Walk, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for i, (here, there) in enumerate(walk.pairs):
            size = here.t - there.t
            if i + 1 == walk.steps:
                slope, x0 = self._slope(walk, x, here, noisy=self.last == "mean")
                yield (x0 if self.last == "tweedie" else x - size * slope), x0
                return
            kick = math.sqrt(2 * self.coefficient(walk.path, here) * size) * walk.noise(f"noise_{i}", x)
            if self.method == "heun":
                x = x + kick
                slope, x0 = self._slope(walk, x, here)
                ahead, _ = self._slope(walk, x - size * slope, there)
                x = x - size * (slope + ahead) / 2
            else:
                slope, x0 = self._slope(walk, x, here)
                x = x - size * slope + kick
            yield x, x0
