"""Distributions of training times over [0, t_max], and the shift towards noise at higher resolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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

    @property
    def draws_zero(self) -> bool:
        """Whether t = 0 may be drawn, where some targets are infinite."""
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

    @property
    def draws_zero(self) -> bool:
        return self.earliest == 0


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

    @property
    def draws_zero(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class Mode:
    """u - scale * (sin(u pi / 2)^2 - u) of u uniform on [0, 1): with a positive scale more draws in the middle, with a negative one at both
    ends, and always some of all times.

    Source: Esser et al. 2024, equation 20, whose u runs the other way; of its table 1, 1.29 is the best of this kind.
    """

    scale: Annotated[float, Field(ge=-1, le=2 / (math.pi - 2))] = 1.29

    def sample(self, rng: Rng) -> Tensor:
        return self.quantile(rng.uniform("times"))

    def quantile(self, u: Tensor) -> Tensor:
        place = u.double()
        t = place - self.scale * (torch.sin(place * (math.pi / 2)).square() - place)
        return t.clamp(0, 1).to(u.dtype)

    @property
    def draws_zero(self) -> bool:
        return True


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

    @property
    def draws_zero(self) -> bool:
        return False


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

    @property
    def draws_zero(self) -> bool:
        return False


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
        if isinstance(self.base, Importance | Stratified):
            raise UserError(
                f"times.of: got {self.of}; expected a distribution that depends on no other, such as uniform"
            )

    @property
    def base(self) -> Times:
        return find_times(self.of)

    def sample(self, rng: Rng) -> Tensor:
        u = rng.uniform("times")
        share = to_device(rng.positions % self.intervals, u.device)  # (B,)
        # in float64, and below 1 after rounding to float32: 1 is no share's
        u = ((share + u.double()) / self.intervals).float().clamp_max(1 - 2.0**-24)
        return self.quantile(u)

    def quantile(self, u: Tensor) -> Tensor:
        return self.base.quantile(u)

    @property
    def draws_zero(self) -> bool:
        return self.base.draws_zero


class Importance:
    """Another distribution, whose equal shares are drawn as often as sqrt of the running mean of their squared losses demands.

    They count the less in return: the loss expected is the same, with less noise. What is known of losses is the same on all ranks, is
    kept in checkpoints, and is used from the step after on.

    Source: Nichol & Dhariwal 2021, "Improved DDPM", section 3.3 (importance sampling by the losses' second moment).
    """

    def __init__(
        self,
        *,
        shares: Annotated[int, Field(ge=2, le=10**4)] = 100,
        of: str | Mapping[str, Any] = "uniform",
        decay: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        uniform: Annotated[float, Field(gt=0, le=1)] = 0.001,
        warm_up: Annotated[int, Field(ge=1, le=10**6)] = 10,
    ):
        """
        Args:
            shares: of the distribution, each equally likely in it; the paper has one for each of 1000 or 4000 steps.
            of: the distribution that the loss is an expectation of.
            decay: part of a running mean that a step with samples of its share leaves; the paper has the mean of the last ten.
            uniform: part of the draws that go to all shares alike.
            warm_up: samples of each share before losses are used.
        """
        if shares < 2 or not 0 <= decay < 1 or not 0 < uniform <= 1 or warm_up < 1:
            raise UserError(
                f"times: got shares {shares}, decay {decay}, uniform {uniform}, warm_up {warm_up}; expected at least 2 shares, a decay in "
                "[0, 1), a part in (0, 1], and at least 1"
            )
        self.shares, self.decay, self.uniform, self.warm_up = shares, decay, uniform, warm_up
        self.base = find_times(of)
        if isinstance(self.base, Importance | Stratified):
            raise UserError(f"times.of: got {of}; expected a distribution that depends on no other, such as uniform")
        # Running sums of squared losses and of their weights: their quotient has no bias at the start.
        self.squares = torch.zeros(shares, dtype=torch.float64)
        self.weights = torch.zeros(shares, dtype=torch.float64)
        self.samples = torch.zeros(shares, dtype=torch.float64)
        self._seen: list[Tensor] = []

    def probabilities(self) -> Tensor:
        """Of each share, (shares,) float64, adding up to 1."""
        roots = (self.squares / self.weights.clamp_min(1e-30)).sqrt()
        total = roots.sum()
        known = (self.samples.min() >= self.warm_up) & (total > 0)
        equal = torch.full_like(roots, 1 / self.shares)
        losses = torch.where(known, roots / torch.where(known, total, 1.0), equal)
        return (1 - self.uniform) * losses + self.uniform * equal

    def draw(self, rng: Rng) -> tuple[Tensor, Tensor, Tensor]:
        """Times and what their losses count, each (B,) float32, and the shares they are of, (B,) int64. Draws `times`."""
        u = rng.uniform("times").double()
        self._place(u.device)
        probability = self.probabilities()
        ends = probability.cumsum(0)
        share = torch.searchsorted(ends, u, right=True).clamp_max(self.shares - 1)
        inside = ((u - ends[share] + probability[share]) / probability[share]).clamp(0, 1)
        # below 1 after rounding to float32: 1 is no share's
        place = ((share + inside) / self.shares).float().clamp_max(1 - 2.0**-24)
        return self.base.quantile(place), (1 / (self.shares * probability[share])).float(), share

    def sample(self, rng: Rng) -> Tensor:
        return self.draw(rng)[0]

    def quantile(self, u: Tensor) -> Tensor:
        """Of the distribution that the loss is an expectation of."""
        return self.base.quantile(u)

    @property
    def draws_zero(self) -> bool:
        return self.base.draws_zero

    def _place(self, device: torch.device) -> None:
        """Sums lie where losses are, so that neither waits for the other."""
        if self.squares.device != device:
            self.squares, self.weights, self.samples = (
                to_device(value, device) for value in (self.squares, self.weights, self.samples)
            )

    def see(self, share: Tensor, losses: Tensor) -> None:
        """Takes note of a micro-batch: the shares of its samples (B,), and their losses (B,) before they count less."""
        own = share == torch.arange(self.shares, device=share.device)[:, None]  # (shares, B)
        squares = torch.where(own, losses.double().square(), 0.0).sum(1)
        self._seen.append(torch.stack([squares, own.sum(1)], dim=1))

    def follow(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Updates what it knows with the global batch. A collective. A share with a loss that is not finite stays as it is."""
        seen, self._seen = self._seen, []
        total = sum_over_ranks(torch.stack(seen).sum(0))  # (shares, 2): sums of squares, samples
        squares, samples = total.unbind(1)
        met = (samples > 0) & squares.isfinite()
        mean = torch.where(met, squares / samples.clamp_min(1), 0.0)
        self.squares = torch.where(met, self.decay * self.squares + mean, self.squares)
        self.weights = torch.where(met, self.decay * self.weights + 1, self.weights)
        self.samples = self.samples + torch.where(met, samples, 0.0)

    def state_dict(self) -> dict[str, Tensor]:
        return {"squares": self.squares, "weights": self.weights, "samples": self.samples}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.squares, self.weights, self.samples = (state[name].double() for name in ("squares", "weights", "samples"))
        self._seen = []


TIMES: dict[str, type[Any]] = {
    "uniform": Uniform,
    "discrete": Discrete,
    "logit_normal": LogitNormal,
    "log_normal": LogNormal,
    "mode": Mode,
    "stratified": Stratified,
    "importance": Importance,
}


def find_times(spec: str | Mapping[str, Any]) -> Times:
    """A distribution by its name in `TIMES`, such as `uniform`, or {name: ..., arguments}.

    Raises:
        UserError: unknown name or argument; names the nearest.
    """
    times: Times = find_named(TIMES, spec, "times")
    return times


Spacing = Literal["linspace", "leading", "trailing"]


def spaced_times(count: int, steps: int, spacing: Spacing, offset: int = 0, leaves_end_out: bool = False) -> Tensor:
    """`count` times of a chain of `steps`, from noise to data: step i in 0 .. steps - 1 is the time (i + 1) / steps.

    Args:
        spacing: `linspace`: evenly from the last step to the first, both among them; `leading`: every (steps // count)th from
            the first on; `trailing`: every (steps / count)th from the last down. Names and rounding are diffusers'.
        offset: added to the steps of `leading`.
        leaves_end_out: `linspace` and `leading` space one step more, and leave out the first of the chain, which is the data's end: as
            DPM-Solver's.
    Returns:
        (count,) float64, falling.
    Raises:
        UserError: more times than steps.
    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", table 2.
    """
    if not 1 <= count <= steps - leaves_end_out:
        raise UserError(f"sample.steps: got {count}; expected 1 to {steps - leaves_end_out}, the steps of the chain")
    spaced = count + leaves_end_out
    if spacing == "linspace":
        chosen = torch.linspace(0, steps - 1, spaced, dtype=torch.float64).round().flip(0)
    elif spacing == "leading":
        chosen = (torch.arange(spaced, dtype=torch.float64) * (steps // spaced)).flip(0) + offset
        if chosen[0] > steps - 1:
            raise UserError(f"sample.offset: got {offset}; expected at most {offset - int(chosen[0]) + steps - 1}")
    else:
        chosen = (steps - torch.arange(count, dtype=torch.float64) * (steps / count)).round() - 1
    return (chosen[:count] + 1) / steps


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
