"""The discrete chain from noise to data: DDPM with small, large or learned variance, or DDIM without noise.

Without noise it is `ddim` with eta 0, and with the small variance `ddim` with eta 1, which has more grids; the large and the learned
variance are here alone.

Source: Ho et al. 2020, algorithm 2; Song et al. 2021 (DDIM), equation 12; Nichol & Dhariwal 2021 (learned variance, fewer steps).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import Predictor, Rng, Start, UserError
from nexus_scale.processes.gaussian import expand
from nexus_scale.processes.paths import Path
from nexus_scale.processes.reverse import Reverse, learned_log_variance, reverse
from nexus_scale.processes.times import Spacing, spaced_times
from nexus_scale.samplers.grid import chain_of, clipping
from nexus_scale.samplers.start import first_step, noised


class Ancestral:
    """Draws x_s from x_t down a chain of `steps` times."""

    walks = "denoise"

    def __init__(
        self,
        *,
        steps: Annotated[int, Field(ge=1, le=100_000)] = 250,
        variance: Literal["learned", "small", "large", "none"] = "learned",
        spacing: Spacing = "linspace",
        offset: Annotated[int, Field(ge=0, le=1000)] = 0,
        clip: bool | Mapping[str, Any] = False,
    ):
        """
        Args:
            steps: of the sampler; DiT's published numbers use 250.
            variance: `learned` (of a network that learned it), `small` (of the true posterior), `large` (of the forward step),
                or `none`, which is DDIM.
            spacing: which of the chain's steps; see `spaced_times`. diffusers' DDIM walks `leading` and `trailing`.
            offset: added to the steps of `leading`: Stable Diffusion's `steps_offset`, 1.
            clip: keep x0 in [-1, 1] on the way, for pixels; or {to: ...}, {quantile: ..., most: ...}, see `samplers.grid`.
        """
        if steps < 1:
            raise UserError(f"sample.steps: got {steps}; expected at least 1")
        self.steps, self.variance, self.spacing, self.clip = steps, variance, spacing, clip
        self.offset, self._clip = offset, clipping(clip)

    @property
    def learns_variance(self) -> bool:
        """Whether `denoise` must answer (x0, eps, v)."""
        return self.variance == "learned"

    def times(self, path: Path) -> Tensor:
        """From noise to data and then 0, (steps + 1,) float64."""
        grid = spaced_times(self.steps, chain_of(path), self.spacing, self.offset)
        return torch.cat([grid, torch.zeros(1, dtype=torch.float64)])

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
            denoise: `denoise(x_t, t) -> (x0, eps)`, or (x0, eps, v) for a learned variance; t (B,) float32 on x_T's device.
            x_T: standard normal noise, (B, ...).
            path: the one that `denoise` recovers with; t_max is 1.
            rng: draws `noise_<step>` of x_T's shape, one row a sample; not needed without variance.
            callback: `callback(step, t, x, x0)` after each step: steps done, the time reached, the state and its x0.
            start: samples that the walk begins at, instead of noise alone.
        Returns:
            x0, (B, ...) float32, in model space.
        """
        if path.t_max != 1.0:
            raise UserError(f"sample: ancestral walks paths that end at t = 1; got {path}: use {{name: ode}}")
        times = self.times(path).to(x_T.device)
        first = first_step(start, self.steps)
        x = x_T.float() if start is None else noised(start, path, float(times[first]), x_T.float())
        for i in range(first, self.steps):
            t, s = times[i : i + 1], times[i + 1 : i + 2]  # (1,) each
            x0, eps, *v = denoise(x, t.float().expand(len(x)))
            if self._clip is not None:
                x0 = self._clip(x0)
                eps = (x - expand(path.alpha(t).float(), x) * x0) / expand(path.sigma(t).float(), x)
            if self.variance == "none":
                x = expand(path.alpha(s).float(), x) * x0 + expand(path.sigma(s).float(), x) * eps
            else:
                x = self._draw(x, x0, v, reverse(path, s, t), i, rng)
            if callback is not None:
                callback(i + 1, float(s), x, x0)
        return x

    def _draw(self, x: Tensor, x0: Tensor, v: list[Tensor], step: Reverse, i: int, rng: Rng | None) -> Tensor:
        """x_s given x_t and x0, and for a learned variance [v]."""
        mean = step.mean(x0, x)
        if i + 1 == self.steps:
            return mean  # s = 0: the last step adds no noise
        if rng is None:
            raise ValueError(f"ancestral sampling with variance {self.variance!r} needs `rng`")
        log_variance = {"small": step.log_small, "large": step.log_large}.get(self.variance)
        if log_variance is None:
            log_variance = learned_log_variance(v[0], step.log_small, step.log_large)
        return mean + torch.exp(0.5 * expand(log_variance, x)) * rng.normal(f"noise_{i}", x.shape[1:])
