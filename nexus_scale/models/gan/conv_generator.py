"""A generator of images from a vector of noise, by upsampling and residual convolutions.

Source: Radford et al. 2016 (DCGAN); the residual form without norms is that of Mescheder et al. 2018, appendix H.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network
from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts, halved
from nexus_scale.models.layers.linear import Conv2d, Linear

RESIDUAL = 0.1
"""Weight of a residual branch, in place of a norm."""


class UpBlock(nn.Module):
    """(B, D, H, W) -> (B, D, 2H, 2W)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.conv1, self.conv2 = Conv2d(hidden_size, hidden_size), Conv2d(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2, mode="nearest")
        return x + RESIDUAL * self.conv2(F.silu(self.conv1(F.silu(x))))


class ConvGenerator(Network):
    """Noise (B, noise_size), and a class where it has classes -> images (B, image_channels, image_size, image_size) in [-1, 1].

    Args:
        noise_size: length of the noise.
        hidden_size: channels throughout.
        depth: blocks, each of which doubles height and width.
        num_classes: classes that it is told; 0: none.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        image_size: int = 32,
        noise_size: int = 128,
        hidden_size: int = 128,
        depth: int = 3,
        num_classes: int = 0,
    ):
        super().__init__()
        counts = {
            "image_channels": image_channels,
            "noise_size": noise_size,
            "hidden_size": hidden_size,
            "depth": depth,
        }
        check_counts("conv_generator", {**counts, "image_size": image_size})
        base = halved("conv_generator", image_size, depth)
        self.noise_size, self.num_classes, self.base = noise_size, num_classes, base
        self.first = Linear(noise_size + num_classes, hidden_size * self.base**2)
        self.middle = nn.ModuleList(UpBlock(hidden_size) for _ in range(depth))
        self.last = Conv2d(hidden_size, image_channels)

    def init_weights(self) -> None:
        init.xavier_(self.first)
        for block in self.middle:
            assert isinstance(block, UpBlock)
            init.kaiming_(block.conv1)
            init.kaiming_(block.conv2)
        init.xavier_(self.last)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.middle)

    def forward(self, z: Tensor, cond: Cond) -> Tensor:
        if self.num_classes:
            z = torch.cat([z, F.one_hot(cond["label"], self.num_classes).to(z.dtype)], dim=1)
        h = self.first(z).unflatten(1, (-1, self.base, self.base))  # (B, D, s, s)
        for block in self.middle:
            h = block(h)
        return torch.tanh(self.last(F.silu(h)))

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        label = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return torch.zeros(batch_size, self.noise_size, device=device), {"label": label}
