"""Fréchet distance of two sets of features, each treated as a normal distribution: FID, sFID, FVD, FAD, by what the features are.

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))

Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule ...", equation 6. The trace of the root without a root: with
C = A^T A it is the sum of the singular values of A_x A_y^T (Mathiasen & Hvilshøj 2020, "Backpropagating through Fréchet Inception
Distance"). That is exact for singular covariances too, which fewer samples than features have; matrix roots lose half of the digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_scale.metrics.moments import Moments, checked


def frechet_distance(
    x: Tensor | Moments, y: Tensor | Moments, *, x_weights: Tensor | None = None, y_weights: Tensor | None = None
) -> float:
    """Squared distance between the normal distributions of x and y, in float64.

    It falls with the number of samples: compare figures of equal numbers only.

    Args:
        x, y: features, (M, D) and (N, D), or their moments.
        x_weights, y_weights: of each sample, positive, (M,) and (N,); alike unless given. Only their ratios count.
    Raises:
        ValueError: widths that differ, fewer than two samples, features that are not finite.
    """
    x_mean, x_factor = _mean_and_factor(x, x_weights)
    y_mean, y_factor = _mean_and_factor(y, y_weights)
    if x_mean.shape != y_mean.shape:
        raise ValueError(
            f"frechet_distance: got features of {len(x_mean)} and of {len(y_mean)} values; expected as many"
        )
    y_mean, y_factor = y_mean.to(x_mean), y_factor.to(x_factor)
    root = torch.linalg.svdvals(x_factor @ y_factor.T).sum()
    spread = x_factor.square().sum() + y_factor.square().sum() - 2 * root
    return float((x_mean - y_mean).square().sum() + spread.clamp_min(0.0))


def _mean_and_factor(x: Tensor | Moments, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean (D,), and A of at most D rows with A^T A = the covariance, unbiased; float64."""
    if isinstance(x, Moments):
        if weights is not None:
            raise ValueError("frechet_distance: got weights beside moments, which have their own")
        return x.mean, x.factor()
    x = checked(x).double()
    if len(x) < 2:
        raise ValueError(f"frechet_distance: got features {tuple(x.shape)}; expected at least 2 samples")
    w = torch.ones(len(x), dtype=x.dtype, device=x.device) if weights is None else weights.detach().to(x)
    if w.shape != (len(x),) or not bool((w > 0).all()):
        raise ValueError(
            f"frechet_distance: got weights {tuple(w.shape)}; expected a positive one for each of {len(x)}"
        )
    w = w / w.sum()
    mean = w @ x
    deviations = (w / (1 - w.square().sum())).sqrt()[:, None] * (x - mean)  # n / (n - 1) for equal weights
    return mean, torch.linalg.qr(deviations, mode="r").R if len(x) > x.shape[1] else deviations
