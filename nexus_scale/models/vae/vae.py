"""VAE: a small convolutional autoencoder that works at the resolution of its latents.

The image is first cut into patches (space-to-depth), so every convolution runs on H/p x W/p places: full-resolution
convolutions would cost about ten times as much at equal width.

Source: Kingma & Welling 2014 (VAE); Shi et al. 2016 (space-to-depth and back); Rombach et al. 2022 (its place before a
latent diffusion model).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Network, UserError
from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.linear import Conv2d

# clamp from latent diffusion's code: exp(logvar) stays finite for any encoder output
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0
# initial posterior std 0.14: at std 1 the decoder would first have to learn to ignore the noise
LOGVAR_INIT = -4.0


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(x))), the second convolution zero at the start.

    No norm: with few blocks that start as the identity none is needed (Zhang et al. 2019, Fixup), and flat colours keep
    their level.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.conv1 = Conv2d(hidden_size, hidden_size)
        self.conv2 = Conv2d(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(x)))


class VAE(Network):
    """Gaussian autoencoder, (B, image_channels, H, W) <-> (B, latent_channels, H/p, W/p).

    At initialisation it is linear in each patch, and the residual blocks grow from there.

    Args:
        image_channels: channels of the image, with values in [-1, 1].
        image_size: height and width that `latent_shape` speaks of; other multiples of the patch size work.
        latent_channels: C of the latents.
        patch_size: p, pixels a latent place spans on each side.
        hidden_size: channels of the convolutions.
        depth: residual blocks in the encoder, and as many in the decoder.
    """

    serves_as = "autoencoder"

    def __init__(
        self,
        *,
        image_channels: int = 3,
        image_size: int = 32,
        latent_channels: int = 8,
        patch_size: int = 4,
        hidden_size: int = 192,
        depth: int = 3,
    ):
        super().__init__()
        check_counts(
            "vae",
            {
                "image_channels": image_channels,
                "image_size": image_size,
                "latent_channels": latent_channels,
                "patch_size": patch_size,
                "hidden_size": hidden_size,
            },
        )
        if depth < 0:
            raise UserError(f"vae.depth: got {depth}; it must be at least 0")
        if image_size % patch_size:
            raise UserError(
                f"vae.patch_size: {patch_size} does not divide image_size = {image_size}; change one of them"
            )
        self.image_channels, self.image_size, self.latent_channels = image_channels, image_size, latent_channels
        self.patch_size, self.hidden_size, self.depth = patch_size, hidden_size, depth

        patch_channels = image_channels * patch_size**2
        self.enc_in = Conv2d(patch_channels, hidden_size)
        self.enc_blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(depth))
        self.enc_mean = Conv2d(hidden_size, latent_channels, kernel_size=1)
        self.enc_logvar = Conv2d(hidden_size, latent_channels, kernel_size=1)
        self.dec_in = Conv2d(latent_channels, hidden_size)
        self.dec_blocks = nn.ModuleList(ResidualBlock(hidden_size) for _ in range(depth))
        self.dec_out = Conv2d(hidden_size, patch_channels)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of `image_size`."""
        side = self.image_size // self.patch_size
        return self.latent_channels, side, side

    def forward(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            x: images in [-1, 1], (B, image_channels, H, W).
            eps: standard normal, (B, C, H/p, W/p); None decodes the mean.
        Returns:
            x_hat like x; mean and logvar of the posterior, (B, C, H/p, W/p) each.
        """
        mean, logvar = self.encode(x).chunk(2, dim=1)  # (B, C, h, w) each
        z = mean if eps is None else torch.addcmul(mean, torch.exp(0.5 * logvar), eps.to(mean.dtype))
        return self.decode(z), mean, logvar

    def encode(self, x: Tensor) -> Tensor:
        """Posterior moments of x: mean and log-variance on channels, (B, 2C, h, w).

        Raises:
            ValueError: channels or sizes that do not fit.
        """
        p = self.patch_size
        if x.shape[1] != self.image_channels:
            raise ValueError(f"images of {tuple(x.shape[1:])}: the VAE takes {self.image_channels} channels")
        self.check_sizes(*x.shape[2:])
        h = F.pixel_unshuffle(x.to(self.enc_in.weight.dtype), p)  # (B, image_channels * p * p, h, w)
        h = self.enc_in(h.contiguous(memory_format=torch.channels_last))  # (B, D, h, w)
        for block in self.enc_blocks:
            h = block(h)
        logvar = self.enc_logvar(h).clamp(LOGVAR_MIN, LOGVAR_MAX)
        return torch.cat((self.enc_mean(h), logvar), dim=1)  # (B, 2C, h, w)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> (B, image_channels, h * p, w * p), unbounded: clamp to [-1, 1] for pixels.

        Raises:
            ValueError: another number of channels.
        """
        if z.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents have {z.shape[1]} channels, the VAE takes {self.latent_channels}; set latent_channels"
            )
        h = z.to(self.dec_in.weight.dtype).contiguous(memory_format=torch.channels_last)
        h = self.dec_in(h)  # (B, D, h, w)
        for block in self.dec_blocks:
            h = block(h)
        return F.pixel_shuffle(self.dec_out(h), self.patch_size)  # (B, image_channels, h * p, w * p)

    def check_sizes(self, height: int, width: int) -> None:
        """Raises a ValueError, with what to change, for images that the network does not accept."""
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"images of {height} x {width}: the VAE takes multiples of patch_size = {self.patch_size} pixels; crop or resize them"
            )

    def init_weights(self) -> None:
        """Residual blocks start as the identity, the posterior with std exp(LOGVAR_INIT / 2) whatever the image."""
        for conv in (self.enc_in, self.enc_mean, self.dec_in, self.dec_out):
            init.xavier_(conv)
        for block in self.blocks():
            assert isinstance(block, ResidualBlock)
            init.kaiming_(block.conv1)
            init.zero_(block.conv2)
        init.zero_(self.enc_logvar)
        assert self.enc_logvar.bias is not None
        nn.init.constant_(self.enc_logvar.bias, LOGVAR_INIT)

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.enc_blocks, *self.dec_blocks]

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Arguments of `forward` at the configured size, on any device, meta too; `text_tokens` has no meaning here."""
        x = torch.zeros(batch_size, self.image_channels, self.image_size, self.image_size, device=device)
        return x, torch.zeros(batch_size, *self.latent_shape, device=device)

    def extra_repr(self) -> str:
        return (
            f"images {self.image_channels} x {self.image_size} x {self.image_size} <-> latents {self.latent_shape}, "
            f"patch_size={self.patch_size}, hidden_size={self.hidden_size}, depth={self.depth}"
        )
