"""DCGAN's discriminator: strided convolutions and batch norms from an image to one number. The counterpart of `dcgan_generator`.

Source: Radford et al. 2016, section 3, in the layers of PyTorch's example; a class beside the image: Mirza & Osindero 2014.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network
from nexus_scale.models.gan.dcgan_generator import KERNEL, base_of, init_dcgan
from nexus_scale.models.layers.batch_norms import BatchNorm
from nexus_scale.models.layers.image_convs import ImageConv

SLOPE = 0.2


def halving(in_channels: int, out_channels: int) -> ImageConv:
    """(B, C, H, W) -> (B, C', H/2, W/2)."""
    return ImageConv(in_channels, out_channels, KERNEL, stride=2, padding=1, bias=False)


class Shrunk(nn.Module):
    """leaky_relu(norm(conv(x)))."""

    def __init__(self, in_channels: int, out_channels: int, norm_group: int):
        super().__init__()
        self.conv = halving(in_channels, out_channels)
        self.norm = BatchNorm(out_channels, norm_group)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), SLOPE)


class DCGANCritic(Network):
    """Images (B, image_channels, image_size, image_size), and a class where it has classes -> logits (B,), larger for real ones.

    Args:
        hidden_size: channels of the first layer; each one behind has twice as many.
        depth: layers that halve height and width.
        num_classes: classes that it is told, as planes of ones and zeros behind the image; 0: none.
        norm_group: samples that are normalised together.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        image_size: int = 64,
        hidden_size: int = 64,
        depth: int = 4,
        num_classes: int = 0,
        norm_group: int = 64,
    ):
        super().__init__()
        base = base_of(
            "dcgan_critic", image_size, depth,
            image_channels=image_channels, hidden_size=hidden_size, norm_group=norm_group,
        )  # fmt: skip
        self.image_channels, self.image_size, self.hidden_size, self.depth = (
            image_channels,
            image_size,
            hidden_size,
            depth,
        )
        self.num_classes, self.norm_group = num_classes, norm_group
        widths = [hidden_size * 2**i for i in range(depth)]
        self.first = halving(image_channels + num_classes, hidden_size)
        self.middle = nn.ModuleList(Shrunk(widths[i], widths[i + 1], norm_group) for i in range(depth - 1))
        self.last = ImageConv(widths[-1], 1, base, bias=False)  # over all of the smallest features

    @property
    def together(self) -> int:  # type: ignore[override]
        return self.norm_group

    def init_weights(self) -> None:
        init_dcgan(self)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.middle)

    def forward(self, x: Tensor, cond: Cond) -> Tensor:
        x = x.to(self.first.weight.dtype)
        if self.num_classes:
            planes = F.one_hot(cond["label"], self.num_classes).to(x.dtype)[:, :, None, None]
            x = torch.cat([x, planes.expand(-1, -1, *x.shape[2:])], dim=1)
        h = F.leaky_relu(self.first(x), SLOPE)  # (B, D, H/2, W/2)
        for block in self.middle:
            h = block(h)
        return self.last(h).flatten()

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        label = torch.zeros(batch_size, dtype=torch.int64, device=device)
        shape = (batch_size, self.image_channels, self.image_size, self.image_size)
        return torch.zeros(shape, device=device), {"label": label}
