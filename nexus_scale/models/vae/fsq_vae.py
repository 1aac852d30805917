"""FSQVAE: images as codes of finite scalar quantisation, which has no book to learn.

Source: Mentzer et al. 2023; the convolutions are VQ-VAE's (van den Oord et al. 2017).
"""

from __future__ import annotations

from nexus_scale.models.layers.fsq import FSQ
from nexus_scale.models.vae.discrete import DiscreteAutoencoder


class FSQVAE(DiscreteAutoencoder):
    """Images (B, image_channels, H, W) in [-1, 1] <-> codes (B, h, w); see `DiscreteAutoencoder`.

    Args:
        levels: of each latent channel; their product is the number of codes.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        image_size: int = 128,
        levels: tuple[int, ...] = (8, 5, 5, 5),
        hidden_size: int = 256,
        residual_size: int = 256,
        depth: int = 2,
        stages: int = 2,
    ):
        super().__init__(
            name="fsq_vae", quantizer=FSQ(levels), image_channels=image_channels, image_size=image_size, latent_channels=len(levels),
            hidden_size=hidden_size, residual_size=residual_size, depth=depth, stages=stages,
        )  # fmt: skip
        self.levels = tuple(levels)
