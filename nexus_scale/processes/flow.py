"""The flow of a Gaussian path: its velocity, the likelihood of data under it, and how straight its lines are.

A denoiser gives the flow dx/dt = alpha' x0 + sigma' eps, which carries data (t = 0) to noise (t = t_max) and back. Likelihood follows the
data to the noise and adds up the flow's divergence on the way.

Source: Chen et al. 2018 (neural ODEs: the change of density); Grathwohl et al. 2019 (FFJORD: the estimated divergence); Song et al. 2021
(Score SDE, section 4.3); Lipman et al. 2023, appendix C; Liu et al. 2022, "Flow Straight and Fast", section 2.2 (straightness).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_scale.contracts import Predictor, UserError
from nexus_scale.processes.gaussian import expand
from nexus_scale.processes.paths import Path

Velocity = Callable[[Tensor, Tensor], Tensor]
"""`velocity(x, t) -> dx/dt`: x (B, ...), t (B,)."""


def velocity_of(denoise: Predictor, path: Path) -> Velocity:
    """The flow that a denoiser gives."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        x0, eps = denoise(x, t)[:2]
        return expand(path.alpha_dot(t), x) * x0 + expand(path.sigma_dot(t), x) * eps

    return velocity


def _slope(output: Tensor, x: Tensor, along: Tensor) -> Tensor:
    """along . d output / dx, (B, ...)."""
    return torch.autograd.grad(output, x, along, retain_graph=True)[0]


def divergence(velocity: Velocity, x: Tensor, t: Tensor, probe: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The velocity (B, ...) and its divergence (B,), each in the type of x.

    Args:
        probe: (B, ...) of mean 0 and variance 1: the divergence is estimated, without bias, by one gradient (Hutchinson). None: it is
            exact, at the cost of a gradient for each value of a sample.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        output = velocity(x, t)
        if probe is not None:
            return output.detach(), (_slope(output, x, probe) * probe).flatten(1).sum(1)
        total = x.new_zeros(len(x))
        for i in range(x[0].numel()):
            along = torch.zeros_like(x)
            along.view(len(x), -1)[:, i] = 1
            total += _slope(output, x, along).flatten(1)[:, i]
    return output.detach(), total


@dataclass(frozen=True)
class Likelihood:
    """`nats` (B,) float64: the logarithm of the density at each sample; `evaluations`: of the velocity that it took."""

    nats: Tensor
    evaluations: int


def log_likelihood(
    velocity: Velocity,
    path: Path,
    x: Tensor,
    *,
    probe: Tensor | None = None,
    tolerance: float = 1e-5,
    earliest: float = 1e-5,
) -> Likelihood:
    """The logarithm of the density of data under the flow, solved with Dormand and Prince's adaptive steps of orders 5 and 4.

    Args:
        x: data in model space, (B, ...); the samples are solved together, and share steps.
        probe: see `divergence`; the same along the whole way.
        tolerance: absolute and relative, of the solver (Lipman et al.: 1e-5).
        earliest: time at which the data are taken to be, as a part of t_max: above 0 where the velocity is infinite there.
    Raises:
        UserError: the solver found no solution; scipy is missing.
    """
    shape, device = x.shape, x.device

    def slope(t: float, state: np.ndarray) -> np.ndarray:
        here = torch.from_numpy(state[: x.numel()]).view(shape).to(device, x.dtype)
        time = torch.full((shape[0],), t, dtype=x.dtype, device=device)
        moves, spreads = divergence(velocity, here, time, probe)
        return torch.cat([moves.double().flatten(), spreads.double()]).cpu().numpy()

    start = torch.cat([x.double().flatten(), torch.zeros(shape[0], dtype=torch.float64, device=device)]).cpu().numpy()
    found = _solver()(slope, (earliest * path.t_max, path.t_max), start, rtol=tolerance, atol=tolerance)
    if not found.success or not np.isfinite(found.y[:, -1]).all():
        raise UserError(
            f"likelihood: the solver stopped at t = {found.t[-1]:.3g} ({found.message}); raise its tolerance"
        )
    end = torch.from_numpy(found.y[:, -1])
    noise, spread = end[: x.numel()].view(shape).flatten(1), end[x.numel() :]
    sigma = float(path.sigma(torch.tensor(path.t_max, dtype=torch.float64)))
    prior = -0.5 * (noise / sigma).square().sum(1) - noise.shape[1] * math.log(sigma * math.sqrt(2 * math.pi))
    return Likelihood(prior + spread, int(found.nfev))


def bits_of(nats: Tensor, values: int, width: float | None = None) -> Tensor:
    """Bits for each of a sample's values, from the logarithm of its density, (B,).

    Args:
        width: of the bins that the values were dequantised in, whose probabilities are meant; None: of the density itself.
    """
    return -nats / (values * math.log(2)) - (0.0 if width is None else math.log2(width))


def _solver() -> Callable[..., Any]:
    try:
        from scipy.integrate import solve_ivp
    except ImportError:
        raise UserError("likelihood needs scipy, which is not installed: pip install 'nexus-scale[flow]'") from None
    return solve_ivp


@torch.no_grad()
def straightness(velocity: Velocity, path: Path, noise: Tensor, steps: int = 100) -> Tensor:
    """How far the flow's lines from this noise (B, ...) are from straight: the mean over time and over the values of a sample of
    ((x(0) - x(1)) + dx/dt)^2, (B,). 0: one step is as good as many.

    Args:
        noise: of the path's own size at its end (times sigma(t_max)); t_max is 1.
        steps: of Euler's method.
    """
    if path.t_max != 1.0:
        raise UserError(f"straightness: got {path}; expected a path whose time ends at 1, such as rectified_flow")
    x, moves = noise, []
    for i in range(steps):
        moves.append(velocity(x, torch.full((len(x),), 1 - i / steps, dtype=x.dtype, device=x.device)))
        x = x - moves[-1] / steps
    return torch.stack([(x - noise + move).square().flatten(1).mean(1) for move in moves]).mean(0)
