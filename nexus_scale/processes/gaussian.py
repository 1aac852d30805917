"""Gaussian processes: x_t = alpha_t * x0 + sigma_t * eps, with t = 0 data and t = t_max noise, and the one linear solve.

t_max is 1, except on EDM's path where t is sigma. Papers that print time the other way round are converted at the border.
Every prediction target is y = a*x0 + b*eps; with the line above that is a 2x2 system, and nothing else converts predictions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.config.registry import check_arguments, made, nearest
from nexus_scale.contracts import UserError
from nexus_scale.kernels import transfer
from nexus_scale.kernels.transfer import made_on

# ------------------------------------------------------------------------------------------------ paths


ChainSteps = Annotated[int, Field(ge=1, le=10**6)]
Beta = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0, le=1e9)]


class Path(Protocol):
    """How data becomes noise. All functions are elementwise over t in [0, t_max] of any shape and keep its dtype."""

    @property
    def t_max(self) -> float: ...

    def alpha(self, t: Tensor) -> Tensor: ...

    def sigma(self, t: Tensor) -> Tensor: ...

    def alpha_dot(self, t: Tensor) -> Tensor:
        """d alpha / dt."""
        ...

    def sigma_dot(self, t: Tensor) -> Tensor:
        """d sigma / dt; infinite at t = 0 where sigma grows like a square root (the variance-preserving paths)."""
        ...


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow:
    """The straight line: alpha = 1 - t, sigma = t.

    Source: Liu et al. 2022, "Flow Straight and Fast"; Lipman et al. 2022; in SD3's direction of time, Esser et al. 2024.
    """

    @property
    def t_max(self) -> float:
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)


@dataclass(frozen=True, kw_only=True)
class VPCosine:
    """Variance-preserving, alpha = cos(theta_t) / cos(theta_0) with theta_t = (t + s) / (1 + s) * pi / 2.

    alpha is exactly 0 at t = 1, where eps does not determine x0: predict v there, or begin a sampler a little below 1.
    Source: Nichol & Dhariwal 2021, equation 17, in continuous time.
    """

    s: Annotated[float, Field(gt=0, le=1)] = 0.008

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def _theta0(self) -> float:
        return self.s / (1 + self.s) * math.pi / 2

    def _theta(self, t: Tensor) -> Tensor:
        return (t + self.s) * (math.pi / 2 / (1 + self.s))

    def alpha(self, t: Tensor) -> Tensor:
        # cos(pi/2) rounds to -4e-8 in float32, but alpha is never negative.
        return (torch.cos(self._theta(t)) / math.cos(self._theta0)).clamp(0, 1)

    def sigma(self, t: Tensor) -> Tensor:
        # sqrt(1 - alpha^2) without its cancellation near t = 0: cos^2 a - cos^2 b = sin(b - a) sin(b + a).
        theta = self._theta(t)
        square = torch.sin(t * (math.pi / 2 / (1 + self.s))) * torch.sin(theta + self._theta0)
        return (square.clamp_min(0).sqrt() / math.cos(self._theta0)).clamp_max(1)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.sin(self._theta(t)) * (-math.pi / 2 / (1 + self.s) / math.cos(self._theta0))

    def sigma_dot(self, t: Tensor) -> Tensor:
        return -self.alpha(t) * self.alpha_dot(t) / self.sigma(t)


@lru_cache(maxsize=8)
def _log_alpha_bars(steps: int, beta_start: float, beta_end: float) -> Tensor:
    """log alpha_bar at steps 0 (data, 0.0) .. `steps`, (steps + 1,) float64."""
    betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-betas).cumsum(0)])


@dataclass(frozen=True, kw_only=True)
class DDPMLinear:
    """Variance-preserving with DDPM's linear betas, made continuous: log alpha_bar is linear between the discrete steps.

    The paper's step i in 0 .. steps-1 is t = (i + 1) / steps; t = 0 is clean data, which the paper's steps leave out.
    Source: Ho et al. 2020, section 4 (beta from 1e-4 to 0.02 in 1000 steps).
    """

    steps: ChainSteps = 1000
    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02

    @property
    def t_max(self) -> float:
        return 1.0

    def _log_alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """log alpha and its derivative in t, in float64: differences of a float32 table would lose three digits."""
        table = made_on(_log_alpha_bars, (self.steps, self.beta_start, self.beta_end), t.device) / 2
        place = t.double() * self.steps
        left = place.floor().clamp(0, self.steps - 1).long()
        slope = table[left + 1] - table[left]
        return table[left] + (place - left) * slope, slope * self.steps

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t)[0].exp().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t)[0])).clamp_min(0).sqrt().to(t.dtype)

    def alpha_dot(self, t: Tensor) -> Tensor:
        log_alpha, slope = self._log_alpha(t)
        return (log_alpha.exp() * slope).to(t.dtype)

    def sigma_dot(self, t: Tensor) -> Tensor:
        log_alpha, slope = self._log_alpha(t)
        return (-torch.exp(2 * log_alpha) * slope / (-torch.expm1(2 * log_alpha)).clamp_min(0).sqrt()).to(t.dtype)


@lru_cache(maxsize=8)
def _scaled_linear_alphas(
    steps: int, beta_start: float, beta_end: float, snr_shift: float, zero_terminal_snr: bool
) -> Tensor:
    """alpha at steps 0 (data, 1.0) .. `steps`, (steps + 1,) float64."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64).square()
    alpha_bar = torch.cumprod(1 - betas, 0)
    alpha_bar = alpha_bar / (snr_shift + (1 - snr_shift) * alpha_bar)
    alpha = alpha_bar.sqrt()
    if zero_terminal_snr:
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return torch.cat([torch.ones(1, dtype=torch.float64), alpha])


@dataclass(frozen=True, kw_only=True)
class ScaledLinear:
    """Variance-preserving with latent diffusion's betas, whose square roots are linear, made continuous: alpha is linear between
    the discrete steps. Step i in 0 .. steps - 1 is t = (i + 1) / steps.

    CogVideoX's: the signal-to-noise ratio of every step is divided by `snr_shift`, then alpha is rescaled so that the last
    step is noise alone (`zero_terminal_snr`), where eps does not determine x0: predict v.

    Source: Rombach et al. 2022 (betas); Esser et al. 2024 (the shift); Lin et al. 2023, algorithm 1 (zero terminal SNR).
    """

    steps: ChainSteps = 1000
    beta_start: Beta = 0.00085
    beta_end: Beta = 0.012
    snr_shift: float = 1.0
    zero_terminal_snr: bool = True

    def __post_init__(self) -> None:
        if self.steps < 2 or not 0 < self.beta_start <= self.beta_end < 1 or self.snr_shift <= 0:
            raise UserError(
                f"path: got {self}; expected at least 2 steps, 0 < beta_start <= beta_end < 1 and snr_shift above 0 (2B: 3, 5B: 1)"
            )

    @property
    def t_max(self) -> float:
        return 1.0

    def _alpha(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and its derivative in t, in float64: 1 - alpha^2 of a float32 table would lose its digits near the data."""
        settings = self.steps, self.beta_start, self.beta_end, self.snr_shift, self.zero_terminal_snr
        table = made_on(_scaled_linear_alphas, settings, t.device)
        place = t.double() * self.steps
        left = place.floor().clamp(0, self.steps - 1).long()
        slope = table[left + 1] - table[left]
        return table[left] + (place - left) * slope, slope * self.steps

    def alpha(self, t: Tensor) -> Tensor:
        return self._alpha(t)[0].to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self._alpha(t)[0].square()).clamp_min(0).sqrt().to(t.dtype)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return self._alpha(t)[1].to(t.dtype)

    def sigma_dot(self, t: Tensor) -> Tensor:
        alpha, slope = self._alpha(t)
        return (-alpha * slope / (1 - alpha.square()).clamp_min(0).sqrt()).to(t.dtype)


@dataclass(frozen=True)
class Preconditioning:
    """D(x; sigma) = c_skip * x + c_out * F(c_in * x, c_noise); each of the shape of sigma."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


@dataclass(frozen=True, kw_only=True)
class EDM:
    """Variance-exploding in sigma itself: alpha = 1, sigma = t in [0, t_max]; the networks see c_in * x_t and c_noise.

    Source: Karras et al. 2022, "Elucidating the Design Space", table 1; sigma_max 80 and sigma_data 0.5 are theirs.
    """

    t_max: Positive = 80.0
    sigma_data: Positive = 0.5

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def preconditioning(self, t: Tensor) -> Preconditioning:
        """Table 1, row "Ours". t > 0 for c_noise to be finite."""
        total = t.square() + self.sigma_data**2
        return Preconditioning(
            c_skip=self.sigma_data**2 / total,
            c_out=t * self.sigma_data / total.sqrt(),
            c_in=total.rsqrt(),
            c_noise=t.log() / 4,
        )


PATHS: dict[str, type[Any]] = {
    "rectified_flow": RectifiedFlow,
    "vp_cosine": VPCosine,
    "ddpm_linear": DDPMLinear,
    "scaled_linear": ScaledLinear,
    "edm": EDM,
}


def find_named(kinds: Mapping[str, type[Any]], spec: str | Mapping[str, Any], where: str) -> Any:
    """The object that `spec` describes: a name of `kinds`, or {name: ..., arguments}.

    Raises:
        UserError: unknown name or argument; names the nearest.
    """
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = str(arguments.pop("name", "without a name"))
    if name not in kinds:
        raise UserError(f"{where}: no {name!r}; {nearest(name, list(kinds))}")
    return made(kinds[name], check_arguments(kinds[name], arguments, where), where)


def find_path(spec: str | Mapping[str, Any]) -> Path:
    """A path by name (`rectified_flow`, `vp_cosine`, `ddpm_linear`, `scaled_linear`, `edm`), or {name: ..., arguments}."""
    path: Path = find_named(PATHS, spec, "path")
    return path


# ---------------------------------------------------------------------------------------------- targets

TARGETS = ("eps", "x0", "v", "velocity", "edm")

_SMALLEST_DET = 1e-6
"""Below it, float32's rounding of x_t and y is amplified to more than a tenth of the answer."""


def expand(t: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with as many dimensions as x."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


def coefficients(path: Path, target: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """The pair (a, b) of y = a*x0 + b*eps, each of the shape of t.

    eps (0, 1); x0 (1, 0); v (-sigma, alpha); velocity (alpha', sigma'), SD3's eps - x0 on the straight line;
    edm ((1 - c_skip*alpha) / c_out, -c_skip*sigma / c_out), infinite at t = 0.
    Raises:
        ValueError: unknown target, or `edm` on a path without preconditioning.
    Source: Salimans & Ho 2022 (v); Karras et al. 2022, equation 7 (EDM).
    """
    if target == "eps":
        return torch.zeros_like(t), torch.ones_like(t)
    if target == "x0":
        return torch.ones_like(t), torch.zeros_like(t)
    if target == "v":
        return -path.sigma(t), path.alpha(t)
    if target == "velocity":
        return path.alpha_dot(t), path.sigma_dot(t)
    if target == "edm":
        if not isinstance(path, EDM):
            raise ValueError(f"target 'edm' needs path 'edm'; got {path}; choose target velocity, v, eps or x0")
        c = path.preconditioning(t)
        return (1 - c.c_skip) / c.c_out, -c.c_skip * t / c.c_out
    raise ValueError(f"target {target!r} is unknown; {nearest(target, list(TARGETS))}")


def add_noise(path: Path, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t = alpha_t * x0 + sigma_t * eps.

    Args:
        x0, eps: clean sample and noise, each (B, ...).
        t: time in [0, path.t_max], (B,).
    """
    return torch.addcmul(expand(path.alpha(t), x0) * x0, expand(path.sigma(t), x0), eps)


def target_of(path: Path, name: str, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The network's training target, y = a*x0 + b*eps, (B, ...); arguments as for `add_noise` and `coefficients`."""
    a, b = coefficients(path, name, t)
    return torch.addcmul(expand(a, x0) * x0, expand(b, x0), eps)


def recover(x_t: Tensor, y: Tensor, target: str, path: Path, t: Tensor) -> tuple[Tensor, Tensor]:
    """Clean sample and noise from a network output, whatever it predicts.

    Args:
        x_t: noised sample, (B, ...).
        y: network output, same shape; a*x0 + b*eps for the pair (a, b) of `target`.
        t: time in [0, path.t_max], (B,); 0 is data, t_max is noise.
    Returns:
        x0, eps: each (B, ...), float32 (float64 where x_t is).
    Raises:
        ValueError: `target` does not determine x0 and eps at this t (for example eps at alpha_t = 0, x0 at sigma_t = 0). On a CPU alone,
            where a sampler is tried before it draws: a GPU would have to be waited for, at every step of a walk.
    Source: Salimans & Ho 2022 (v); Karras et al. 2022, table 1 (EDM).
    """
    dtype = torch.float64 if x_t.dtype == torch.float64 else torch.float32
    x_t, y, t = x_t.to(dtype), y.to(dtype), t.to(dtype)
    alpha, sigma = path.alpha(t), path.sigma(t)
    a, b = coefficients(path, target, t)
    det = alpha * b - sigma * a
    if transfer.reads_freely(det.device) and not bool((det.abs() >= _SMALLEST_DET).all() & det.isfinite().all()):
        bad = t[~((det.abs() >= _SMALLEST_DET) & det.isfinite())][:4].tolist()
        raise ValueError(
            f"target {target!r} does not determine x0 and eps on {path} at t = {bad}; "
            "expected |alpha*b - sigma*a| of at least 1e-6: keep t off that end, or predict v or velocity"
        )
    a, b, alpha, sigma = (expand(value / det, x_t) for value in (a, b, alpha, sigma))
    return b * x_t - sigma * y, alpha * y - a * x_t


def network_input(path: Path, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """A network's input for (x_t, t): the pair itself, or on EDM's path (c_in * x_t, c_noise), where t > 0."""
    if isinstance(path, EDM):
        c = path.preconditioning(t)
        return expand(c.c_in, x_t) * x_t, c.c_noise
    return x_t, t
