"""Which times training looks at: distributions over [0, t_max], and the shift towards noise at higher resolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from nexus_scale.contracts import Rng
from nexus_scale.processes.gaussian import find_named


class Times(Protocol):
    """A distribution of training times; its draws are named `times`."""

    def sample(self, rng: Rng) -> Tensor:
        """One time per sample, (B,) float32."""
        ...

    def quantile(self, u: Tensor) -> Tensor:
        """The time below which a share u in (0, 1) of the draws lies; elementwise."""
        ...


def _standard_normal_quantile(u: Tensor) -> Tensor:
    return math.sqrt(2) * torch.erfinv(2 * u - 1)


@dataclass(frozen=True, kw_only=True)
class Uniform:
    """Uniform on [0, 1)."""

    def sample(self, rng: Rng) -> Tensor:
        return rng.uniform("times")

    def quantile(self, u: Tensor) -> Tensor:
        return u


@dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """sigmoid(n), n ~ Normal(mean, std): most draws in the middle; a positive mean leans towards noise.

    Source: Esser et al. 2024, section 3.1; mean 0 and std 1 are their best.
    """

    mean: float = 0.0
    std: float = 1.0

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

    mean: float = -1.2
    std: float = 1.2

    def sample(self, rng: Rng) -> Tensor:
        return torch.exp(self.mean + self.std * rng.normal("times", ()).double()).float()

    def quantile(self, u: Tensor) -> Tensor:
        return torch.exp(self.mean + self.std * _standard_normal_quantile(u))


TIMES: dict[str, type[Any]] = {"uniform": Uniform, "logit_normal": LogitNormal, "log_normal": LogNormal}


def find_times(spec: str | Mapping[str, Any]) -> Times:
    """A distribution by name (`uniform`, `logit_normal`, `log_normal`), or {name: ..., arguments}.

    Raises:
        UserError: unknown name or argument; names the nearest.
    """
    times: Times = find_named(TIMES, spec, "times")
    return times


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
