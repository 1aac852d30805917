"""The autoencoder of this folder, for torch and diffusers: an image is cut into patches, and residual convolutions see the patches.

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

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(x)))."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.conv1 = nn.Conv2d(hidden_size, hidden_size, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden_size, hidden_size, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(x)))


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """Images (B, image_channels, H, W) in [-1, 1] <-> latents (B, latent_channels, H / patch_size, W / patch_size).

    Args:
        latents_mean, latents_std: of all channels, or one for each: latents are (z - mean) / std, z what the convolutions make.
        scaling_factor, shift_factor: a pipeline's own; here they do nothing.
        block_out_channels: as many as a pipeline computes `patch_size` from.
    """

    @register_to_config
    def __init__(
        self,
        image_channels: int = 3,
        image_size: int = 32,
        latent_channels: int = 8,
        patch_size: int = 4,
        hidden_size: int = 192,
        depth: int = 3,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        scaling_factor: float | None = 1.0,
        shift_factor: float | None = 0.0,
        block_out_channels: Sequence[int] = (192, 192, 192),
    ):
        super().__init__()
        patch_channels = image_channels * patch_size**2
        self.enc_in = nn.Conv2d(patch_channels, hidden_size, 3, padding=1)
        self.enc_blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(depth))
        self.enc_mean = nn.Conv2d(hidden_size, latent_channels, 1)
        self.enc_logvar = nn.Conv2d(hidden_size, latent_channels, 1)
        self.dec_in = nn.Conv2d(latent_channels, hidden_size, 3, padding=1)
        self.dec_blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(depth))
        self.dec_out = nn.Conv2d(hidden_size, patch_channels, 3, padding=1)

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """`.latent_dist`, a Gaussian of latents; height and width are multiples of `patch_size`."""
        h = self.enc_in(F.pixel_unshuffle(x, self.config.patch_size))
        for block in self.enc_blocks:
            h = block(h)
        mean, std = self._normalisation(h)
        logvar = self.enc_logvar(h).clamp(LOGVAR_MIN, LOGVAR_MAX)
        moments = torch.cat(((self.enc_mean(h) - mean) / std, logvar - 2 * std.log()), dim=1)
        posterior = DiagonalGaussianDistribution(moments)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> Any:
        """`.sample`, images of about [-1, 1]."""
        mean, std = self._normalisation(z)
        h = self.dec_in(z * std + mean)
        for block in self.dec_blocks:
            h = block(h)
        images = F.pixel_shuffle(self.dec_out(h), self.config.patch_size)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, x: Tensor) -> Tensor:
        """Images -> images, by the mean of their latents."""
        (posterior,) = self.encode(x, return_dict=False)
        (images,) = self.decode(posterior.mean, return_dict=False)
        return images

    def _normalisation(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation, (1, C or 1, 1, 1) each."""
        mean = torch.tensor(list(self.config.latents_mean or (0.0,)), dtype=like.dtype, device=like.device)
        std = torch.tensor(list(self.config.latents_std or (1.0,)), dtype=like.dtype, device=like.device)
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)
