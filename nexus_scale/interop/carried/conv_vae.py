"""The autoencoder of this folder, for torch and diffusers: strided convolutions down to a vector of latents, transposed ones back.

from diffusers import AutoModel
autoencoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn


class Stage(nn.Module):
    """Halves or doubles height and width."""

    def __init__(self, conv: type[nn.Conv2d] | type[nn.ConvTranspose2d], in_channels: int, out_channels: int):
        super().__init__()
        self.conv = conv(in_channels, out_channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class ConvAutoencoder(ModelMixin, ConfigMixin):
    """Images (B, image_channels, image_size, image_size) in [-1, 1] <-> latents (B, latent_size).

    Args:
        channels, hidden_sizes: of the stages from full resolution down, and of the layers before the latents.
        numbers: that the decoder says of each value; the first is its mean, as a logit of [0, 1].
    """

    @register_to_config
    def __init__(
        self,
        image_channels: int = 1,
        image_size: int = 64,
        latent_size: int = 10,
        channels: Sequence[int] = (32, 32, 32, 32),
        hidden_sizes: Sequence[int] = (256, 256),
        numbers: int = 1,
    ):
        super().__init__()
        self.side = image_size // 2 ** len(channels)
        down, up = (image_channels, *channels), (*reversed(channels), numbers * image_channels)
        inside = (channels[-1] * self.side**2, *hidden_sizes)
        outside = (latent_size, *reversed(inside))
        self.down = nn.ModuleList(Stage(nn.Conv2d, a, b) for a, b in zip(down, down[1:], strict=False))  # noqa: RUF007
        self.inward = nn.ModuleList(nn.Linear(a, b) for a, b in zip(inside, inside[1:], strict=False))  # noqa: RUF007
        self.to_moments = nn.Linear(inside[-1], 2 * latent_size)
        self.outward = nn.ModuleList(nn.Linear(a, b) for a, b in zip(outside, outside[1:], strict=False))  # noqa: RUF007
        self.up = nn.ModuleList(Stage(nn.ConvTranspose2d, a, b) for a, b in zip(up, up[1:], strict=False))  # noqa: RUF007

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """`.latent_dist`, a Gaussian of latents: `.mean`, `.logvar`, `.sample()`."""
        h = (x + 1) / 2
        for stage in self.down:
            h = F.relu(stage(h))
        h = h.flatten(1)
        for layer in self.inward:
            h = F.relu(layer(h))
        posterior = DiagonalGaussianDistribution(self.to_moments(h))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> Any:
        """`.sample`, mean images in [-1, 1]."""
        images = 2 * self.numbers_of(z)[:, : self.config.image_channels].sigmoid() - 1
        return DecoderOutput(sample=images) if return_dict else (images,)

    def numbers_of(self, z: Tensor) -> Tensor:
        """What the decoder says of each value, (B, numbers * image_channels, image_size, image_size)."""
        h = z
        for i, layer in enumerate(self.outward):
            h = layer(F.relu(h) if i else h)
        h = h.unflatten(1, (-1, self.side, self.side))
        for stage in self.up:
            h = stage(F.relu(h))
        return h

    def forward(self, x: Tensor) -> Tensor:
        """Images -> images, by the mean of their latents."""
        (posterior,) = self.encode(x, return_dict=False)
        (images,) = self.decode(posterior.mean, return_dict=False)
        return images
