"""A critic of images: residual convolutions and pooling down to one number. The counterpart of `conv_generator`.

Source: Radford et al. 2016 (DCGAN); Mescheder et al. 2018, appendix H; classes by projection: Miyato & Koyama 2018.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network
from nexus_scale.models.gan.conv_generator import RESIDUAL
from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts, halved
from nexus_scale.models.layers.linear import Conv2d, Linear


class DownBlock(nn.Module):
    """(B, D, H, W) -> (B, D, H/2, W/2)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.conv1, self.conv2 = Conv2d(hidden_size, hidden_size), Conv2d(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        # SiLU and not a leaky ReLU: a gradient penalty differentiates it twice.
        return F.avg_pool2d(x + RESIDUAL * self.conv2(F.silu(self.conv1(F.silu(x)))), 2)


class ConvCritic(Network):
    """Images (B, image_channels, image_size, image_size), and a class where it has classes -> (B,), larger for real ones.

    Args:
        hidden_size: channels throughout.
        depth: blocks, each of which halves height and width.
        num_classes: classes that it is told; 0: none.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        image_size: int = 32,
        hidden_size: int = 128,
        depth: int = 3,
        num_classes: int = 0,
    ):
        super().__init__()
        counts = {"image_channels": image_channels, "hidden_size": hidden_size, "depth": depth}
        check_counts("conv_critic", {**counts, "image_size": image_size})
        base = halved("conv_critic", image_size, depth)
        self.image_channels, self.image_size, self.num_classes = image_channels, image_size, num_classes
        self.first = Conv2d(image_channels, hidden_size)
        self.middle = nn.ModuleList(DownBlock(hidden_size) for _ in range(depth))
        self.last = Linear(hidden_size * base**2, max(1, num_classes))

    def init_weights(self) -> None:
        init.xavier_(self.first)
        for block in self.middle:
            assert isinstance(block, DownBlock)
            init.kaiming_(block.conv1)
            init.kaiming_(block.conv2)
        init.xavier_(self.last)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.middle)

    def forward(self, x: Tensor, cond: Cond) -> Tensor:
        h = self.first(x)  # (B, D, H, W)
        for block in self.middle:
            h = block(h)
        scores = self.last(F.silu(h).flatten(1))  # (B, max(1, num_classes))
        return scores.gather(1, cond["label"][:, None])[:, 0] if self.num_classes else scores[:, 0]

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        label = torch.zeros(batch_size, dtype=torch.int64, device=device)
        shape = (batch_size, self.image_channels, self.image_size, self.image_size)
        return torch.zeros(shape, device=device), {"label": label}
