"""Paths from data to noise, by name: x_t = alpha_t * x0 + sigma_t * eps, with t = 0 data and t = t_max noise.

t_max is 1, except on EDM's path where t is sigma. Papers that print time the other way round are converted at the border.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.config.registry import check_arguments, made, nearest
from nexus_scale.contracts import UserError
from nexus_scale.processes.chains import DDPMCosine, DDPMLinear, DDPMSigmoid, ScaledLinear

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
class ConditionalOT:
    """The straight line that ends beside the data: alpha = 1 - t, sigma = sigma_min + (1 - sigma_min) t; 0: `rectified_flow`'s.

    Source: Lipman et al. 2023, "Flow Matching for Generative Modeling", equation 20 (the optimal-transport path).
    """

    sigma_min: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def t_max(self) -> float:
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min + (1 - self.sigma_min) * t

    def alpha_dot(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return torch.full_like(t, 1 - self.sigma_min)


@dataclass(frozen=True, kw_only=True)
class VPLinear:
    """Variance-preserving with beta(t) = beta_min + (beta_max - beta_min) t: alpha = exp(-1/2 times its integral), sigma^2 = 1 - alpha^2.

    Source: Song et al. 2021, "Score-Based Generative Modeling through SDEs", appendix C; Lipman et al. 2023, equation 18, with the same
    betas, which samples times from 1e-5 on: the velocity is infinite at t = 0.
    """

    beta_min: Annotated[float, Field(gt=0, le=1e3)] = 0.1
    beta_max: Annotated[float, Field(gt=0, le=1e3)] = 20.0

    def __post_init__(self) -> None:
        if not self.beta_min <= self.beta_max:
            raise UserError(f"path: got {self}; expected beta_min of at most beta_max")

    @property
    def t_max(self) -> float:
        return 1.0

    def _integral(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Of beta up to t, and beta(t); float64."""
        t, slope = t.double(), self.beta_max - self.beta_min
        return t * (self.beta_min + 0.5 * slope * t), self.beta_min + slope * t

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-0.5 * self._integral(t)[0]).to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t)[0])).sqrt().to(t.dtype)

    def alpha_dot(self, t: Tensor) -> Tensor:
        integral, beta = self._integral(t)
        return (-0.5 * beta * torch.exp(-0.5 * integral)).to(t.dtype)

    def sigma_dot(self, t: Tensor) -> Tensor:
        integral, beta = self._integral(t)
        return (0.5 * beta * torch.exp(-integral) / (-torch.expm1(-integral)).sqrt()).to(t.dtype)


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


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@dataclass(frozen=True, kw_only=True)
class VPSigmoid:
    """Variance-preserving, alpha^2 falls from 1 to 0 along a sigmoid from `start` to `end`, steeper the smaller `tau`.

    alpha is exactly 0 at t = 1, where eps does not determine x0: predict v there, or begin a sampler a little below 1.
    Source: Jabri et al. 2022; Chen 2023, "On the Importance of Noise Scheduling for Diffusion Models", algorithm 1.
    """

    start: Annotated[float, Field(ge=-30, le=30)] = -3.0
    end: Annotated[float, Field(ge=-30, le=30)] = 3.0
    tau: Annotated[float, Field(ge=0.1, le=100)] = 1.0

    def __post_init__(self) -> None:
        if (
            not self.start < self.end
            or (self.end - self.start) / self.tau < 0.1
            or max(-self.start, self.end) / self.tau > 30
        ):
            raise UserError(
                f"path: got {self}; expected start < end, at least tau / 10 apart, and both within 30 tau of 0"
            )

    @property
    def t_max(self) -> float:
        return 1.0

    @property
    def _ends(self) -> tuple[float, float]:
        return _sigmoid(self.start / self.tau), _sigmoid(self.end / self.tau)

    def _place(self, t: Tensor) -> Tensor:
        return torch.sigmoid((t.double() * (self.end - self.start) + self.start) / self.tau)

    def _squares(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha^2, sigma^2 and their slope, d sigma^2 / dt, in float64."""
        (low, high), place = self._ends, self._place(t)
        slope = place * (1 - place) * ((self.end - self.start) / self.tau / (high - low))
        return ((high - place) / (high - low)).clamp(0, 1), ((place - low) / (high - low)).clamp(0, 1), slope

    def alpha(self, t: Tensor) -> Tensor:
        return self._squares(t)[0].sqrt().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return self._squares(t)[1].sqrt().to(t.dtype)

    def alpha_dot(self, t: Tensor) -> Tensor:
        square, _, slope = self._squares(t)
        return (-slope / (2 * square.sqrt())).to(t.dtype)

    def sigma_dot(self, t: Tensor) -> Tensor:
        _, square, slope = self._squares(t)
        return (slope / (2 * square.sqrt())).to(t.dtype)


@dataclass(frozen=True, kw_only=True)
class GVP:
    """The quarter circle: alpha = cos(t pi / 2), sigma = sin(t pi / 2); SiT's generalised variance-preserving interpolant.

    alpha is exactly 0 at t = 1, where eps does not determine x0: predict v or velocity.
    Source: Albergo & Vanden-Eijnden 2023 (trigonometric); Ma et al. 2024, "SiT", section 2.2.
    """

    @property
    def t_max(self) -> float:
        return 1.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sin((1 - t) * (math.pi / 2))  # cos(pi/2) rounds to -4e-8 in float32

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))

    def alpha_dot(self, t: Tensor) -> Tensor:
        return self.sigma(t) * (-math.pi / 2)

    def sigma_dot(self, t: Tensor) -> Tensor:
        return self.alpha(t) * (math.pi / 2)


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
    "conditional_ot": ConditionalOT,
    "vp_linear": VPLinear,
    "vp_cosine": VPCosine,
    "vp_sigmoid": VPSigmoid,
    "gvp": GVP,
    "ddpm_linear": DDPMLinear,
    "ddpm_cosine": DDPMCosine,
    "ddpm_sigmoid": DDPMSigmoid,
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
    """A path by its name in `PATHS`, such as `rectified_flow`, or {name: ..., arguments}."""
    path: Path = find_named(PATHS, spec, "path")
    return path
