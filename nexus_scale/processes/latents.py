"""Converts stored posterior moments to model-space latents, and back.

Three vocabularies, after Karras et al. 2024 (EDM2): moments (stored), latents z (a draw of the posterior), and
model-space latents (z - mean) / std per channel. Published autoencoders state that normalisation as (z - shift) * scale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_scale.kernels.transfer import constant

LOGVAR_RANGE = (-30.0, 20.0)
"""diffusers' DiagonalGaussianDistribution clamps to it; outside, exp under- or overflows in half precision."""


@dataclass(frozen=True)
class LatentStats:
    """Per-channel normalisation of latents z: mean and deviation over the data set, or the autoencoder's own constants."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def stated(
        cls,
        channels: int,
        scale: float,
        shift: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> LatentStats:
        """The statistics of an autoencoder with latents (z - mean - shift) * scale / std, as in diffusers' pipelines.

        Args:
            mean, std: one number per channel; 0 and 1 unless given.
        Raises:
            ValueError: numbers that are no normalisation, or of other channels.
        """
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scaling_factor {scale}; expected a positive finite number")
        centres = tuple(mean) if mean is not None else (0.0,) * channels
        widths = tuple(std) if std is not None else (1.0,) * channels
        if len(centres) != channels or len(widths) != channels:
            raise ValueError(f"latents_mean and latents_std of {len(centres)} and {len(widths)}; expected {channels}")
        return cls(tuple(float(centre) + shift for centre in centres), tuple(float(width) / scale for width in widths))

    @property
    def factors(self) -> tuple[float, float] | None:
        """(scale, shift) with (z - shift) * scale if all channels share them; else None."""
        if len(set(self.mean)) > 1 or len(set(self.std)) > 1:
            return None
        return 1.0 / self.std[0], self.mean[0]

    def __str__(self) -> str:
        if self.factors is not None:
            return "(z - {1:.6g}) * {0:.6g}".format(*self.factors)
        mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (self.mean, self.std))
        return f"(z - [{mean}]) / [{std}]"

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(
                f"latent mean has {len(self.mean)} channels and std {len(self.std)}; expected equally many, at least 1"
            )
        if not all(math.isfinite(value) for value in self.mean):
            raise ValueError(f"latent mean {self.mean}; expected finite numbers")
        if not all(0 < value < float("inf") for value in self.std):
            raise ValueError(
                f"latent std {self.std}; expected positive finite numbers: a channel that never varies carries nothing"
            )


def split_moments(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(B, 2C, ...) -> mean and log-variance clamped to [-30, 20], each (B, C, ...) float32.

    Raises:
        ValueError: an odd number of channels.
    """
    if moments.ndim < 2 or moments.shape[1] % 2:
        raise ValueError(
            f"moments of shape {tuple(moments.shape)}; expected (B, 2C, ...): mean and log-variance on channels"
        )
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean, logvar.clamp(*LOGVAR_RANGE)


def sample_moments(moments: Tensor, eps: Tensor) -> Tensor:
    """A draw z = mean + std * eps of the posterior, (B, C, ...) float32.

    Args:
        moments: (B, 2C, ...), any floating dtype.
        eps: standard normal, (B, C, ...).
    """
    mean, logvar = split_moments(moments)
    return torch.addcmul(mean, torch.exp(0.5 * logvar), eps)


def _channels(values: tuple[float, ...], z: Tensor) -> Tensor:
    if z.shape[1] != len(values):
        raise ValueError(
            f"latents of shape {tuple(z.shape)} have {z.shape[1]} channels; the statistics have {len(values)}"
        )
    return constant(values, z.dtype, z.device).view(1, -1, *[1] * (z.ndim - 2))


def normalise(z: Tensor, stats: LatentStats | None) -> Tensor:
    """Latents (B, C, ...) to model space; None leaves them as they are."""
    return z if stats is None else (z - _channels(stats.mean, z)) / _channels(stats.std, z)


def denormalise(z: Tensor, stats: LatentStats | None) -> Tensor:
    """The inverse of `normalise`: model space to the VAE's latents."""
    return z if stats is None else z * _channels(stats.std, z) + _channels(stats.mean, z)
