"""ConvNeXt along time: as many steps out as in, at a cost that does not depend on the sample rate.

Source: Siuzdak 2023, "Vocos: Closing the gap between time-domain and Fourier-based neural vocoders", section 3.2; Liu et al. 2022,
"A ConvNet for the 2020s".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.kernels.norms import layer_norm
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.tags import KeepsTags, tag_param

KERNEL = 7
EPS = 1e-6


class TimeConv(KeepsTags, nn.Conv1d):
    """(B, C, T) -> (B, C', T), the ends padded with zeros; with `depthwise` each channel by itself, or channels in `groups`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = KERNEL,
        *,
        depthwise: bool = False,
        groups: int = 1,
    ):
        assert kernel_size % 2 == 1, kernel_size
        groups = in_channels if depthwise else groups
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups)
        tag_param(self.weight, decay=True)
        assert self.bias is not None
        tag_param(self.bias, decay=False)

    def reset_parameters(self) -> None:
        """Nothing: networks initialise themselves in `init_weights`, once."""


class TimeNorm(KeepsTags, nn.Module):
    """Layer norm over the last dimension, (B, T, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = tag_param(nn.Parameter(torch.empty(channels)), decay=False)
        self.bias = tag_param(nn.Parameter(torch.empty(channels)), decay=False)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, EPS)

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)


class ConvNeXtBlock(KeepsTags, nn.Module):
    """x + scale * mlp(norm(depthwise(x))), (B, C, T).

    Args:
        scale: what every channel of the branch begins with.
    """

    def __init__(self, channels: int, mlp_channels: int, scale: float):
        super().__init__()
        self.depthwise = TimeConv(channels, channels, depthwise=True)
        self.norm = TimeNorm(channels)
        self.up = Linear(channels, mlp_channels)
        self.down = Linear(mlp_channels, channels)
        self.scale = tag_param(nn.Parameter(torch.empty(channels)), decay=False)
        self.first_scale = scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.depthwise(x).transpose(1, 2))  # (B, T, C)
        h = self.down(F.gelu(self.up(h)))
        return x + (self.scale * h).transpose(1, 2)

    def init_weights(self) -> None:
        nn.init.constant_(self.scale, self.first_scale)


class ConvNeXt(nn.Module):
    """Features (B, in_channels, T) -> (B, T, channels): an embedding of seven steps, then blocks, each end normalised."""

    def __init__(self, in_channels: int, channels: int, mlp_channels: int, depth: int):
        super().__init__()
        self.embed = TimeConv(in_channels, channels)
        self.norm_in = TimeNorm(channels)
        self.blocks = nn.ModuleList(ConvNeXtBlock(channels, mlp_channels, 1 / depth) for _ in range(depth))
        self.norm_out = TimeNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm_in(self.embed(x.to(self.embed.weight.dtype)).transpose(1, 2)).transpose(1, 2)  # (B, C, T)
        for block in self.blocks:
            h = block(h)
        return self.norm_out(h.transpose(1, 2))


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The blocks of all trunks in a network, in order."""
    return [block for block in net.modules() if isinstance(block, ConvNeXtBlock)]


def init_weights(net: nn.Module) -> None:
    """Convolutions and linears N(0, 0.02^2) cut at 2, biases zero, norms one: Vocos's."""
    for module in net.modules():
        if isinstance(module, TimeConv | Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, TimeNorm | ConvNeXtBlock):
            module.init_weights()
