"""A generator that turns images of one kind into images of another: a U-Net that halves down to one place, with shortcuts on each level.

Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", appendix 6.1.1. Its batch norm sees one image
at a time; here it is the instance norm that it then is, so that batches of any size train alike. Its dropout, which stays on when it draws,
is off here outside training: an image has one translation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Network, UserError
from nexus_scale.models.layers.counts import check_counts, halved
from nexus_scale.models.layers.image_convs import (
    DoublingConv,
    ImageConv,
    InstanceNorm,
    InstanceNorms,
    init_as_pix2pix,
    laid_out,
)

SLOPE = 0.2
WIDEST = 8
"""Channels grow to at most this many times `hidden_size`."""
DROPPED_FROM = 4
"""The first level whose way up has dropout; the lowest has none."""


class Down(nn.Module):
    """norm(conv(leaky_relu(x))), (B, C, H, W) -> (B, C', H/2, W/2); the lowest level has no norm."""

    def __init__(self, in_channels: int, out_channels: int, affine: bool, normed: bool):
        super().__init__()
        self.conv = ImageConv(in_channels, out_channels, 4, stride=2, padding=1, bias=not affine)
        self.norm = InstanceNorm(out_channels, affine) if normed else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(F.leaky_relu(x, SLOPE))
        return h if self.norm is None else self.norm(h)


class Up(nn.Module):
    """dropout(norm(conv(relu(x)))), (B, C, H, W) -> (B, C', 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int, affine: bool, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.conv = DoublingConv(in_channels, out_channels, 4, bias=not affine)
        self.norm = InstanceNorm(out_channels, affine)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.norm(self.conv(F.relu(x))), self.dropout, self.training)


class TranslationUnet(Network):
    """Images (B, in_channels, H, W) in [-1, 1] -> images (B, out_channels, H, W) in [-1, 1]; sides are multiples of 2^depth.

    Args:
        image_size: height and width that FLOPs are counted for; other multiples work.
        hidden_size: channels of the first level.
        depth: levels, each of which halves height and width: 8 for 256 x 256 pixels, 7 for 128 x 128.
        norm: see `InstanceNorms`.
        dropout: on the way up from the fifth level on, but for the lowest, while training.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        image_size: int = 256,
        hidden_size: int = 64,
        depth: int = 8,
        norm: InstanceNorms = "affine_instance",
        dropout: float = 0.5,
    ):
        super().__init__()
        counts = {"in_channels": in_channels, "out_channels": out_channels, "hidden_size": hidden_size, "depth": depth}
        check_counts("translation_unet", {**counts, "image_size": image_size}, {"depth": 2})
        halved("translation_unet", image_size, depth)
        if not 0 <= dropout < 1:
            raise UserError(f"translation_unet.dropout: got {dropout}; expected a share from 0 to below 1")
        self.in_channels, self.image_size, self.depth = in_channels, image_size, depth
        affine, lowest = norm == "affine_instance", depth - 1
        width = [hidden_size * min(2 ** min(level, WIDEST), WIDEST) for level in range(depth)]
        self.first = ImageConv(in_channels, hidden_size, 4, stride=2, padding=1, bias=not affine)
        self.down = nn.ModuleList(Down(width[i - 1], width[i], affine, normed=i < lowest) for i in range(1, depth))
        self.up = nn.ModuleList(
            Up(
                width[i] if i == lowest else 2 * width[i],
                width[i - 1],
                affine,
                dropout if DROPPED_FROM <= i < lowest else 0.0,
            )
            for i in reversed(range(1, depth))
        )
        self.last = DoublingConv(2 * hidden_size, out_channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        """
        Raises:
            ValueError: sides that are no multiples of 2^depth.
        """
        if x.shape[2] % 2**self.depth or x.shape[3] % 2**self.depth:
            raise ValueError(
                f"translation_unet: images of {x.shape[2]} x {x.shape[3]}; {self.depth} levels need multiples of {2**self.depth}"
            )
        levels = [self.first(laid_out(x, self.first))]  # (B, D, H/2, W/2), (B, 2D, H/4, W/4), ...
        for down in self.down:
            levels.append(down(levels[-1]))
        h = levels.pop()
        for up in self.up:
            h = torch.cat([levels.pop(), up(h)], dim=1)
        return torch.tanh(self.last(F.relu(h)))

    def init_weights(self) -> None:
        init_as_pix2pix(self)

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.down, *self.up]

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        return (torch.zeros(batch_size, self.in_channels, self.image_size, self.image_size, device=device),)
