"""A discriminator of clips: residual convolutions in time and space, blurred wherever they are halved; each place judges what it sees.

Source: Yu et al. 2023 (MAGVIT-v2), section 3.2: MAGVIT's 3D StyleGAN discriminator with blur pooling (Zhang 2019); how many channels there
are is an assumption.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Network
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.tags import KeepsTags, tag_param

SLOPE = 0.2
WIDEST = 4
"""Channels grow to at most this many times `hidden_size`."""


class VolumeConv(KeepsTags, nn.Conv3d):
    """A convolution that keeps frames, height and width, (B, C, F, H, W) -> (B, C', F, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3, *, bias: bool = True):
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=bias)
        tag_param(self.weight, decay=True)
        if self.bias is not None:
            tag_param(self.bias, decay=False)

    def reset_parameters(self) -> None:
        """Nothing: networks initialise themselves in `init_weights`, once."""


class DownBlock(nn.Module):
    """(B, C, F, H, W) -> (B, C', F/2, H/2, W/2), rounded up."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1, self.conv2 = VolumeConv(in_channels, in_channels), VolumeConv(in_channels, out_channels)
        self.shortcut = VolumeConv(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.conv1(x), SLOPE)
        y = F.leaky_relu(self.conv2(blurred(y)), SLOPE)
        return (y + self.shortcut(blurred(x))) / math.sqrt(2)


def blurred(x: Tensor) -> Tensor:
    """Every other frame, row and column, weighed 1:2:1 with its neighbours: (B, C, F, H, W) -> (B, C, F/2, H/2, W/2), rounded up."""
    y = F.avg_pool3d(F.pad(x, (1, 1, 1, 1, 1, 1), mode="replicate"), 2, stride=1)
    return F.avg_pool3d(y, 2, stride=2)


class VideoDiscriminator(Network):
    """Clips (B, image_channels, F, H, W) in [-1, 1] -> logits (B, 1, f, h, w), larger for real ones.

    Args:
        num_frames, image_size: frames, height and width that FLOPs are counted for; others work.
        hidden_size: channels of the first convolution.
        depth: blocks, each of which halves frames, height and width.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        num_frames: int = 17,
        image_size: tuple[int, int] = (128, 128),
        hidden_size: int = 64,
        depth: int = 4,
    ):
        super().__init__()
        counts = {"image_channels": image_channels, "num_frames": num_frames, "image_size": min(image_size)}
        check_counts("video_discriminator", {**counts, "hidden_size": hidden_size, "depth": depth})
        self.image_channels, self.num_frames, self.image_size = image_channels, num_frames, tuple(image_size)
        self.hidden_size, self.depth = hidden_size, depth
        widths = [hidden_size * min(2**number, WIDEST) for number in range(min(depth, 31) + 1)]
        self.first = VolumeConv(image_channels, hidden_size)
        self.stages = nn.ModuleList(DownBlock(a, b) for a, b in itertools.pairwise(widths))
        self.middle = VolumeConv(widths[-1], widths[-1])
        self.last = VolumeConv(widths[-1], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(x.to(self.first.weight.dtype)), SLOPE)
        for stage in self.stages:
            h = stage(h)
        return self.last(F.leaky_relu(self.middle(h), SLOPE))

    def init_weights(self) -> None:
        """Kaiming normal, zero biases."""
        for module in self.modules():
            if isinstance(module, VolumeConv):
                nn.init.kaiming_normal_(module.weight.flatten(1), a=SLOPE)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.stages)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor]:
        return (torch.zeros(batch_size, self.image_channels, self.num_frames, *self.image_size, device=device),)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, depth={self.depth}"
