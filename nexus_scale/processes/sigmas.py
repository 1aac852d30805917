"""Noise levels sigma / alpha between a lowest and a highest, spaced as a sampler wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Field

from nexus_scale.contracts import UserError
from nexus_scale.processes.paths import find_named

Level = Annotated[float, Field(gt=0, le=1e9)]


def scales_at(done: float, first: int, last: int) -> int:
    """N(k) = ceil(sqrt(k / K ((last + 1)^2 - first^2) + first^2) - 1) + 1, the discretisation steps of consistency training once the part
    `done` = k / K, at most 1, of it is over. Source: Song et al. 2023, "Consistency Models"."""
    done = min(1.0, done)
    return math.ceil(math.sqrt(done * ((last + 1) ** 2 - first**2) + first**2) - 1) + 1


class Levels(Protocol):
    """A way to space noise levels; `low` and `high` are None where the path says what they are."""

    @property
    def low(self) -> float | None: ...

    @property
    def high(self) -> float | None: ...

    def between(self, low: float, high: float, places: np.ndarray) -> np.ndarray:
        """The levels at places in [0, 1], 0 is `high` and 1 is `low`; float64."""
        ...


@dataclass(frozen=True, kw_only=True)
class Karras:
    """Even in level ** (1 / rho): most of them near the data.

    Source: Karras et al. 2022, equation 5.
    """

    rho: Annotated[float, Field(ge=1, le=100)] = 7.0
    low: Level | None = None
    high: Level | None = None

    def between(self, low: float, high: float, places: np.ndarray) -> np.ndarray:
        first, last = high ** (1 / self.rho), low ** (1 / self.rho)
        return np.asarray((first + places * (last - first)) ** self.rho)


@dataclass(frozen=True, kw_only=True)
class Exponential:
    """Even in the logarithm of the level. Source: k-diffusion's get_sigmas_exponential."""

    low: Level | None = None
    high: Level | None = None

    def between(self, low: float, high: float, places: np.ndarray) -> np.ndarray:
        return np.exp(math.log(high) + places * (math.log(low) - math.log(high)))


@dataclass(frozen=True, kw_only=True)
class Beta:
    """At quantiles of a beta distribution: most of them at both ends.

    Source: Lee et al. 2024, "Beta Sampling is All You Need"; a = b = 0.6 are theirs.
    """

    a: Annotated[float, Field(ge=0.05, le=100)] = 0.6
    b: Annotated[float, Field(ge=0.05, le=100)] = 0.6
    low: Level | None = None
    high: Level | None = None

    def between(self, low: float, high: float, places: np.ndarray) -> np.ndarray:
        return low + beta_quantile(1 - places, self.a, self.b) * (high - low)


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def _beta_integral(x: np.ndarray, a: float, b: float) -> np.ndarray:
    """The integral of s^(a-1) (1-s)^(b-1) from 0 to x at most 1/2, where s^a = u takes the pole away."""
    end = x**a
    u = (_NODES + 1) / 2 * end[:, None]
    return (_WEIGHTS * (1 - u ** (1 / a)) ** (b - 1)).sum(1) * end / (2 * a)


def beta_quantile(u: np.ndarray, a: float, b: float) -> np.ndarray:
    """Where a beta variable's distribution function is u in [0, 1]; (N,) float64, to 1e-12."""
    half = np.array([0.5])
    below, above = _beta_integral(half, a, b), _beta_integral(half, b, a)

    def mass(x: np.ndarray) -> np.ndarray:
        left = _beta_integral(np.minimum(x, 0.5), a, b)
        right = below + above - _beta_integral(1 - np.maximum(x, 0.5), b, a)
        return np.where(x <= 0.5, left, right) / (below + above)

    low, high = np.zeros_like(u), np.ones_like(u)
    for _ in range(60):
        middle = (low + high) / 2
        beyond = mass(middle) > u
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return np.where(u <= 0, 0.0, np.where(u >= 1, 1.0, (low + high) / 2))


LEVELS: dict[str, type[Any]] = {"karras": Karras, "exponential": Exponential, "beta": Beta}


def find_levels(spec: str | Mapping[str, Any], where: str = "sample.sigmas") -> Levels:
    """A spacing by name (`karras`, `exponential`, `beta`), or {name: ..., low: ..., high: ..., arguments}.

    Raises:
        UserError: unknown name or argument, names the nearest; or a lowest level that is not below the highest.
    """
    levels: Levels = find_named(LEVELS, spec, where)
    if levels.low is not None and levels.high is not None and not levels.low < levels.high:
        raise UserError(f"{where}: got low {levels.low} and high {levels.high}; expected low below high")
    return levels
