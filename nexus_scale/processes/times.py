"""Distributions of training times over [0, t_max], and the shift towards noise at higher resolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import Rng, UserError
from nexus_scale.kernels.transfer import to_device
from nexus_scale.processes.paths import find_named

Mean = Annotated[float, Field(ge=-30, le=30)]
"""Of a normal variable whose sigmoid or exponential is a time."""
Spread = Annotated[float, Field(gt=0, le=30)]


class Times(Protocol):
    """A distribution of training times; its draws are named `times`."""

    def sample(self, rng: Rng) -> Tensor:
        """One time per sample, (B,) float32."""
        ...

    def quantile(self, u: Tensor) -> Tensor:
        """The quantile function: the time below which a share u in (0, 1) of the draws falls; elementwise."""
        ...


def _standard_normal_quantile(u: Tensor) -> Tensor:
    return math.sqrt(2) * torch.erfinv(2 * u - 1)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Uniform on [earliest, 1), or [0, 1): a variance-preserving path has an infinite velocity at 0, and flow matching begins at 1e-5."""

    earliest: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def sample(self, rng: Rng) -> Tensor:
        return self.quantile(rng.uniform("times"))

    def quantile(self, u: Tensor) -> Tensor:
        return self.earliest + (1 - self.earliest) * u if self.earliest else u


@dataclass(frozen=True, kw_only=True)
class Discrete:
    """Uniform on the steps of a discrete chain, 1/steps, 2/steps .. 1: DDPM's step i in 0 .. steps - 1 is (i + 1) / steps."""

    steps: Annotated[int, Field(ge=1, le=10**9)] = 1000

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"times.steps: got {self.steps}; expected at least 1")

    def sample(self, rng: Rng) -> Tensor:
        return self.quantile(rng.uniform("times"))

    def quantile(self, u: Tensor) -> Tensor:
        step = (u.double() * self.steps).floor().clamp_max(self.steps - 1)
        return ((step + 1) / self.steps).to(u.dtype)


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """sigmoid(n), n ~ Normal(mean, std): most draws in the middle; a positive mean leans towards noise.

    Source: Esser et al. 2024, section 3.1; mean 0 and std 1 are their best.
    """

    mean: Mean = 0.0
    std: Spread = 1.0

    def sample(self, rng: Rng) -> Tensor:
        # In float64, rounded once: torch's float32 sigmoid differs in the last bit between a vector and the rest of a
        # batch that does not fill one, so a sample's time would depend on the micro-batch size.
        n = self.mean + self.std * rng.normal("times", ()).double()
        return (1 / (1 + torch.exp(-n))).float()

    def quantile(self, u: Tensor) -> Tensor:
        return torch.sigmoid(self.mean + self.std * _standard_normal_quantile(u))


@dataclass(frozen=True, kw_only=True)
class LogNormal:
    """exp(n), n ~ Normal(mean, std): EDM's noise levels (P_mean, P_std), for the path whose t is sigma.

    Source: Karras et al. 2022, table 1.
    """

    mean: Mean = -1.2
    std: Spread = 1.2

    def sample(self, rng: Rng) -> Tensor:
        return torch.exp(self.mean + self.std * rng.normal("times", ()).double()).float()

    def quantile(self, u: Tensor) -> Tensor:
        return torch.exp(self.mean + self.std * _standard_normal_quantile(u))


@dataclass(frozen=True, kw_only=True)
class Stratified:
    """Another distribution, drawn evenly: each of `intervals` equal shares of it gets the same number of samples of every global
    batch, however many workers draw it. The sample at position p is drawn from share p mod `intervals`.

    CogVideoX has an interval for each rank, for a loss that moves less from step to step; with `intervals` of the global batch
    every sample has one of its own.

    Source: Yang et al. 2024 (CogVideoX), "explicit uniform sampling".
    """

    intervals: int
    of: str | Mapping[str, Any] = "uniform"

    def __post_init__(self) -> None:
        if self.intervals < 1:
            raise UserError(f"times.intervals: got {self.intervals}; expected at least 1, at most the global batch")
        find_times(self.of)

    def sample(self, rng: Rng) -> Tensor:
        u = rng.uniform("times")
        share = to_device(rng.positions % self.intervals, u.device)  # (B,)
        # in float64, and below 1 after rounding to float32: 1 is no share's
        u = ((share + u.double()) / self.intervals).float().clamp_max(1 - 2.0**-24)
        return self.quantile(u)

    def quantile(self, u: Tensor) -> Tensor:
        return find_times(self.of).quantile(u)


TIMES: dict[str, type[Any]] = {
    "uniform": Uniform,
    "discrete": Discrete,
    "logit_normal": LogitNormal,
    "log_normal": LogNormal,
    "stratified": Stratified,
}


def find_times(spec: str | Mapping[str, Any]) -> Times:
    """A distribution by name (`uniform`, `discrete`, `logit_normal`, `log_normal`, `stratified`), or {name: ..., arguments}.

    Raises:
        UserError: unknown name or argument; names the nearest.
    """
    times: Times = find_named(TIMES, spec, "times")
    return times


Spacing = Literal["linspace", "leading", "trailing"]


def spaced_times(count: int, steps: int, spacing: Spacing) -> Tensor:
    """`count` times of a chain of `steps`, from noise to data: step i in 0 .. steps - 1 is the time (i + 1) / steps.

    Args:
        spacing: `linspace`: evenly from the last step to the first, both among them; `leading`: every (steps // count)th from
            the first on; `trailing`: every (steps / count)th from the last down. Names and rounding are diffusers'.
    Returns:
        (count,) float64, falling.
    Raises:
        UserError: more times than steps.
    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 2.
    """
    if not 1 <= count <= steps:
        raise UserError(f"sample.steps: got {count}; expected 1 to {steps}, the steps of the chain")
    if spacing == "linspace":
        chosen = torch.linspace(0, steps - 1, count, dtype=torch.float64).round().flip(0)
    elif spacing == "leading":
        chosen = (torch.arange(count, dtype=torch.float64) * (steps // count)).flip(0)
    else:
        chosen = (steps - torch.arange(count, dtype=torch.float64) * (steps / count)).round() - 1
    return (chosen + 1) / steps


# ---------------------------------------------------------------------------------------------- the shift


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t moved towards noise for larger images: shift * t / (1 + (shift - 1) * t); 0 and 1 stay.

    Args:
        t: in [0, 1], any shape.
        shift: sqrt(pixels / pixels of the base resolution); SD3 uses 3 at 1024 pixels. 1 changes nothing.
    Source: Esser et al. 2024, equation 23.
    """
    if shift == 1.0:
        return t
    return shift * t / (1 + (shift - 1) * t)


class TimeShift(Protocol):
    """The shift of times towards noise by latent size: larger images need more noise to lose their content."""

    def of(self, shape: Sequence[int]) -> float:
        """`shift` of `shift_time` for samples (B, C, ...) of that shape."""
        ...


@dataclass(frozen=True, kw_only=True)
class ConstantShift:
    """The same shift at all sizes."""

    shift: float = 1.0

    def of(self, shape: Sequence[int]) -> float:
        return self.shift


def _tokens(shape: Sequence[int], patch_size: int) -> float:
    return math.prod(shape[2:]) / patch_size**2


@dataclass(frozen=True, kw_only=True)
class SquareRootShift:
    """shift * sqrt(tokens / base_tokens).

    Args:
        base_tokens: n, at which the shift is `shift`.
        patch_size: latent pixels a token spans on each side.
    Source: Esser et al. 2024, equation 23: the same signal-to-noise ratio per image at any resolution.
    """

    base_tokens: int
    shift: float = 1.0
    patch_size: int = 2

    def __post_init__(self) -> None:
        if self.base_tokens < 1 or not self.shift > 0 or self.patch_size < 1:
            raise UserError(f"time shift: got {self}; expected positive numbers")

    def of(self, shape: Sequence[int]) -> float:
        return self.shift * math.sqrt(_tokens(shape, self.patch_size) / self.base_tokens)


@dataclass(frozen=True, kw_only=True)
class ExponentialShift:
    """exp(mu), mu on the line through (base_tokens, base_shift) and (max_tokens, max_shift): FLUX's.

    Args:
        base_tokens, base_shift: tokens and mu at one end (256 pixels).
        max_tokens, max_shift: tokens and mu at the other (1024 pixels); larger images continue along the line.
        patch_size: latent pixels a token spans on each side.
    Source: black-forest-labs/flux, sampling.py; diffusers' "dynamic shifting".
    """

    base_tokens: int = 256
    max_tokens: int = 4096
    base_shift: Mean = 0.5
    max_shift: Mean = 1.15
    patch_size: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.base_tokens < self.max_tokens or self.patch_size < 1:
            raise UserError(f"time shift: got {self}; expected 1 <= base_tokens < max_tokens and a positive patch_size")

    def of(self, shape: Sequence[int]) -> float:
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return math.exp(self.base_shift + slope * (_tokens(shape, self.patch_size) - self.base_tokens))


TIME_SHIFTS: dict[str, type[Any]] = {"square_root": SquareRootShift, "exponential": ExponentialShift}


def find_time_shift(spec: float | Mapping[str, Any], where: str) -> TimeShift:
    """A number, or a rule by the size of the latents: {name: square_root or exponential, arguments}.

    Raises:
        UserError: a number that is not positive, an unknown name or argument; names the nearest.
    """
    if isinstance(spec, Mapping):
        rule: TimeShift = find_named(TIME_SHIFTS, spec, where)
        return rule
    if not spec > 0:
        raise UserError(f"{where}: got {spec}; expected a positive number, 1 for none")
    return ConstantShift(shift=spec)
