"""A residual generator with batch norms, of which classes may scale and shift their own: that of SNGAN, cGANs with projection and WGAN-GP.

Source: Gulrajani et al. 2017, appendix F; Miyato et al. 2018, appendix B.4; Miyato & Koyama 2018, appendix A; layers as in their code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network, UserError
from nexus_scale.models.layers import init
from nexus_scale.models.layers.batch_norms import BatchNorm, ConditionalBatchNorm, Statistics
from nexus_scale.models.layers.counts import check_counts, halved
from nexus_scale.models.layers.linear import Conv2d, Linear


def doubled(x: Tensor) -> Tensor:
    """Nearest neighbours."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


class UpBlock(nn.Module):
    """(B, C, H, W) -> (B, C', 2H, 2W): twice norm, ReLU and convolution beside a convolution of single places."""

    def __init__(self, in_channels: int, out_channels: int, norm_group: int, num_classes: int):
        super().__init__()

        def norm(channels: int) -> Statistics:
            if num_classes:
                return ConditionalBatchNorm(channels, norm_group, num_classes)
            return BatchNorm(channels, norm_group)

        self.norm1, self.norm2 = norm(in_channels), norm(out_channels)
        self.conv1, self.conv2 = Conv2d(in_channels, out_channels), Conv2d(out_channels, out_channels)
        self.shortcut = Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        h = self.conv1(doubled(F.relu(self.norm1(x, label))))
        return self.conv2(F.relu(self.norm2(h, label))) + doubled(self.shortcut(x))

    def init_weights(self) -> None:
        init_residual(self)


def init_residual(block: Any) -> None:
    """Xavier uniform, that of the two convolutions with gain sqrt 2; biases zero."""
    for conv, gain in ((block.conv1, math.sqrt(2)), (block.conv2, math.sqrt(2)), (block.shortcut, 1.0)):
        if conv is not None:
            nn.init.xavier_uniform_(conv.weight, gain)
            nn.init.zeros_(conv.bias)


class SNGANGenerator(Network):
    """Noise (B, noise_size), and a class where it has classes -> images (B, image_channels, image_size, image_size) in [-1, 1].

    Args:
        noise_size: length of the noise.
        widths: channels of the smallest features, and behind each block, which doubles height and width.
        num_classes: classes that its norms are told; 0: none.
        norm_group: samples that are normalised together.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        image_size: int = 32,
        noise_size: int = 128,
        widths: tuple[int, ...] = (256, 256, 256, 256),
        num_classes: int = 0,
        norm_group: int = 64,
    ):
        super().__init__()
        counts = {"image_channels": image_channels, "noise_size": noise_size, "norm_group": norm_group}
        check_counts("sngan_generator", {**counts, "image_size": image_size})
        depth = len(widths) - 1
        if depth < 1 or min(widths) < 1:
            raise UserError(
                f"sngan_generator.widths: got {list(widths)} for {image_size} pixels; expected one more than the times that the size is "
                "doubled, each at least 1"
            )
        self.image_channels, self.image_size, self.noise_size = image_channels, image_size, noise_size
        self.widths, self.num_classes = tuple(widths), num_classes
        self.norm_group, self.base = norm_group, halved("sngan_generator", image_size, depth, of="widths")
        self.first = Linear(noise_size, widths[0] * self.base**2)
        self.middle = nn.ModuleList(UpBlock(widths[i], widths[i + 1], norm_group, num_classes) for i in range(depth))
        self.norm = BatchNorm(widths[-1], norm_group)
        self.last = Conv2d(widths[-1], image_channels)

    @property
    def together(self) -> int:  # type: ignore[override]
        return self.norm_group

    def init_weights(self) -> None:
        init.xavier_(self.first)
        for module in self.modules():
            if isinstance(module, UpBlock | BatchNorm | ConditionalBatchNorm):
                module.init_weights()
        init.fan_average_(self.last)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.middle)

    def forward(self, z: Tensor, cond: Cond) -> Tensor:
        label = cond["label"] if self.num_classes else None
        h = self.first(z).unflatten(1, (-1, self.base, self.base))  # (B, C, s, s)
        for block in self.middle:
            h = block(h, label)
        return torch.tanh(self.last(F.relu(self.norm(h))))

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        label = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return torch.zeros(batch_size, self.noise_size, device=device), {"label": label}
