"""The autoencoder of this folder, for torch and diffusers: images as codes of a book, or of numbers with a few levels each.

from diffusers import AutoModel
autoencoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

MARGIN = 1e-3


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x))))."""

    def __init__(self, hidden_size: int, residual_size: int):
        super().__init__()
        self.conv1 = nn.Conv2d(hidden_size, residual_size, 3, padding=1)
        self.conv2 = nn.Conv2d(residual_size, hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Book(nn.Module):
    """Entries, and the averages that they followed in training."""

    codebooks: Tensor

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("codebooks", torch.zeros(1, size, dim))
        self.register_buffer("cluster_sum", torch.zeros(1, size, dim))
        self.register_buffer("cluster_size", torch.zeros(1, size))
        self.register_buffer("initialised", torch.zeros(1))

    def codes(self, z: Tensor) -> Tensor:
        """(B, h, w) of the nearest entries to (B, D, h, w)."""
        z, book = z.movedim(1, -1), self.codebooks[0]
        return (2 * z @ book.T - book.square().sum(1)).argmax(-1)

    def latents(self, codes: Tensor) -> Tensor:
        return self.codebooks[0][codes].movedim(-1, 1)


class Levels(nn.Module):
    """Finite scalar quantisation (Mentzer et al. 2023)."""

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        self.levels = tuple(levels)

    def codes(self, z: Tensor) -> Tensor:
        levels, basis = self._constants(z)
        half, offset = (levels - 1) * (1 + MARGIN) / 2, (levels % 2 == 0) * 0.5
        places = (torch.tanh(z + torch.atanh(offset / half)) * half - offset).round()
        return ((places + levels // 2) * basis).sum(1).long()

    def latents(self, codes: Tensor) -> Tensor:
        levels, basis = (value.long() for value in self._constants(codes))
        return (codes[:, None] // basis % levels - levels // 2) / (levels // 2).float()

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        steps = [math.prod(self.levels[:i]) for i in range(len(self.levels))]
        levels, basis = (torch.tensor(values, device=like.device).float() for values in (self.levels, steps))
        return levels.view(-1, 1, 1), basis.view(-1, 1, 1)


class CodeAutoencoder(ModelMixin, ConfigMixin):
    """Images (B, image_channels, H, W) in [-1, 1] <-> codes (B, H / 2^stages, W / 2^stages).

    Args:
        levels: of each latent channel; None: there is a book of `codebook_size` entries.
    """

    @register_to_config
    def __init__(
        self,
        image_channels: int = 3,
        image_size: int = 128,
        latent_channels: int = 64,
        hidden_size: int = 256,
        residual_size: int = 256,
        depth: int = 2,
        stages: int = 2,
        codebook_size: int = 512,
        levels: Sequence[int] | None = None,
    ):
        super().__init__()
        widths = (hidden_size // 2, *[hidden_size] * (stages - 1))
        down = (image_channels, *widths)
        up = (hidden_size, *(*[hidden_size] * (stages - 1), hidden_size // 2)[1:], image_channels)
        self.down = nn.ModuleList(nn.Conv2d(down[i], down[i + 1], 4, stride=2, padding=1) for i in range(stages))
        self.enc_in = nn.Conv2d(widths[-1], hidden_size, 3, padding=1)
        self.enc_blocks = nn.ModuleList(ResidualBlock(hidden_size, residual_size) for _ in range(depth))
        self.to_latents = nn.Conv2d(hidden_size, latent_channels, 1)
        self.quantizer = Book(codebook_size, latent_channels) if levels is None else Levels(levels)
        self.dec_in = nn.Conv2d(latent_channels, hidden_size, 3, padding=1)
        self.dec_blocks = nn.ModuleList(ResidualBlock(hidden_size, residual_size) for _ in range(depth))
        self.up = nn.ModuleList(nn.ConvTranspose2d(up[i], up[i + 1], 4, stride=2, padding=1) for i in range(stages))

    def encode(self, x: Tensor) -> Tensor:
        """Codes (B, h, w) int64 of images in [-1, 1]."""
        h = x
        for conv in self.down:
            h = F.relu(conv(h))
        h = self.enc_in(h)
        for block in self.enc_blocks:
            h = block(h)
        codes: Tensor = self.quantizer.codes(self.to_latents(F.relu(h)))
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Images of about [-1, 1] from codes (B, h, w)."""
        h = self.dec_in(self.quantizer.latents(codes))
        for block in self.dec_blocks:
            h = block(h)
        for conv in self.up:
            h = conv(F.relu(h))
        return h

    def forward(self, x: Tensor) -> Tensor:
        """Images -> images, by their codes."""
        return self.decode(self.encode(x))
