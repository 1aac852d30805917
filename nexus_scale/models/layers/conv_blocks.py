"""The parts of a convolutional U-Net: residual blocks, attention between places, and what halves and doubles the resolution.

Where a network has an embedding of time and conditions, blocks are given its SiLU, which is the same for all and computed once.

Source: Ho et al. 2020 (DDPM), appendix B; Dhariwal & Nichol 2021 (ADM), section 3; Rombach et al. 2022 (the autoencoder's).
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.kernels.attention import attention
from nexus_scale.models.layers import init
from nexus_scale.models.layers.linear import Conv2d, Linear
from nexus_scale.models.layers.norms import GroupNorm
from nexus_scale.models.layers.transformer import Heads

Resample = Literal["", "down", "up"]


class Downsample(nn.Module):
    """A convolution of stride 2, (B, C, H, W) -> (B, C, H/2, W/2).

    `padding` 1 puts a zero on each side; 0 puts one at the right and at the bottom alone (DDPM's).
    """

    def __init__(self, channels: int, padding: int = 1):
        super().__init__()
        self.padding = padding
        self.conv = Conv2d(channels, channels, stride=2, padding=padding)

    def forward(self, x: Tensor, silu_c: Tensor | None = None) -> Tensor:
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbours and a convolution, (B, C, h, w) -> (B, C, height, width)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels)

    def forward(self, x: Tensor, silu_c: Tensor | None, height: int, width: int) -> Tensor:
        return self.conv(F.interpolate(x, (height, width), mode="nearest"))


class ResnetBlock(nn.Module):
    """Twice norm, SiLU and convolution beside a shortcut, (B, C, H, W) -> (B, C', H, W).

    Args:
        embed_dim: channels of the embedding, which is added before the second norm, or with `scale_shift` scales and shifts behind it;
            0: there is none.
        resample: halves the resolution (means of 2 x 2 places), or changes it to what it is told, within the block (BigGAN's).
        dropout: before the second convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embed_dim: int,
        *,
        num_groups: int,
        eps: float,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: Resample = "",
    ):
        super().__init__()
        self.resample, self.scale_shift, self.dropout = resample, scale_shift, dropout
        self.norm1 = GroupNorm(in_channels, num_groups, eps)
        self.conv1 = Conv2d(in_channels, out_channels)
        self.embed = Linear(embed_dim, (1 + scale_shift) * out_channels) if embed_dim else None
        self.norm2 = GroupNorm(out_channels, num_groups, eps)
        self.conv2 = Conv2d(out_channels, out_channels)
        self.shortcut = Conv2d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None

    def forward(self, x: Tensor, silu_c: Tensor | None = None, height: int = 0, width: int = 0) -> Tensor:
        """silu_c: (B, embed_dim). height, width: of the result, with `resample` up."""
        y = F.silu(self.norm1(x))
        if self.resample:
            x, y = (self._resampled(one, height, width) for one in (x, y))
        y = self.conv1(y)
        if self.embed is None:
            y = self.norm2(y)
        else:
            assert silu_c is not None
            y = self._told(y, self.embed(silu_c)[:, :, None, None])
        y = self.conv2(F.dropout(F.silu(y), self.dropout, self.training))
        return (x if self.shortcut is None else self.shortcut(x)) + y

    def _told(self, y: Tensor, c: Tensor) -> Tensor:
        if not self.scale_shift:
            return self.norm2(y + c)
        scale, shift = c.chunk(2, dim=1)
        return self.norm2(y) * (1 + scale) + shift

    def _resampled(self, x: Tensor, height: int, width: int) -> Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, (height, width), mode="nearest")

    def init_weights(self) -> None:
        """The block starts as its shortcut."""
        init.zero_(self.conv2)

    def extra_repr(self) -> str:
        return f"resample={self.resample!r}, scale_shift={self.scale_shift}, dropout={self.dropout}"


class PlaceAttention(nn.Module):
    """Attention of all places to each other beside a shortcut, (B, C, H, W) -> (B, C, H, W).

    `norm` False leaves out the norm before it.
    """

    def __init__(self, channels: int, head_dim: int, *, num_groups: int, eps: float, norm: bool = True):
        super().__init__()
        self.norm = GroupNorm(channels, num_groups, eps) if norm else None
        self.qkv = Linear(channels, 3 * channels)
        self.heads = Heads(channels // head_dim, head_dim, ("img",), qk_norm=False)
        self.proj = Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.norm is None else self.norm(x)
        y = y.flatten(2).transpose(1, 2)  # (B, H*W, C)
        y = attention(*self.heads(self.qkv(y))).transpose(1, 2).flatten(2)  # of (B, N, H*W, E) -> (B, H*W, C)
        return x + self.proj(y).transpose(1, 2).unflatten(2, x.shape[2:])

    def init_weights(self) -> None:
        """It starts as its shortcut."""
        init.zero_(self.proj)
