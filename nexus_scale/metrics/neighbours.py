"""Metrics of nearest neighbours in feature space: precision, recall, density, coverage; and whom a sample resembles most."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nexus_scale.metrics.moments import checked

ROWS = 1024
"""Rows of a distance matrix at a time."""


class Manifolds(NamedTuple):
    """Shares of samples: of drawn ones that are like real ones, of real ones that are like drawn ones, how many real ones' neighbourhoods a
    drawn one lies in (over k; may exceed 1), and of real ones with a drawn one in their neighbourhood."""

    precision: float
    recall: float
    density: float
    coverage: float


def manifolds(real: Tensor, drawn: Tensor, *, k: int = 5) -> Manifolds:
    """Precision, recall, density and coverage of features (M, D) and (N, D), in float64.

    A neighbourhood is the ball around a sample that reaches to its k-th neighbour of the same set, without its boundary. Numbers of samples
    and k decide the figures: state them. Published: k = 3 (Kynkäänniemi 2019), k = 5 with 10,000 samples (Naeem 2020).
    Sources: Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric ..."; Naeem et al. 2020, "Reliable Fidelity and Diversity
    Metrics for Generative Models".

    Raises:
        ValueError: widths that differ, values that are not finite, at most k samples.
    """
    real, drawn = _pair(real, drawn)
    if not 1 <= k < min(len(real), len(drawn)):
        raise ValueError(f"got {len(real)} real and {len(drawn)} drawn samples; expected more than k = {k} of each")
    real_radius, drawn_radius = (_radii(one, k) for one in (real, drawn))
    inside = torch.zeros(len(drawn), dtype=torch.int64, device=real.device)  # how many real neighbourhoods each lies in
    recalled, covered = 0, 0
    for start in range(0, len(real), ROWS):
        distances = _squares(real[start : start + ROWS], drawn)
        radius = real_radius[start : start + ROWS, None]
        inside += (distances < radius).sum(0)
        recalled += int((distances < drawn_radius).any(1).sum())
        covered += int((distances < radius).any(1).sum())
    return Manifolds(
        precision=float((inside > 0).double().mean()),
        recall=recalled / len(real),
        density=float(inside.double().mean()) / k,
        coverage=covered / len(real),
    )


class Neighbours(NamedTuple):
    """Distances (N, k), the nearest first, and their places in the other set (N, k)."""

    distances: Tensor
    places: Tensor


def nearest(x: Tensor, y: Tensor, k: int = 1) -> Neighbours:
    """The k nearest of y (M, D) to each of x (N, D): what to show beside samples, and what memorisation is told by.

    Raises:
        ValueError: widths that differ, values that are not finite, fewer than k in y.
    """
    x, y = _pair(x, y)
    if not 1 <= k <= len(y):
        raise ValueError(f"got {len(y)} samples to choose {k} nearest of")
    found = [_squares(part, y).topk(k, dim=1, largest=False) for part in x.split(ROWS)]
    return Neighbours(torch.cat([f.values for f in found]).sqrt(), torch.cat([f.indices for f in found]))


def _radii(x: Tensor, k: int) -> Tensor:
    """Squared distance of each to its k-th neighbour in the same set: the (k + 1)-th, for the first is itself."""
    return torch.cat([_squares(part, x).kthvalue(k + 1, dim=1).values for part in x.split(ROWS)])


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances (M, N); copies are at 0 and not at what rounding leaves of it."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = norms - 2 * x @ y.T
    return squares.masked_fill(squares < 1e-13 * norms, 0.0)


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = checked(x).double(), checked(y).double()
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"got features of {x.shape[1]} and of {y.shape[1]} values; expected as many")
    return x, y.to(x)
