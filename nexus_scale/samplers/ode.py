"""Deterministic sampling along the probability-flow ODE, in the form that needs no derivatives: dx = x0 dalpha + eps dsigma.

Because x_t = alpha x0 + sigma eps at every t, Euler's step of that form is alpha' x0 + sigma' eps at the next time: DDIM.
On the straight line it is the flow's x + (t' - t)(eps - x0), on EDM's path Karras et al.'s Euler step.

`euler` and `heun` solve the same ODE in sigma / alpha, on the grids of chains and with churn; this one also begins in noise alone, and has
the grids of SD3 and FLUX, whose shift may follow the size of the latents.

Source: Song et al. 2021 (DDIM, equation 13; Score SDE); Karras et al. 2022, algorithm 1; Esser et al. 2024 (time grid).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import Predictor, Rng, Start, UserError
from nexus_scale.processes.paths import EDM, Path, RectifiedFlow
from nexus_scale.processes.times import ExponentialShift, find_time_shift, shift_time
from nexus_scale.samplers.start import first_step, noised

_SMALLEST_TIME = 1e-3  # the first of SD3's and DDPM's 1000 training steps, where the last evaluation is
_EDM_SMALLEST_SIGMA, _EDM_RHO = 0.002, 7.0


class ODE:
    """Euler (first order), or Heun or midpoint (second order, two evaluations a step; Heun's last has one)."""

    walks = "denoise"
    learns_variance = False

    def __init__(
        self,
        *,
        steps: Annotated[int, Field(ge=1, le=10_000)] = 25,
        method: Literal["euler", "heun", "midpoint"] = "euler",
        shift: float | Mapping[str, Any] = 1.0,
        spacing: Literal["linspace", "trailing"] = "linspace",
    ):
        """
        Args:
            steps: steps from noise to data.
            method: `euler`, `heun`, or `midpoint`, whose second evaluation is half-way in time (Lipman et al. 2023; Voicebox).
            shift: of times towards noise, as in training: a number (SD3 samples with 3), or a rule by the size of the
                latents, {name: square_root or exponential, ...}. Without effect on EDM's path.
            spacing: of times before the shift, from 1 evenly down to the smallest training time (`linspace`, SD3's) or to
                1 / steps (`trailing`, FLUX's).
        """
        if steps < 1:
            raise UserError(f"sample.steps: got {steps}; expected at least 1")
        if method not in ("euler", "heun", "midpoint"):
            raise UserError(f"sample.method: got {method!r}; expected 'euler', 'heun' or 'midpoint'")
        if spacing not in ("linspace", "trailing"):
            raise UserError(f"sample.spacing: got {spacing!r}; expected 'linspace' or 'trailing'")
        self.shift = find_time_shift(shift, "sample.shift")
        self.steps, self.method, self.spacing = steps, method, spacing

    def times(self, path: Path | None = None, shape: Sequence[int] = ()) -> Tensor:
        """From noise to data, (steps + 1,) float32, falling from t_max to 0.

        Paths up to t = 1 have SD3's or FLUX's grid, shifted, then 0. SD3's smallest time is that of shifted training: it is
        shifted once more with the grid. EDM's path has equation 5 of its paper (rho = 7).

        Args:
            shape: of the latents, (B, C, ...), for a shift that depends on it.
        """
        if isinstance(path, EDM):
            ramp = torch.linspace(0, 1, self.steps, dtype=torch.float64)
            largest, smallest = path.t_max ** (1 / _EDM_RHO), _EDM_SMALLEST_SIGMA ** (1 / _EDM_RHO)
            grid = (largest + ramp * (smallest - largest)) ** _EDM_RHO
        else:
            shift = self.shift.of(shape)
            smallest = 1 / self.steps if self.spacing == "trailing" else _SMALLEST_TIME
            # diffusers shifts its training times beforehand unless the shift is exp(mu), which it takes with the latents' size
            if self.spacing == "linspace" and not isinstance(self.shift, ExponentialShift):
                smallest = float(shift_time(torch.tensor(smallest, dtype=torch.float64), shift))
            grid = shift_time(torch.linspace(1, smallest, self.steps, dtype=torch.float64), shift)
        return torch.cat([grid, torch.zeros(1, dtype=torch.float64)]).float()

    def sample(
        self,
        denoise: Predictor,
        x_T: Tensor,
        *,
        path: Path | None = None,
        rng: Rng | None = None,
        callback: Callable[[int, float, Tensor, Tensor], None] | None = None,
        start: Start | None = None,
    ) -> Tensor:
        """Follows the ODE from noise to data.

        Args:
            denoise: `denoise(x_t, t) -> (x0, eps)`, t (B,) float32 on x_T's device; called `steps` times, with `heun`
                2 * steps - 1 times, with `midpoint` 2 * steps times.
            x_T: standard normal noise, (B, ...); scaled by sigma(t_max) here, which is 1 but on EDM's path.
            path: default rectified flow; must be the one that `denoise` recovers with.
            rng: not needed, nothing is drawn on the way.
            callback: `callback(step, t, x, x0)` after each step: steps done, the time reached, the state and its x0.
            start: samples that the walk begins at, instead of noise alone.
        Returns:
            x0, (B, ...) float32, in model space.
        """
        path = RectifiedFlow() if path is None else path
        times = self.times(path, x_T.shape)
        alphas, sigmas = path.alpha(times).tolist(), path.sigma(times).tolist()

        def at(time: float) -> Tensor:
            return torch.full((len(x_T),), time, device=x_T.device)

        first = first_step(start, self.steps)
        x = x_T.float() * sigmas[0] if start is None else noised(start, path, float(times[first]), x_T.float())
        for i in range(first, self.steps):
            d_alpha, d_sigma = alphas[i + 1] - alphas[i], sigmas[i + 1] - sigmas[i]
            x0, eps = denoise(x, at(float(times[i])))
            ahead = x + d_alpha * x0 + d_sigma * eps
            # At t = 0 eps is undetermined: the last step stays Euler's, as in Karras et al.
            if self.method == "heun" and i + 1 < self.steps:
                x0_ahead, eps_ahead = denoise(ahead, at(float(times[i + 1])))
                ahead = x + d_alpha * (x0 + x0_ahead) / 2 + d_sigma * (eps + eps_ahead) / 2
            if self.method == "midpoint":
                middle = (times[i] + times[i + 1]) / 2
                alpha, sigma = float(path.alpha(middle)), float(path.sigma(middle))
                x0_half, eps_half = denoise(x + (alpha - alphas[i]) * x0 + (sigma - sigmas[i]) * eps, at(float(middle)))
                ahead = x + d_alpha * x0_half + d_sigma * eps_half
            x = ahead
            if callback is not None:
                callback(i + 1, float(times[i + 1]), x, x0)
        return x
