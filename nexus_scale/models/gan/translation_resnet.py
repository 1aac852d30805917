"""A generator that turns images of one kind into images of another: two halvings, residual blocks, two doublings.

Source: Johnson et al. 2016, "Perceptual losses for real-time style transfer"; Zhu et al. 2017, "Unpaired Image-to-Image Translation using
Cycle-Consistent Adversarial Networks", appendix 7.2: 9 blocks for 256 x 256 pixels, 6 for 128 x 128.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Network, UserError
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.image_convs import (
    DoublingConv,
    ImageConv,
    InstanceNorm,
    InstanceNorms,
    init_as_pix2pix,
    laid_out,
    reflected,
)

EDGE = 3
"""Places that the kernels of 7 x 7, first and last, look beyond the edge."""
LEAST = 8
"""Least height and width: behind two halvings the blocks mirror an edge of one place."""


class Normed(nn.Module):
    """relu(norm(conv(x)))."""

    def __init__(self, conv: ImageConv | DoublingConv, affine: bool):
        super().__init__()
        self.conv = conv
        self.norm = InstanceNorm(conv.out_channels, affine)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class MirroredBlock(nn.Module):
    """Two convolutions with mirrored edges beside a shortcut, (B, D, H, W) -> (B, D, H, W)."""

    def __init__(self, channels: int, affine: bool, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.conv1, self.conv2 = (ImageConv(channels, channels, 3, bias=not affine) for _ in range(2))
        self.norm1, self.norm2 = (InstanceNorm(channels, affine) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(F.relu(self.norm1(self.conv1(reflected(x, 1)))), self.dropout, self.training)
        return x + self.norm2(self.conv2(reflected(h, 1)))


class TranslationResnet(Network):
    """Images (B, in_channels, H, W) in [-1, 1] -> images (B, out_channels, H, W) in [-1, 1]; sides are multiples of 4, from 8 on.

    Args:
        image_size: height and width that FLOPs are counted for; others work.
        hidden_size: channels of the first and last convolution; four times as many in the blocks.
        depth: residual blocks.
        norm: see `InstanceNorms`.
        dropout: within the blocks, while training.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        image_size: int = 256,
        hidden_size: int = 64,
        depth: int = 9,
        norm: InstanceNorms = "instance",
        dropout: float = 0.0,
    ):
        super().__init__()
        counts = {"in_channels": in_channels, "out_channels": out_channels, "hidden_size": hidden_size, "depth": depth}
        check_counts("translation_resnet", {**counts, "image_size": image_size}, {"image_size": LEAST})
        if not 0 <= dropout < 1:
            raise UserError(f"translation_resnet.dropout: got {dropout}; expected a share from 0 to below 1")
        self.in_channels, self.image_size, self.depth, self.dropout = in_channels, image_size, depth, dropout
        affine, d = norm == "affine_instance", hidden_size
        self.first = Normed(ImageConv(in_channels, d, 7, bias=not affine), affine)
        self.down = nn.ModuleList(
            Normed(ImageConv(d * k, 2 * d * k, 3, stride=2, padding=1, bias=not affine), affine) for k in (1, 2)
        )
        self.middle = nn.ModuleList(MirroredBlock(4 * d, affine, dropout) for _ in range(depth))
        self.up = nn.ModuleList(Normed(DoublingConv(2 * d * k, d * k, 3, bias=not affine), affine) for k in (2, 1))
        self.last = ImageConv(d, out_channels, 7)

    def forward(self, x: Tensor) -> Tensor:
        """
        Raises:
            ValueError: sides that are no multiples of 4, or below 8.
        """
        if min(x.shape[2:]) < LEAST or x.shape[2] % 4 or x.shape[3] % 4:
            raise ValueError(
                f"translation_resnet: images of {x.shape[2]} x {x.shape[3]}; expected multiples of 4 from {LEAST} on"
            )
        h = self.first(reflected(laid_out(x, self.last), EDGE))  # (B, D, H, W)
        for layer in (*self.down, *self.middle, *self.up):  # (B, 4D, H/4, W/4) in the middle
            h = layer(h)
        return torch.tanh(self.last(reflected(h, EDGE)))

    def init_weights(self) -> None:
        init_as_pix2pix(self)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.middle)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        return (torch.zeros(batch_size, self.in_channels, self.image_size, self.image_size, device=device),)
