"""Weights of an error by its signal-to-noise ratio (SNR), right for whatever the network predicts.

Papers state a weight for one target; here each is stated once, of the error in x0. At a given x_t an error in y = a*x0 + b*eps is one in x0
times det / sigma with det = alpha*b - sigma*a, and so weighs (sigma / det)^2 as much: Min-SNR is min(SNR, gamma) of x0,
min(SNR, gamma) / SNR of eps and min(SNR, gamma) / (SNR + 1) of v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.processes.gaussian import coefficients
from nexus_scale.processes.paths import Path, find_named

Gamma = Annotated[float, Field(gt=0, le=1e6)]

_LEAST = 1e-6
"""alpha and sigma are taken for at least this much: weights then have their limits at both ends."""

LARGEST = 1e5
"""A weight above it, which some few samples would have, leaves nothing to all others."""


class Weight(Protocol):
    """A weight of the squared error in x0, by alpha and sigma."""

    def scaled(self, signal: Tensor, noise: Tensor) -> Tensor:
        """The weight times sigma^2, elementwise, from alpha^2 and sigma^2, neither of them 0."""
        ...


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Each sample's error in the target counts the same: what DDPM calls simple."""

    def scaled(self, signal: Tensor, noise: Tensor) -> Tensor:
        raise NotImplementedError("constant in the target, not in x0")


@dataclass(frozen=True, kw_only=True)
class MinSNR:
    """min(SNR, gamma). Source: Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy", section 3.4."""

    gamma: Gamma = 5.0

    def scaled(self, signal: Tensor, noise: Tensor) -> Tensor:
        return torch.minimum(signal, self.gamma * noise)


@dataclass(frozen=True, kw_only=True)
class SoftMinSNR:
    """SNR * gamma / (SNR + gamma), without Min-SNR's corner. gamma is 1 / sigma_data^2.

    Source: Crowson et al. 2024, "Hourglass Diffusion Transformers", section 4.3.
    """

    gamma: Gamma = 4.0

    def scaled(self, signal: Tensor, noise: Tensor) -> Tensor:
        return self.gamma * signal * noise / (signal + self.gamma * noise)


@dataclass(frozen=True, kw_only=True)
class P2:
    """SNR / (k + SNR)^gamma: eps' constant weight, divided by (k + SNR)^gamma.

    Source: Choi et al. 2022, "Perception Prioritized Training of Diffusion Models", equation 8.
    """

    gamma: Annotated[float, Field(ge=0, le=10)] = 1.0
    k: Gamma = 1.0

    def scaled(self, signal: Tensor, noise: Tensor) -> Tensor:
        return signal * (noise / (self.k * noise + signal)) ** self.gamma


@dataclass(frozen=True, kw_only=True)
class EDMWeight:
    """SNR + 1 / sigma_data^2, under which the target `edm` has weight 1. Source: Karras et al. 2022, table 1."""

    sigma_data: Annotated[float, Field(gt=0, le=1e3)] = 0.5

    def scaled(self, signal: Tensor, noise: Tensor) -> Tensor:
        return signal + noise / self.sigma_data**2


@dataclass(frozen=True, kw_only=True)
class Debiased:
    """sqrt(SNR), which is 1 / sqrt(SNR) of eps. Source: Yu et al. 2023, "Unmasking Bias in Diffusion Model Training", equation 15."""

    def scaled(self, signal: Tensor, noise: Tensor) -> Tensor:
        return (signal * noise).sqrt()


WEIGHTS: dict[str, type[Any]] = {
    "constant": Constant,
    "min_snr": MinSNR,
    "soft_min_snr": SoftMinSNR,
    "p2": P2,
    "edm": EDMWeight,
    "debiased": Debiased,
}


def find_weight(spec: str | Mapping[str, Any], where: str = "weight") -> Weight:
    """A weight by its name in `WEIGHTS`, such as `min_snr`, or {name: ..., arguments}.

    Raises:
        UserError: unknown name or argument; names the nearest.
    """
    weight: Weight = find_named(WEIGHTS, spec, where)
    return weight


def weight_of(weight: Weight, path: Path, target: str, t: Tensor) -> Tensor | None:
    """What a sample's squared error in the target counts at time t, (B,) float32; None: 1, everywhere.

    Args:
        target: what the network predicts; see `gaussian.coefficients`.
        t: (B,).
    """
    if isinstance(weight, Constant):
        return None
    t = t.double()
    alpha, sigma = path.alpha(t).clamp_min(_LEAST), path.sigma(t).clamp_min(_LEAST)
    a, b = coefficients(path, target, t)
    det = alpha * b - sigma * a
    return (weight.scaled(alpha.square(), sigma.square()) / det.square()).float()
