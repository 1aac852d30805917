"""SDE-DPM-Solver++(2M): second order in the log of alpha / sigma, one evaluation a step, fresh noise in each.

Source: Lu et al. 2022, "DPM-Solver++", the SDE variant of its multistep solver; the steps are those of CogVideoX's sampler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import Predictor, Rng, Start, UserError
from nexus_scale.processes.paths import Path
from nexus_scale.processes.times import Spacing, spaced_times
from nexus_scale.samplers.grid import chain_of
from nexus_scale.samplers.start import first_step, noised


class DPM:
    """Draws x_s from x_t down a chain of `steps` times."""

    walks = "denoise"
    learns_variance = False

    def __init__(self, *, steps: Annotated[int, Field(ge=1, le=100_000)] = 50, spacing: Spacing = "trailing"):
        """
        Args:
            steps: of the sampler, each one evaluation; CogVideoX draws with 50.
            spacing: which of the chain's steps; see `spaced_times`. On a path whose last step is noise alone, `trailing` begins
                there, as training did.
        """
        if steps < 1:
            raise UserError(f"sample.steps: got {steps}; expected at least 1")
        self.steps, self.spacing = steps, spacing

    def times(self, path: Path) -> Tensor:
        """From noise to data and then 0, (steps + 1,) float64."""
        return torch.cat([spaced_times(self.steps, chain_of(path), self.spacing), torch.zeros(1, dtype=torch.float64)])

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
        """Walks the chain.

        Args:
            denoise: `denoise(x_t, t) -> (x0, eps)`, t (B,) float32 on x_T's device; called `steps` times.
            x_T: standard normal noise, (B, ...).
            path: the one that `denoise` recovers with; variance-preserving.
            rng: draws `noise_<step>` of x_T's shape, one row a sample.
            callback: `callback(step, t, x, x0)` after each step: steps done, the time reached, the state and its x0.
            start: samples that the walk begins at, instead of noise alone.
        Returns:
            x0, (B, ...) float32, in model space.
        """
        if path.t_max != 1.0:
            raise UserError(f"sample: dpm walks paths that end at t = 1; got {path}: use {{name: ode}}")
        if rng is None:
            raise ValueError("dpm draws noise in every step: it needs `rng`")
        times = self.times(path)
        alphas, sigmas = path.alpha(times).tolist(), path.sigma(times).tolist()
        # log alpha / sigma is -inf where a path ends in noise alone, and inf at the data: the limits below are finite
        logs = [_log(alpha) - _log(sigma) for alpha, sigma in zip(alphas, sigmas, strict=True)]
        x, last, first = x_T.float(), None, first_step(start, self.steps)
        if start is not None:
            x = noised(start, path, float(times[first]), x)
        for i in range(first, self.steps):
            x0, _ = denoise(x, times[i].float().to(x.device).expand(len(x)))
            h = logs[i + 1] - logs[i]
            ahead = x0
            if last is not None and i + 1 < self.steps:
                half = h / (2 * (logs[i] - logs[i - 1]))  # 0 after a step of infinite length
                ahead = (1 + half) * x0 - half * last
            decay = math.exp(-h)
            x = (sigmas[i + 1] / sigmas[i] * decay) * x - (alphas[i + 1] * math.expm1(-2 * h)) * ahead
            if i + 1 < self.steps:
                x = x + (sigmas[i + 1] * math.sqrt(-math.expm1(-2 * h))) * rng.normal(f"noise_{i}", x.shape[1:])
            last = x0
            if callback is not None:
                callback(i + 1, float(times[i + 1]), x, x0)
        return x


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
