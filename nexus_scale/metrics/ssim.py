"""Structural similarity of pairs of images, by pytorch-msssim.

Sources: Wang et al. 2004, "Image Quality Assessment"; Wang et al. 2003, "Multiscale Structural Similarity": a Gaussian window of 11
pixels and deviation 1.5, where it lies within the image; the values of all channels averaged. torchmetrics averages over mirrored borders
too, which differs in the third digit.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nexus_scale.contracts import UserError

WINDOW, SCALES = 11, 5


def ssim(x: Tensor, y: Tensor, least: float = -1.0, peak: float = 2.0) -> Tensor:
    """SSIM of each image, (B,) float64: 1 where x equals y.

    Args:
        x, y: (B, C, H, W), same shape, of at least 11 pixels.
        least, peak: the smallest possible value, and the distance of the largest from it; images in [-1, 1] unless given.
    Raises:
        ValueError: the shapes differ, or the images are too small.
        UserError: pytorch-msssim is not installed.
    """
    _check(x, y, WINDOW)
    made: Tensor = _library().ssim(x.double() - least, y.double() - least, data_range=peak, size_average=False)
    return made


def ms_ssim(x: Tensor, y: Tensor, least: float = -1.0, peak: float = 2.0) -> Tensor:
    """Multi-scale SSIM of each image at five scales, (B,) float64; as `ssim`, of at least 161 pixels."""
    _check(x, y, (WINDOW - 1) * 2 ** (SCALES - 1) + 1)
    made: Tensor = _library().ms_ssim(x.double() - least, y.double() - least, data_range=peak, size_average=False)
    return made


def _check(x: Tensor, y: Tensor, pixels: int) -> None:
    if x.shape != y.shape or x.ndim != 4 or min(x.shape[2:]) < pixels:
        raise ValueError(
            f"got images {tuple(x.shape)} and {tuple(y.shape)}; expected the same (B, C, H, W), of at least {pixels} pixels"
        )


def _library() -> Any:
    try:
        import pytorch_msssim
    except ImportError:
        raise UserError("SSIM needs pytorch-msssim; pip install 'nexus-scale[score-images]'") from None
    return pytorch_msssim
