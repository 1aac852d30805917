"""Fréchet distance of two sets of features, each treated as a normal distribution.

    |m_x - m_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2))

Source: Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule ...", equation 6. The trace of the root without a root: with
C = A^T A it is the sum of the singular values of A_x A_y^T (Mathiasen & Hvilshøj 2020, "Backpropagating through Fréchet Inception
Distance"). That is exact for singular covariances too, which fewer samples than features have; matrix roots lose half of the digits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(
    x: Tensor, y: Tensor, *, x_weights: Tensor | None = None, y_weights: Tensor | None = None
) -> float:
    """Squared distance between the normal distributions of x and y, in float64.

    It falls with the number of samples: compare figures of equal numbers only.

    Args:
        x, y: features, (M, D) and (N, D).
        x_weights, y_weights: of each sample, positive, (M,) and (N,); alike unless given. Only their ratios count.
    Raises:
        ValueError: widths that differ, fewer than two samples, features that are not finite.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"frechet_distance: got features {tuple(x.shape)} and {tuple(y.shape)}; expected (M, D) and (N, D), with M and N at least 2"
        )
    x_mean, x_factor = _moments(x, x_weights)
    y_mean, y_factor = _moments(y, y_weights)
    root = torch.linalg.svdvals(x_factor @ y_factor.T).sum()
    spread = x_factor.square().sum() + y_factor.square().sum() - 2 * root
    return float((x_mean - y_mean).square().sum() + spread.clamp_min(0.0))


def _moments(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean (D,), and A of at most D rows with A^T A = the covariance, unbiased; float64."""
    x = x.detach().double()
    if not bool(x.isfinite().all()):
        raise ValueError("frechet_distance: got features that are not finite")
    w = torch.ones(len(x), dtype=x.dtype, device=x.device) if weights is None else weights.detach().to(x)
    if w.shape != (len(x),) or not bool((w > 0).all()):
        raise ValueError(
            f"frechet_distance: got weights {tuple(w.shape)}; expected a positive one for each of {len(x)}"
        )
    w = w / w.sum()
    mean = w @ x
    deviations = (w / (1 - w.square().sum())).sqrt()[:, None] * (x - mean)  # n / (n - 1) for equal weights
    return mean, torch.linalg.qr(deviations, mode="r").R if len(x) > x.shape[1] else deviations
