"""What samplers share: the grid of times that they walk, and what they ask for on the way.

Two ways to choose a grid. By times: `spacing` picks steps of the chain that the network was trained on. By noise levels: `sigmas` spaces
sigma / alpha, and the path says at which time it has each of them.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import Predictor, Rng, Start, UserError
from nexus_scale.processes.chains import Chain
from nexus_scale.processes.paths import EDM, Path
from nexus_scale.processes.sigmas import find_levels
from nexus_scale.processes.times import Spacing, shift_time, spaced_times
from nexus_scale.samplers.start import first_step, noised

# No `from __future__ import annotations`: types of inherited settings are read in the modules of the samplers.

CHAIN = 1000
"""Steps of the chain on continuous paths."""

EDM_LOW = 0.002
"""The lowest level of noise on EDM's path. Source: Karras et al. 2022, table 1."""

SMALLEST_ALPHA = 1e-6
"""Below it there is no signal, and sigma / alpha counts as infinite."""

Steps = Annotated[int, Field(ge=1, le=10_000)]
Share = Annotated[float, Field(ge=0, le=1)]
NoiseLevel = Annotated[float, Field(ge=0, le=1e9)]


def chain_of(path: Path) -> int:
    """Steps of the chain that a path is made of, or is cut into."""
    return path.steps if isinstance(path, Chain) else CHAIN


@dataclass(frozen=True)
class Point:
    """A time, and alpha and sigma there."""

    t: float
    alpha: float
    sigma: float

    @property
    def ratio(self) -> float:
        """sigma / alpha: the noise level of x / alpha."""
        return self.sigma / self.alpha if self.alpha >= SMALLEST_ALPHA else math.inf

    @property
    def log_snr(self) -> float:
        """log(alpha / sigma), infinite at both ends of a path."""
        return math.inf if self.sigma <= 0 else -math.inf if self.ratio == math.inf else -math.log(self.ratio)


def points_at(path: Path, times: list[float]) -> list[Point]:
    """Points of a path, computed in float64."""
    t = torch.tensor(times, dtype=torch.float64)
    return [Point(*one) for one in zip(t.tolist(), path.alpha(t).tolist(), path.sigma(t).tolist(), strict=True)]


def times_of(path: Path, ratios: list[float]) -> list[float]:
    """Where sigma / alpha of a path has these values, which grows with t on every path; t_max where it stays below."""
    if isinstance(path, EDM):
        return ratios
    wanted = torch.tensor(ratios, dtype=torch.float64)[:, None]
    low, width = torch.zeros_like(wanted), path.t_max
    places = torch.arange(_CUTS + 1, dtype=torch.float64) / _CUTS
    for _ in range(10):  # to 2^-60 of t_max
        t = low + width * places  # (N, cuts + 1)
        below = (path.sigma(t) <= wanted * path.alpha(t)).sum(1, keepdim=True) - 1
        low, width = t.gather(1, below.clamp(0, _CUTS - 1)), width / _CUTS
    return (low + width)[:, 0].clamp_max(path.t_max).tolist()


_CUTS = 64
"""Parts into which an interval is cut at once, to find a time in it."""


@dataclass(frozen=True)
class Walk:
    """One walk: what a solver may ask."""

    denoise: Predictor
    path: Path
    points: list[Point]
    clip: Callable[[Tensor], Tensor] | None
    rng: Rng | None

    @property
    def steps(self) -> int:
        return len(self.points) - 1

    @property
    def pairs(self) -> list[tuple[Point, Point]]:
        """Where each step begins and ends."""
        return list(pairwise(self.points))

    def predict(self, x: Tensor, at: Point, keeps_eps: bool = False) -> tuple[Tensor, Tensor]:
        """x0 and eps of x at a point; where x0 is clipped, eps is what is then left of x, unless it is kept."""
        x0, eps, *_ = self.denoise(x, torch.full((len(x),), at.t, dtype=x.dtype, device=x.device))
        if self.clip is None:
            return x0, eps
        x0 = self.clip(x0)
        return x0, eps if keeps_eps else (x - at.alpha * x0) / at.sigma

    def noise(self, name: str, x: Tensor) -> Tensor:
        """Standard normal numbers of x's shape that depend on each sample alone."""
        if self.rng is None:
            raise ValueError(f"the sampler draws {name!r}: it needs `rng`")
        return self.rng.normal(name, x.shape[1:]).to(x.dtype)

    def at_ratio(self, ratio: float) -> Point:
        """The point of a noise level; the path's last one where it has none so high."""
        return points_at(self.path, times_of(self.path, [ratio]))[0]


@dataclass(kw_only=True)
class Stepwise:
    """A sampler that walks down a grid.

    Attributes:
        steps: from noise to data.
        spacing: which of the chain's steps, see `spaced_times`.
        sigmas: `spaced`: the levels of noise that those steps have (on EDM's path, Karras's); or karras, exponential or beta, or
            {name: karras, rho: 7.0, low: 0.03, high: 15.0}: levels from the chain's highest to its lowest, whatever `spacing` says.
        offset: added to the steps of `leading`: Stable Diffusion's `steps_offset`, 1.
        final: `data` ends at t = 0, `first` at the first step of the chain (diffusers' `set_alpha_to_one: false`, `sigma_min`).
        shift: of spaced times towards noise, see `shift_time`.
        clip: x0 on the way: True keeps it in [-1, 1], {to: 2.0} in another range; {quantile: 0.995, most: 1.0} is Imagen's dynamic
            thresholding: cut at that quantile of a sample's |x0|, at least 1, at most `most`, and divided by it.
    """

    steps: Steps = 25
    spacing: Spacing = "trailing"
    sigmas: str | Mapping[str, Any] = "spaced"
    offset: Annotated[int, Field(ge=0, le=1000)] = 0
    final: Literal["data", "first"] = "data"
    shift: Annotated[float, Field(gt=0, le=1000)] = 1.0
    clip: bool | Mapping[str, Any] = False

    walks: ClassVar[Literal["denoise"]] = "denoise"
    learns_variance: ClassVar[bool] = False
    chain_alone: ClassVar[bool] = False
    """It counts in steps of a chain, which EDM's path is not."""
    leaves_end_out: ClassVar[bool] = False
    """`linspace` and `leading` space one step more, and the last, at the data, is left out."""
    ends_at_ratio: ClassVar[bool] = False
    """It begins with sigma times noise where the grid begins in noise alone, as k-diffusion's samplers do; others with noise as it is."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"sample.steps: got {self.steps}; expected at least 1")
        self._levels = None if self.sigmas == "spaced" else find_levels(self.sigmas)
        self._clip = clipping(self.clip)

    @property
    def needs_signal(self) -> bool:
        """Whether it steps in sigma / alpha, which is infinite where a path ends in noise alone."""
        return False

    # ------------------------------------------------------------------------------------------------ the grid

    def spaced(self, path: Path) -> list[float]:
        """Times by `spacing`, from noise to data, without the last."""
        times = spaced_times(self.steps, chain_of(path), self.spacing, self.offset, self.leaves_end_out)
        return shift_time(times, self.shift).tolist()

    def leveled(self, path: Path) -> list[float]:
        """Times by `sigmas`, from noise to data, without the last."""
        levels = self._levels or find_levels("karras")
        low, high = levels.low, levels.high
        if isinstance(path, EDM):
            ends = [EDM_LOW, path.t_max]
        else:
            ends = [point.ratio for point in points_at(path, [1 / chain_of(path), path.t_max])]
        low, high = (given or end for given, end in zip((low, high), ends, strict=True))
        if not low < high < math.inf:
            raise UserError(
                f"sample.sigmas: got {self.sigmas!r} from {low:g} to {high:g} on {path}; expected low below high, and a high that is finite"
            )
        return times_of(path, levels.between(low, high, self.places()).tolist())

    @property
    def lowest(self) -> float | None:
        """The lowest level that `sigmas` names."""
        return self._levels.low if self._levels is not None else None

    def places(self) -> np.ndarray:
        """Where the levels lie between the highest, 0, and the lowest, 1."""
        return np.linspace(0, 1, self.steps)

    def points(self, path: Path) -> list[Point]:
        """From noise to data, steps + 1."""
        by_level = self._levels is not None or isinstance(path, EDM)
        if self.final == "first" and isinstance(path, EDM):
            raise UserError(f"sample.final: 'first' is the first step of a chain; {path} is none: choose data")
        last = 0.0 if self.final == "data" else 1 / chain_of(path)
        return points_at(path, [*(self.leveled(path) if by_level else self.spaced(path)), last])

    def times(self, path: Path) -> Tensor:
        """The grid's times, (steps + 1,) float64."""
        return torch.tensor([point.t for point in self.points(path)], dtype=torch.float64)

    # ------------------------------------------------------------------------------------------------ the walk

    def solve(self, walk: Walk, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """x after each step, and the x0 that it was told there."""
        raise NotImplementedError

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
        """Walks the grid.

        Args:
            denoise: `denoise(x_t, t) -> (x0, eps)`, t (B,) on x_T's device.
            x_T: standard normal noise, (B, ...).
            path: the one that `denoise` recovers with.
            rng: draws `noise_<step>` of x_T's shape, one row a sample; not needed by samplers that draw none.
            callback: `callback(step, t, x, x0)` after each step: steps done, the time reached, the state and its x0.
            start: samples that the walk begins at, instead of noise alone.
        Returns:
            x0, (B, ...) float32 (float64 where x_T is), in model space.
        Raises:
            UserError: a grid that the path or the sampler does not have.
        """
        if self.chain_alone and isinstance(path, EDM):
            raise UserError(
                f"sample: {type(self).__name__} walks times of a chain; {path} is none: choose heun, euler or dpm_multistep"
            )
        first = first_step(start, self.steps)
        points = self.points(path)[first:]
        if self.needs_signal and points[0].ratio == math.inf:
            raise UserError(
                f"sample: {type(self).__name__} steps in sigma / alpha, which is infinite at t = {points[0].t:g} on {path}; begin below it "
                "(spacing leading, or sigmas with a high), or choose ode, ddim or dpm_multistep"
            )
        x = x_T if x_T.dtype == torch.float64 else x_T.float()
        if start is not None:
            x = noised(start, path, points[0].t, x)
        elif isinstance(path, EDM) or (self.ends_at_ratio and self.spacing != "leading"):
            x = x * points[0].sigma
        walk = Walk(denoise, path, points, self._clip, rng)
        for step, (x, x0) in enumerate(self.solve(walk, x), start=1):  # noqa: B020
            if callback is not None:
                callback(first + step, points[step].t, x, x0)
        return x


def clipping(spec: bool | Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """What a setting `clip` does with x0."""
    if isinstance(spec, bool):
        return (lambda x0: x0.clamp(-1, 1)) if spec else None
    values = dict(spec)
    known = {"to"} if "to" in values else {"quantile", "most"}
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v < 1e9 for v in values.values())
    if (
        not values
        or set(values) - known
        or not numbers
        or values.get("quantile", 0.995) > 1
        or values.get("most", 1) < 1
    ):
        raise UserError(f"sample.clip: got {spec!r}; expected true, {{to: 1.0}}, or {{quantile: 0.995, most: 1.0}}")
    if "to" in values:
        return lambda x0: x0.clamp(-values["to"], values["to"])
    return lambda x0: threshold(x0, values.get("quantile", 0.995), values.get("most", 1.0))


def threshold(x0: Tensor, quantile: float, most: float) -> Tensor:
    """x0 cut at that quantile of each sample's absolute values, between 1 and `most`, and divided by it.

    Source: Saharia et al. 2022 (Imagen), section 2.3.
    """
    # row by row: torch.quantile takes 16 million values at once
    bound = torch.stack([row.abs().flatten().quantile(quantile) for row in x0]).clamp(1.0, most)
    bound = bound.view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-bound, bound) / bound


def toward(x0: Tensor, eps: Tensor, here: Point, there: Point, eta: float = 0.0) -> tuple[Tensor, float]:
    """x at `there` without the noise that is still to be added, and that noise's standard deviation: a step of DDIM, which is Euler's in
    sigma / alpha; with eta = 1 DDPM's, or Euler's ancestral step.

    Source: Song et al. 2021 (DDIM), equations 12 and 16.
    """
    large = here.sigma**2 - (here.alpha / there.alpha * there.sigma) ** 2
    std = eta * math.sqrt(max(large, 0.0)) * there.sigma / here.sigma
    return there.alpha * x0 + math.sqrt(max(there.sigma**2 - std**2, 0.0)) * eps, std
