"""A generator of images from a vector of noise: residual blocks of grouped convolutions without norms, each stage twice as large.

Source: Huang et al. 2024, "The GAN is dead; long live the GAN! A Modern GAN Baseline" (R3GAN), section 3 and appendix; initialisation so
that no norm is needed: Zhang et al. 2019 (Fixup).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network, UserError
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.image_convs import ImageConv
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.tags import KeepsTags, tag_param

SLOPE = 0.2
GAIN = math.sqrt(2 / (1 + SLOPE**2))
"""What keeps the variance through a leaky ReLU."""
SMALLEST = 4
"""Pixels of the first stage."""


class Convolution(ImageConv):
    """A convolution without bias that keeps height and width; `valid`: one of 4 x 4 pixels that leaves one, of each channel by itself."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, groups: int = 1, *, valid: bool = False
    ):
        padding = 0 if valid else kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, groups=groups, bias=False)


def scaled_(layer: nn.Conv2d | nn.Linear, gain: float = 1.0) -> None:
    """N(0, gain^2 / fan in)."""
    nn.init.normal_(layer.weight, std=gain / math.sqrt(layer.weight[0].numel()))


class BiasedLeakyReLU(KeepsTags):
    """leaky_relu(x + b), (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = tag_param(nn.Parameter(torch.empty(channels)), decay=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x + self.bias[:, None, None], SLOPE)


class ResidualBlock(nn.Module):
    """(B, D, H, W) -> the same: D to more channels, a grouped convolution of 3 x 3 there, and back. Begins as the identity."""

    def __init__(self, hidden_size: int, num_groups: int, expansion: int):
        super().__init__()
        wide = expansion * hidden_size
        self.conv1, self.conv2 = Convolution(hidden_size, wide), Convolution(wide, wide, 3, num_groups)
        self.conv3 = Convolution(wide, hidden_size)
        self.act1, self.act2 = BiasedLeakyReLU(wide), BiasedLeakyReLU(wide)

    def init_weights(self, num_blocks: int) -> None:
        """num_blocks: of the whole network; three layers of a branch, whose last is zero, share the variance (Fixup)."""
        for layer in (self.conv1, self.conv2):
            scaled_(layer, GAIN * num_blocks**-0.25)
        nn.init.zeros_(self.conv3.weight)
        for act in (self.act1, self.act2):
            nn.init.zeros_(act.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv3(self.act2(self.conv2(self.act1(self.conv1(x)))))


def upsampled(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W): each value from its neighbours by 1/4 and 3/4 along each axis, zeros beyond the edges."""
    for dim in (2, 3):
        around = F.pad(x, (0, 0, 1, 1) if dim == 2 else (1, 1))
        length = x.shape[dim]
        sides = [0.25 * around.narrow(dim, first, length) + 0.75 * x for first in (0, 2)]
        x = torch.stack(sides, dim=dim + 1).flatten(dim, dim + 1)
    return x


def downsampled(x: Tensor) -> Tensor:
    """(B, C, 2H, 2W) -> (B, C, H, W): weights 1, 3, 3, 1 of 8 along each axis, zeros beyond the edges."""
    for dim in (2, 3):
        around = F.pad(x, (0, 0, 1, 1) if dim == 2 else (1, 1)).unflatten(dim, (-1, 2))  # pairs, half a pair off
        length = x.shape[dim] // 2
        first, last = (around.narrow(dim, start, length).unbind(dim + 1) for start in (0, 1))
        x = (first[0] + 3 * first[1] + 3 * last[0] + last[1]) / 8
    return x


def check_stages(
    name: str, hidden_sizes: Sequence[int], depths: Sequence[int], num_groups: Sequence[int], expansion: int
) -> None:
    """Raises:
    UserError: stages that cannot be; names the network and what differs.
    """
    if not hidden_sizes or not len(hidden_sizes) == len(depths) == len(num_groups):
        raise UserError(
            f"{name}: got {len(hidden_sizes)} hidden_sizes, {len(depths)} depths, {len(num_groups)} num_groups; expected one of each for "
            "each stage"
        )
    for size, depth, groups in zip(hidden_sizes, depths, num_groups, strict=True):
        check_counts(name, {"hidden_sizes": size, "depths": depth, "num_groups": groups, "expansion": expansion})
        if expansion * size % groups:
            raise UserError(
                f"{name}.num_groups: {expansion} * {size} channels of a stage do not divide into {groups} groups"
            )


class Basis(KeepsTags):
    """A learnt pattern of 4 x 4 for each channel, as strong as it is asked for: (B, D) -> (B, D, 4, 4)."""

    def __init__(self, channels: int):
        super().__init__()
        self.pattern = tag_param(nn.Parameter(torch.empty(channels, SMALLEST, SMALLEST)), decay=True)

    def forward(self, h: Tensor) -> Tensor:
        return self.pattern * h[:, :, None, None]


class R3GANGenerator(Network):
    """Noise (B, noise_size), and a class where it has classes -> images (B, image_channels, S, S), S = 4 * 2^(stages - 1), unbounded.

    Args:
        noise_size: length of the noise, and of the class's embedding.
        hidden_sizes: channels of each stage, from 4 x 4 pixels on.
        depths: blocks of each stage.
        num_groups: of each stage's grouped convolutions.
        expansion: channels within a block, for each outside.
        num_classes: classes that it is told; 0: none.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        noise_size: int = 64,
        hidden_sizes: tuple[int, ...] = (768, 768, 768, 768),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        num_groups: tuple[int, ...] = (96, 96, 96, 96),
        expansion: int = 2,
        num_classes: int = 0,
    ):
        super().__init__()
        check_counts("r3gan_generator", {"image_channels": image_channels, "noise_size": noise_size})
        check_stages("r3gan_generator", hidden_sizes, depths, num_groups, expansion)
        self.image_channels, self.noise_size, self.num_classes = image_channels, noise_size, num_classes
        self.hidden_sizes, self.depths, self.num_groups = tuple(hidden_sizes), tuple(depths), tuple(num_groups)
        self.expansion = expansion
        self.embedding = Linear(num_classes, noise_size, bias=False) if num_classes else None
        self.basis = Basis(hidden_sizes[0])
        self.first = Linear(noise_size * (2 if num_classes else 1), hidden_sizes[0], bias=False)
        self.stages = nn.ModuleList(
            nn.ModuleList(ResidualBlock(size, groups, expansion) for _ in range(depth))
            for size, depth, groups in zip(hidden_sizes, depths, num_groups, strict=True)
        )
        self.widen = nn.ModuleList(
            Convolution(before, after) if before != after else nn.Identity()
            for before, after in itertools.pairwise(hidden_sizes)
        )
        self.last = Convolution(hidden_sizes[-1], image_channels)

    def init_weights(self) -> None:
        init_stages(self)
        nn.init.normal_(self.basis.pattern)
        scaled_(self.first)
        scaled_(self.last)

    def blocks(self) -> Sequence[nn.Module]:
        return [block for stage in self.stages for block in stage.children()]

    def forward(self, z: Tensor, cond: Cond) -> Tensor:
        if self.embedding is not None:
            z = torch.cat([z, self.embedding(F.one_hot(cond["label"], self.num_classes).to(z.dtype))], dim=1)
        h = self.basis(self.first(z))  # (B, D, 4, 4)
        for number, stage in enumerate(self.stages):
            h = upsampled(self.widen[number - 1](h)) if number else h
            for block in stage.children():
                h = block(h)
        x: Tensor = self.last(h)
        return x

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        label = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return torch.zeros(batch_size, self.noise_size, device=device), {"label": label}


def init_stages(network: nn.Module) -> None:
    """Blocks, and what changes the number of channels between stages; and the classes' embedding."""
    blocks: list[ResidualBlock] = [module for module in network.modules() if isinstance(module, ResidualBlock)]
    for block in blocks:
        block.init_weights(len(blocks))
    widen, embedding = network.get_submodule("widen"), network.embedding
    for layer in [*widen.children(), embedding]:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            scaled_(layer)
