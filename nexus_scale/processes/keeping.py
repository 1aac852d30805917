"""A sampler that draws within a mask alone: what lies outside is given, and comes back to the bit.

Source: Lugmayr et al. 2022, "RePaint", without its resampling, as diffusers' inpainting pipeline draws with networks that know no masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_scale.contracts import NoiseSampler, Predictor, Rng, Start
from nexus_scale.processes.gaussian import add_noise
from nexus_scale.processes.paths import Path


@dataclass(frozen=True)
class Keeping:
    """`sampler`, whose walk is at every time at the noised `x0` (B, C, ...) where `drawn` (B, 1, ...) is False."""

    sampler: NoiseSampler
    x0: Tensor
    drawn: Tensor

    @property
    def walks(self) -> str:
        return self.sampler.walks

    @property
    def steps(self) -> int:
        return self.sampler.steps

    @property
    def learns_variance(self) -> bool:
        return self.sampler.learns_variance

    def sample(
        self,
        denoise: Predictor,
        x_T: Tensor,
        *,
        path: Path,
        rng: Rng | None = None,
        callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
        start: Start | None = None,
    ) -> Tensor:
        """See `NoiseSampler.sample`; x_T noises what is kept, too. A walk from noise begins with noise alone, everywhere."""
        begun = start is not None

        def within(x_t: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            nonlocal begun
            if begun:
                x_t = torch.where(self.drawn, x_t, add_noise(path, self.x0, x_T, t).to(x_t.dtype))
            begun = True
            x0, eps, *more = denoise(x_t, t)
            return (torch.where(self.drawn, x0, self.x0), torch.where(self.drawn, eps, x_T.to(eps.dtype)), *more)

        out = self.sampler.sample(within, x_T, path=path, rng=rng, callback=callback, start=start)
        return torch.where(self.drawn, out, self.x0)
