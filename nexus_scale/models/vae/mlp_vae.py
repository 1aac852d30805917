"""MLPVAE: the variational autoencoder of the first paper, two perceptrons.

Source: Kingma & Welling 2014, section 5 and appendix C.2 (whose units are tanh; ReLU here, as in pythae's default networks).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.vae.vector_latents import VectorVAE


class Layer(nn.Module):
    """relu(x W^T + b), (B, in_features) -> (B, out_features)."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x))


class MLPVAE(VectorVAE):
    """Images (B, image_channels, image_size, image_size) <-> latents (B, latent_size), through hidden layers.

    Args:
        image_channels: of images with values in [-1, 1].
        latent_size: units of the latents.
        hidden_sizes: of the encoder's layers; the decoder's are the same in reverse.
        numbers: that the decoder says of each value: 1, a mean as a logit; 2, and the log of its scale.
    Raises:
        UserError: sizes below 1.
    """

    def __init__(
        self,
        *,
        image_channels: int = 1,
        image_size: int = 28,
        latent_size: int = 20,
        hidden_sizes: tuple[int, ...] = (400,),
        numbers: int = 1,
    ):
        super().__init__()
        counts = {"image_channels": image_channels, "image_size": image_size, "latent_size": latent_size}
        check_counts("mlp_vae", {**counts, "hidden_sizes": min(hidden_sizes, default=0), "numbers": numbers})
        self.image_channels, self.image_size, self.latent_size = image_channels, image_size, latent_size
        self.hidden_sizes, self.numbers = tuple(hidden_sizes), numbers
        values = image_channels * image_size**2
        ways = (values, *self.hidden_sizes), (latent_size, *reversed(self.hidden_sizes))
        self.encoder, self.decoder = (
            nn.ModuleList(Layer(before, after) for before, after in pairwise(widths)) for widths in ways
        )
        self.to_moments = Linear(self.hidden_sizes[-1], 2 * latent_size)
        self.to_values = Linear(self.hidden_sizes[0], numbers * values)

    def encode(self, x: Tensor) -> Tensor:
        """Mean and log-variance of the posterior, (B, 2 * latent_size), of images in [-1, 1].

        Raises:
            ValueError: images of another size.
        """
        self.check_images(x)
        h = (x.to(self.to_moments.weight.dtype).flatten(1) + 1) / 2  # pixels in [0, 1], as pythae's encoders see them
        for layer in self.encoder:
            h = layer(h)
        return self.to_moments(h)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, latent_size) -> numbers of each value, (B, numbers * image_channels, image_size, image_size).

        Raises:
            ValueError: latents of another size.
        """
        self.check_latents(z)
        h = z.to(self.to_values.weight.dtype)
        for layer in self.decoder:
            h = layer(h)
        return self.to_values(h).unflatten(1, (-1, self.image_size, self.image_size))

    def init_weights(self) -> None:
        """torch's defaults, as pythae's networks begin."""
        for module in self.modules():
            if isinstance(module, Linear):
                init.uniform_(module)

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.encoder, *self.decoder]
