"""How varied samples are, and which modes of a known mixture they reach."""

from __future__ import annotations

import torch
from torch import Tensor

SIDE = 16
"""Height and width that samples are averaged down to before they are compared."""


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
