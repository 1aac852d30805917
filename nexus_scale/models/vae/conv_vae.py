"""ConvVAE: strided convolutions down to a vector of latents, and transposed ones back.

Source: Burgess et al. 2018, "Understanding disentangling in beta-VAE", appendix A, whose sizes for 64 x 64 pixels are the defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import UserError
from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.image_convs import DoublingConv, ImageConv
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.vae.vector_latents import VectorVAE


class Down(nn.Module):
    """(B, C, H, W) -> (B, C', H / 2, W / 2), rectified."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = ImageConv(in_channels, out_channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class Up(nn.Module):
    """(B, C, H, W), rectified -> (B, C', 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = DoublingConv(in_channels, out_channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(x))


class ConvVAE(VectorVAE):
    """Images (B, image_channels, image_size, image_size) <-> latents (B, latent_size), each stage half as high and wide.

    Args:
        image_channels: of images with values in [-1, 1].
        latent_size: units of the latents.
        channels: of the encoder's stages; the decoder's are the same in reverse.
        hidden_sizes: of the layers between the last stage and the latents.
        numbers: that the decoder says of each value: 1, a mean as a logit; 2, and the log of its scale.
    Raises:
        UserError: sizes below 1, or an image that the stages do not halve.
    """

    def __init__(
        self,
        *,
        image_channels: int = 1,
        image_size: int = 64,
        latent_size: int = 10,
        channels: tuple[int, ...] = (32, 32, 32, 32),
        hidden_sizes: tuple[int, ...] = (256, 256),
        numbers: int = 1,
    ):
        super().__init__()
        counts = {"image_channels": image_channels, "image_size": image_size, "latent_size": latent_size}
        counts |= {"channels": min(channels, default=0), "hidden_sizes": min(hidden_sizes, default=1)}
        check_counts("conv_vae", {**counts, "numbers": numbers})
        if len(channels) > 30 or image_size % 2 ** len(channels):
            raise UserError(
                f"conv_vae.image_size: got {image_size}; {len(channels)} stages need a multiple of 2^{len(channels)}"
            )
        self.image_channels, self.image_size, self.latent_size = image_channels, image_size, latent_size
        self.channels, self.hidden_sizes, self.numbers = tuple(channels), tuple(hidden_sizes), numbers
        self.side = image_size // 2 ** len(channels)
        down = (image_channels, *channels)
        up = (*reversed(channels), numbers * image_channels)
        inside = (channels[-1] * self.side**2, *hidden_sizes)
        outside = (latent_size, *reversed(inside))
        self.down = nn.ModuleList(Down(a, b) for a, b in pairwise(down))
        self.inward = nn.ModuleList(Linear(a, b) for a, b in pairwise(inside))
        self.to_moments = Linear(inside[-1], 2 * latent_size)
        self.outward = nn.ModuleList(Linear(a, b) for a, b in pairwise(outside))
        self.up = nn.ModuleList(Up(a, b) for a, b in pairwise(up))

    def encode(self, x: Tensor) -> Tensor:
        """Mean and log-variance of the posterior, (B, 2 * latent_size), of images in [-1, 1].

        Raises:
            ValueError: images of another size.
        """
        self.check_images(x)
        h = (x.to(self.to_moments.weight.dtype) + 1) / 2
        for stage in self.down:
            h = stage(h)
        h = h.flatten(1)
        for layer in self.inward:
            h = F.relu(layer(h))
        return self.to_moments(h)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, latent_size) -> numbers of each value, (B, numbers * image_channels, image_size, image_size).

        Raises:
            ValueError: latents of another size.
        """
        self.check_latents(z)
        h = z.to(self.to_moments.weight.dtype)
        for i, layer in enumerate(self.outward):
            h = layer(F.relu(h) if i else h)
        h = h.unflatten(1, (-1, self.side, self.side))
        for stage in self.up:
            h = stage(h)
        return h

    def init_weights(self) -> None:
        """torch's defaults."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                init.uniform_(module)

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.down, *self.up]
