"""Peak signal-to-noise ratio."""

from __future__ import annotations

import torch
from torch import Tensor


def psnr(x: Tensor, y: Tensor, peak: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each sample in dB: 10 log10(peak^2 / MSE).

    Args:
        x, y: (B, ...), same shape.
        peak: distance of the largest from the smallest possible value; 2 for images in [-1, 1].
    Returns:
        (B,) float32; infinite where x equals y.
    Raises:
        ValueError: the shapes differ.
    """
    if x.shape != y.shape:
        raise ValueError(f"psnr: got shapes {tuple(x.shape)} and {tuple(y.shape)}; expected the same")
    mse = (x.float() - y.float()).square().flatten(1).mean(1)
    return 10.0 * torch.log10(peak**2 / mse)
