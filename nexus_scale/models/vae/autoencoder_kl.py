"""AutoencoderKL: the autoencoder of Stable Diffusion, SD3 and FLUX, each stage half as high and wide as the one before.

Source: Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", section 3.1 and appendix G; Esser et al. 2021
(VQGAN), whose encoder and decoder these are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Network, UserError
from nexus_scale.models.layers import init
from nexus_scale.models.layers.conv_blocks import Downsample, PlaceAttention, ResnetBlock, Upsample
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.linear import Conv2d
from nexus_scale.models.layers.norms import GroupNorm
from nexus_scale.processes.latents import LOGVAR_RANGE

EPS = 1e-6


def _block(in_channels: int, out_channels: int, num_groups: int) -> ResnetBlock:
    return ResnetBlock(in_channels, out_channels, 0, num_groups=num_groups, eps=EPS)


class Stage(nn.Module):
    """Residual blocks at one resolution, then the way to the next one."""

    def __init__(self, blocks: Sequence[ResnetBlock], resample: Downsample | Upsample | None):
        super().__init__()
        self.blocks, self.resample = nn.ModuleList(blocks), resample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        if isinstance(self.resample, Upsample):
            return self.resample(x, None, 2 * x.shape[2], 2 * x.shape[3])
        return x if self.resample is None else self.resample(x)


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, num_groups: int, attends: bool):
        super().__init__()
        self.block1, self.block2 = (_block(channels, channels, num_groups) for _ in range(2))
        self.attention = PlaceAttention(channels, channels, num_groups=num_groups, eps=EPS) if attends else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(x)
        return self.block2(x if self.attention is None else self.attention(x))


class AutoencoderKL(Network):
    """Gaussian autoencoder, (B, image_channels, H, W) <-> (B, latent_channels, H / s, W / s), s = 2^(stages - 1).

    Args:
        image_channels: channels of the image, with values in [-1, 1].
        image_size: height and width that `latent_shape` speaks of; other multiples of s work.
        latent_channels: C of the latents; 4 in Stable Diffusion, 16 in SD3 and FLUX.
        channels: of each stage, from full resolution down.
        depth: residual blocks of an encoder's stage; the decoder's have one more.
        num_groups: of the group norms.
        mid_attention: attention at the lowest resolution.
        quant_conv: 1 x 1 convolutions of the moments and of the latents, which SD3 and FLUX leave out.
    Raises:
        UserError: sizes that do not fit one another.
    """

    serves_as = "autoencoder"

    def __init__(
        self,
        *,
        image_channels: int = 3,
        image_size: int = 512,
        latent_channels: int = 4,
        channels: tuple[int, ...] = (128, 256, 512, 512),
        depth: int = 2,
        num_groups: int = 32,
        mid_attention: bool = True,
        quant_conv: bool = True,
    ):
        super().__init__()
        counts = {"image_channels": image_channels, "image_size": image_size, "latent_channels": latent_channels}
        counts |= {"channels": min(channels, default=0), "depth": depth, "num_groups": num_groups}
        check_counts("autoencoder_kl", counts)
        if any(width % num_groups for width in channels):
            raise UserError(f"autoencoder_kl.num_groups: {num_groups} does not divide channels {channels}; change one")
        self.image_channels, self.image_size, self.latent_channels = image_channels, image_size, latent_channels
        self.channels, self.depth, self.num_groups = tuple(channels), depth, num_groups
        self.mid_attention, self.quant_conv = mid_attention, quant_conv
        self.downsampling = 2 ** (len(channels) - 1)
        if image_size % self.downsampling:
            raise UserError(
                f"autoencoder_kl.image_size: got {image_size}; {len(channels)} stages need a multiple of {self.downsampling}"
            )
        self.encoder = nn.ModuleDict(self._encoder(channels, depth))
        self.decoder = nn.ModuleDict(self._decoder(channels, depth))
        self.to_moments = Conv2d(2 * latent_channels, 2 * latent_channels, kernel_size=1) if quant_conv else None
        self.from_latents = Conv2d(latent_channels, latent_channels, kernel_size=1) if quant_conv else None

    def _encoder(self, channels: Sequence[int], depth: int) -> dict[str, nn.Module]:
        groups, last, before = self.num_groups, len(channels) - 1, (channels[0], *channels)
        stages = [
            Stage(
                [_block(width if j else before[i], width, groups) for j in range(depth)],
                Downsample(width, padding=0) if i < last else None,
            )
            for i, width in enumerate(channels)
        ]
        return {
            "conv_in": Conv2d(self.image_channels, channels[0]),
            "stages": nn.ModuleList(stages),
            "middle": Middle(channels[-1], groups, self.mid_attention),
            "norm_out": GroupNorm(channels[-1], groups, EPS),
            "conv_out": Conv2d(channels[-1], 2 * self.latent_channels),
        }

    def _decoder(self, channels: Sequence[int], depth: int) -> dict[str, nn.Module]:
        groups, widths = self.num_groups, tuple(reversed(channels))
        before = (widths[0], *widths)
        stages = [
            Stage(
                [_block(width if j else before[i], width, groups) for j in range(depth + 1)],
                Upsample(width) if i < len(widths) - 1 else None,
            )
            for i, width in enumerate(widths)
        ]
        return {
            "conv_in": Conv2d(self.latent_channels, widths[0]),
            "middle": Middle(widths[0], groups, self.mid_attention),
            "stages": nn.ModuleList(stages),
            "norm_out": GroupNorm(widths[-1], groups, EPS),
            "conv_out": Conv2d(widths[-1], self.image_channels),
        }

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of `image_size`."""
        side = self.image_size // self.downsampling
        return self.latent_channels, side, side

    def forward(
        self, x: Tensor, eps: Tensor | None = None, with_last: bool = False
    ) -> tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]:
        """
        Args:
            x: images in [-1, 1], (B, image_channels, H, W).
            eps: standard normal, (B, C, H / s, W / s); None decodes the mean.
            with_last: also what goes into the decoder's last convolution, (B, channels[0], H, W), from which the gradient of that
                layer's kernel follows.
        Returns:
            x_hat like x; mean and logvar of the posterior, (B, C, H / s, W / s) each, logvar within [-30, 20].
        """
        mean, logvar = self.encode(x).chunk(2, dim=1)  # (B, C, h, w) each
        logvar = logvar.clamp(*LOGVAR_RANGE)
        z = mean if eps is None else torch.addcmul(mean, torch.exp(0.5 * logvar), eps.to(mean.dtype))
        last = self._before_last(z)
        x_hat = self.decoder["conv_out"](last)
        return (x_hat, mean, logvar, last) if with_last else (x_hat, mean, logvar)

    def encode(self, x: Tensor) -> Tensor:
        """Posterior moments of x: mean and log-variance on channels, (B, 2C, h, w).

        Raises:
            ValueError: channels or sizes that do not fit.
        """
        if x.shape[1] != self.image_channels:
            raise ValueError(f"images of {tuple(x.shape[1:])}: the autoencoder takes {self.image_channels} channels")
        self.check_sizes(*x.shape[2:])
        net = self.encoder
        h = net["conv_in"](self._laid_out(x))  # (B, channels[0], H, W)
        for stage in _stages(net):
            h = stage(h)
        h = net["conv_out"](F.silu(net["norm_out"](net["middle"](h))))  # (B, 2C, h, w)
        return h if self.to_moments is None else self.to_moments(h)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, C, h, w) -> (B, image_channels, h * s, w * s), unbounded: clamp to [-1, 1] for pixels.

        Raises:
            ValueError: another number of channels.
        """
        x_hat: Tensor = self.decoder["conv_out"](self._before_last(z))
        return x_hat

    def _before_last(self, z: Tensor) -> Tensor:
        if z.shape[1] != self.latent_channels:
            raise ValueError(
                f"latents have {z.shape[1]} channels, the autoencoder takes {self.latent_channels}; set latent_channels"
            )
        net, z = self.decoder, self._laid_out(z)
        h = net["middle"](net["conv_in"](z if self.from_latents is None else self.from_latents(z)))
        for stage in _stages(net):
            h = stage(h)
        return F.silu(net["norm_out"](h))  # (B, channels[0], H, W)

    def _laid_out(self, x: Tensor) -> Tensor:
        """In the weights' type, channels last: convolutions are fastest so."""
        conv_in = self.encoder["conv_in"]
        assert isinstance(conv_in, Conv2d)
        return x.to(conv_in.weight.dtype).contiguous(memory_format=torch.channels_last)

    def check_sizes(self, height: int, width: int) -> None:
        """Raises a ValueError, with what to change, for images that the network does not accept."""
        if height % self.downsampling or width % self.downsampling:
            raise ValueError(
                f"images of {height} x {width}: the autoencoder takes multiples of {self.downsampling} pixels; crop or resize them"
            )

    def init_weights(self) -> None:
        """As latent diffusion's code leaves them: torch's defaults."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                init.uniform_(module)
            elif isinstance(module, GroupNorm):
                module.init_weights()

    def blocks(self) -> Sequence[nn.Module]:
        return [module for module in self.modules() if isinstance(module, ResnetBlock | PlaceAttention)]

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        """Arguments of `forward` at the configured size, on any device, meta too; `text_tokens` has no meaning here."""
        x = torch.zeros(batch_size, self.image_channels, self.image_size, self.image_size, device=device)
        return x, torch.zeros(batch_size, *self.latent_shape, device=device)

    def extra_repr(self) -> str:
        return (
            f"images {self.image_channels} x {self.image_size} x {self.image_size} <-> latents {self.latent_shape}, "
            f"channels={self.channels}, depth={self.depth}"
        )


def _stages(net: nn.ModuleDict) -> nn.ModuleList:
    stages = net["stages"]
    assert isinstance(stages, nn.ModuleList)
    return stages
