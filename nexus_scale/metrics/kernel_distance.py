"""Maximum mean discrepancies of two sets of features: KID, and CMMD of CLIP's.

Sources: Gretton et al. 2012, "A Kernel Two-Sample Test"; Bińkowski et al. 2018, "Demystifying MMD GANs" (KID: a polynomial kernel,
unbiased); Jayasumana et al. 2024, "Rethinking FID" (CMMD: a Gaussian kernel on CLIP embeddings of unit length, biased, times 1000).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.metrics.moments import checked

Kernel = Callable[[Tensor, Tensor], Tensor]
"""Features (M, D) and (N, D) -> (M, N)."""

ROWS = 1024
"""Rows of a kernel matrix at a time; of 50,000 samples it would have 20 GB."""


class KernelDistance(NamedTuple):
    """Mean over the subsets, and their standard deviation (numpy's, over n): 0 for the whole set."""

    mean: float
    std: float


def kernel_inception_distance(
    x: Tensor, y: Tensor, *, subsets: int = 100, subset_size: int | None = 1000, seed: int = 2020
) -> KernelDistance:
    """KID: the kernel (<x, y> / D + 1)^3, in float64. Unbiased, so that it does not fall with the number of samples, and may be below 0.

    Args:
        x, y: features, (M, D) and (N, D); torch-fidelity's are 2048 of Inception.
        subsets, subset_size, seed: subsets are drawn without replacement as torch-fidelity draws them; `subset_size` None: all samples at
            once, in which nothing is drawn.
    Raises:
        ValueError: widths that differ, values that are not finite, fewer samples than a subset has or than 2.
    """
    x, y = _pair(x, y, subset_size or 2)
    if subset_size is None:
        return KernelDistance(mmd(x, y, polynomial), 0.0)
    drawn = np.random.RandomState(seed)
    found = []
    for _ in range(subsets):
        of_x, of_y = (torch.from_numpy(drawn.choice(len(of), subset_size, replace=False)) for of in (x, y))
        found.append(mmd(x[of_x], y[of_y], polynomial))
    return KernelDistance(float(np.mean(found)), float(np.std(found)))


def clip_mmd(x: Tensor, y: Tensor) -> float:
    """CMMD of image embeddings (M, D) and (N, D), which are brought to unit length: 0 or more; published figures are of CLIP ViT-L/14@336.

    Raises:
        ValueError: widths that differ, values that are not finite, fewer than 2 samples.
    """
    x, y = _pair(x, y, 2)
    return 1000.0 * mmd(F.normalize(x, dim=1), F.normalize(y, dim=1), gaussian, unbiased=False)


def mmd(x: Tensor, y: Tensor, kernel: Kernel, unbiased: bool = True) -> float:
    """Squared maximum mean discrepancy; unbiased without the pairs of a sample with itself."""
    within = sum(_sum(kernel, one, one, unbiased) / (len(one) * (len(one) - unbiased)) for one in (x, y))
    return within - 2 * _sum(kernel, x, y, False) / (len(x) * len(y))


def polynomial(x: Tensor, y: Tensor) -> Tensor:
    """(<x, y> / D + 1)^3."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: Tensor, y: Tensor, sigma: float = 10.0) -> Tensor:
    """exp(-|x - y|^2 / (2 sigma^2))."""
    squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return (squares / (-2 * sigma**2)).exp()


def _sum(kernel: Kernel, x: Tensor, y: Tensor, without_diagonal: bool) -> float:
    total = 0.0
    for start in range(0, len(x), ROWS):
        part = kernel(x[start : start + ROWS], y)
        total += float(part.sum() - (part.diagonal(start).sum() if without_diagonal else 0))
    return total


def _pair(x: Tensor, y: Tensor, least: int) -> tuple[Tensor, Tensor]:
    x, y = checked(x).double(), checked(y).double()
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        raise ValueError(
            f"got features {tuple(x.shape)} and {tuple(y.shape)}; expected one width and {least} samples at least"
        )
    return x, y.to(x)
