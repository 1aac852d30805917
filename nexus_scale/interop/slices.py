"""How many samples a decoder takes at once."""

from __future__ import annotations

import math

from torch import Tensor

PLACES = 1 << 16
"""Latent places that are decoded at once: four images of 1024 x 1024 pixels where an autoencoder has a place for 8 x 8."""


def slices(z: Tensor) -> tuple[Tensor, ...]:
    """Latents (B, C, ...) in parts of at least one sample, of at most PLACES places where there are more."""
    return z.split(max(1, PLACES // math.prod(z.shape[2:])))
