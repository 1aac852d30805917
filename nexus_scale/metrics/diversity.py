"""How varied samples are, and which modes of a known mixture they reach."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]

SIDE = 16
"""Height and width that samples are averaged down to before they are compared."""

MOST_PAIRED = 2048
"""Samples of which pairs are drawn: two million."""


def small(samples: Tensor) -> Tensor:
    """Samples (N, ..., H, W) averaged down to at most SIDE x SIDE, and flat: (N, D) float32. What has no height and width is only flat."""
    samples = samples.float()
    if samples.ndim >= 4:
        flat = samples.flatten(1, -3)
        height, width = flat.shape[-2:]
        samples = torch.nn.functional.adaptive_avg_pool2d(flat, (min(SIDE, height), min(SIDE, width)))
    return samples.flatten(1)


def diversity(samples: Tensor, groups: Tensor | None = None) -> float:
    """The deviation of a value from its mean over the samples of its group, root mean square: 0 where all samples of a group are one.

    Args:
        samples: (N, D).
        groups: of samples that were drawn under the same condition, (N,) integers; None: all were.
    """
    groups = torch.zeros(len(samples), dtype=torch.int64) if groups is None else groups.cpu()
    x = samples.detach().cpu().double()
    _, number, counts = groups.unique(return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), x.shape[1], dtype=x.dtype).index_add_(0, number, x) / counts[:, None]
    freedom = max(1, len(x) - len(counts))
    return float(((x - means[number]).square().sum() / (freedom * x.shape[1])).sqrt())


def grid_of_modes(side: int, spacing: float) -> Tensor:
    """The modes of a mixture that stand in so many rows of so many in the plane, around 0: (side^2, 2) float64."""
    places = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) * spacing
    return torch.cartesian_prod(places, places).view(-1, 2)


def mode_coverage(samples: Tensor, centres: Tensor, radius: float) -> tuple[int, float]:
    """How many modes are reached by a sample within `radius`, and the share of samples that lie within it of their nearest mode.

    Source: Srivastava et al. 2017, "VEEGAN"; Lin et al. 2018, "PacGAN": three standard deviations of a mode.

    Args:
        samples: (N, D).
        centres: of the modes, (K, D).
    """
    distance, nearest = torch.cdist(samples.double(), centres.to(samples).double()).min(dim=1)
    near = distance <= radius
    return len(nearest[near].unique()), float(near.double().mean())


class PairDiversity(NamedTuple):
    """Mean distance of pairs of samples that were drawn under one condition, and under different ones; nan where there is no such pair."""

    within: float
    across: float
    pairs: tuple[int, int]


def pair_diversity(
    samples: Tensor,
    distance: Distance,
    groups: Tensor | None = None,
    *,
    pairs: int = 1000,
    seed: int = 0,
    batch: int = 32,
) -> PairDiversity:
    """How different samples look from each other, by LPIPS (higher is more varied) or MS-SSIM (lower is).

    Sources: Odena et al. 2017, "Conditional Image Synthesis with Auxiliary Classifier GANs" (MS-SSIM within a class); Zhu et al. 2017,
    "Toward Multimodal Image-to-Image Translation" (LPIPS).

    Args:
        samples: (N, C, H, W).
        distance: of two batches of images, (B, C, H, W) each -> (B,).
        groups: of samples that were drawn under the same condition, (N,) integers; None: all were.
        pairs: of each kind, at most, drawn by the seed of all pairs of at most 2048 samples; without repetition.
    """
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:MOST_PAIRED].sort().values
    samples, groups = samples[chosen], None if groups is None else groups.cpu()[chosen]
    groups = torch.zeros(len(samples), dtype=torch.int64) if groups is None else groups
    first, second = torch.triu_indices(len(samples), len(samples), offset=1)
    same = groups[first] == groups[second]
    means, counts = [], []
    for kind in (same, ~same):
        generator = torch.Generator().manual_seed(seed)
        places = kind.nonzero()[:, 0]
        places = places[torch.randperm(len(places), generator=generator)[:pairs]]
        found = [
            distance(samples[first[at]], samples[second[at]]).double().cpu() for at in places.split(batch) if len(at)
        ]
        means.append(float(torch.cat(found).mean()) if found else math.nan)
        counts.append(len(places))
    return PairDiversity(means[0], means[1], (counts[0], counts[1]))
