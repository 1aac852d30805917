"""VQVAE: images as codes of one book, whose entries follow the latents by moving averages.

Source: van den Oord et al. 2017, section 4.1 and appendix A.1.
"""

from __future__ import annotations

from nexus_scale.contracts import UserError
from nexus_scale.models.audio.quantization import ResidualQuantizer
from nexus_scale.models.vae.discrete import DiscreteAutoencoder


class VQVAE(DiscreteAutoencoder):
    """Images (B, image_channels, H, W) in [-1, 1] <-> codes (B, h, w); see `DiscreteAutoencoder`.

    Args:
        codebook_size: entries of the book; 512 for ImageNet in the paper.
        codebook_decay, dead_below, kmeans_iterations: how the book learns, see `ResidualQuantizer`; the paper has neither the last nor
            restarts of entries that are not in use, without which a book may collapse.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        image_size: int = 128,
        latent_channels: int = 64,
        hidden_size: int = 256,
        residual_size: int = 256,
        depth: int = 2,
        stages: int = 2,
        codebook_size: int = 512,
        codebook_decay: float = 0.99,
        dead_below: float = 1.0,
        kmeans_iterations: int = 10,
    ):
        if codebook_size < 2 or not 0 <= codebook_decay < 1:
            raise UserError(
                f"vq_vae: got codebook_size {codebook_size}, codebook_decay {codebook_decay}; expected at least 2, and a share in [0, 1)"
            )
        quantizer = ResidualQuantizer(
            num_codebooks=1, codebook_size=codebook_size, dim=latent_channels, decay=codebook_decay, dead_below=dead_below,
            kmeans_iterations=kmeans_iterations,
        )  # fmt: skip
        super().__init__(
            name="vq_vae", quantizer=quantizer, image_channels=image_channels, image_size=image_size, latent_channels=latent_channels,
            hidden_size=hidden_size, residual_size=residual_size, depth=depth, stages=stages,
        )  # fmt: skip
