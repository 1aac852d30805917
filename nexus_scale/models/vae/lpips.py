"""LPIPS: how different two images look, by the features of a VGG-16 or AlexNet that is given (`init_from`); frozen, as a part of a loss, or
a metric.

Source: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Network, UserError
from nexus_scale.kernels.transfer import constant
from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.linear import Conv2d

SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""ImageNet's mean and deviation for images in [-1, 1]."""


@dataclass(frozen=True)
class Trunk:
    """A network whose features are compared, stage by stage.

    Attributes:
        channels, depth: channels and convolutions of each stage.
        kernels: of each stage's first convolution; its others have 3. Longer networks go on with 3.
        stride: of the first of all.
        pools: kernel of the maximum before each stage from the second on, at stride 2; 0: none.
        least: pixels that an image must have; 0: one for the last stage.
    """

    channels: tuple[int, ...]
    depth: tuple[int, ...]
    kernels: tuple[int, ...] = ()
    stride: int = 1
    pools: tuple[int, ...] = (2, 2, 2, 2)
    least: int = 0


TRUNKS = {
    "vgg": Trunk((64, 128, 256, 512, 512), (2, 2, 3, 3, 3)),
    "alex": Trunk((64, 192, 384, 256, 256), (1, 1, 1, 1, 1), (11, 5), 4, (3, 3, 0, 0), least=31),
}


class Stage(nn.Module):
    """Convolutions with ReLU, behind a pooling with kernel `pool` unless it is 0."""

    def __init__(self, in_channels: int, channels: int, depth: int, pool: int, kernel: int = 3, stride: int = 1):
        super().__init__()
        self.pool = pool
        # AlexNet's first convolution has 2 zeros on each side of its 11
        first = Conv2d(in_channels, channels, kernel, stride=stride, padding=min(2, kernel // 2))
        self.convs = nn.ModuleList([first, *(Conv2d(channels, channels) for _ in range(depth - 1))])

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(x, self.pool, 2) if self.pool else x
        for conv in self.convs:
            x = F.relu(conv(x))
        return x


class Head(nn.Conv2d):
    """The weight of each channel's squared difference."""

    def __init__(self, channels: int):
        super().__init__(channels, 1, 1, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: networks initialise themselves in `init_weights`, once."""


class LPIPS(Network):
    """Two images in [-1, 1], (B, 3, H, W) each -> their distance (B,) float32.

    Args:
        channels, depth: of each stage: its channels and convolutions; those of the published trunk unless given.
        trunk: `vgg`, which losses use, or `alex`, which the package takes for a metric.
    """

    def __init__(
        self, *, channels: tuple[int, ...] | None = None, depth: tuple[int, ...] | None = None, trunk: str = "vgg"
    ):
        super().__init__()
        if trunk not in TRUNKS:
            raise UserError(f"lpips: got trunk {trunk!r}; expected {' or '.join(TRUNKS)}")
        self.trunk = TRUNKS[trunk]
        channels, depth = channels or self.trunk.channels, depth or self.trunk.depth
        if len(channels) != len(depth):
            raise UserError(f"lpips: got channels {channels} and depth {depth}; expected as many of both")
        check_counts("lpips", {"channels": min(channels, default=0), "depth": min(depth, default=0)})
        self.channels, self.depth = tuple(channels), tuple(depth)
        before = (3, *channels)
        kernels, pools = (*self.trunk.kernels, *[3] * len(depth)), (0, *self.trunk.pools, *[2] * len(depth))
        self.stages = nn.ModuleList(
            Stage(before[i], channels[i], depth[i], pools[i], kernels[i], self.trunk.stride if i == 0 else 1)
            for i in range(len(channels))
        )
        self.heads = nn.ModuleList(Head(width) for width in channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The distance of x from y; gradients flow to y alone.

        Raises:
            ValueError: images smaller than the last stage's pixel.
        """
        least = self.trunk.least or 2 ** (len(self.channels) - 1)
        if min(x.shape[2:]) < least:
            raise ValueError(f"images of {x.shape[2]} x {x.shape[3]}: LPIPS takes at least {least} x {least} pixels")
        with torch.no_grad():
            of_x = self._features(x)
        distances = [
            head((fx - fy).square()).float().mean((1, 2, 3))
            for head, fx, fy in zip(self.heads, of_x, self._features(y), strict=True)
        ]
        return torch.stack(distances).sum(0)  # (B,)

    def _features(self, x: Tensor) -> list[Tensor]:
        """What each stage gives, (B, C, h, w), as unit vectors over channels."""
        shift, scale = (constant(values, x.dtype, x.device).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
        first = self.heads[0]
        assert isinstance(first, Head)
        h = ((x - shift) / scale).to(first.weight.dtype).contiguous(memory_format=torch.channels_last)
        found = []
        for stage in self.stages:
            h = stage(h)
            # The root's slope at 0 is infinite, and a ReLU's 0 is exact: 1e-10 of the original, within the root.
            norm = (h.square().sum(1, keepdim=True) + 1e-20).sqrt()
            found.append(h / (norm + 1e-10))
        return found

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, Conv2d):
                init.kaiming_(module)
            elif isinstance(module, Head):
                nn.init.constant_(module.weight, 1 / module.weight.shape[1])

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.stages)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, Tensor]:
        x = torch.zeros(batch_size, 3, 256, 256, device=device)
        return x, x

    def extra_repr(self) -> str:
        return f"channels={self.channels}, depth={self.depth}"
