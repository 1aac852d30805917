"""A critic of images: the mirror image of `r3gan_generator`, down to one number.

Source: Huang et al. 2024 (R3GAN), section 3 and appendix; classes by projection: Miyato & Koyama 2018.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network
from nexus_scale.models.gan.r3gan_generator import (
    SMALLEST,
    Convolution,
    ResidualBlock,
    check_stages,
    downsampled,
    init_stages,
    scaled_,
)
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.linear import Linear


class R3GANCritic(Network):
    """Images (B, image_channels, S, S), S = 4 * 2^(stages - 1), and a class where it has classes -> (B,), larger for real ones.

    Args:
        hidden_sizes: channels of each stage, from the images' size down to 4 x 4 pixels.
        depths, num_groups, expansion: see `R3GANGenerator`.
        num_classes: classes that it is told; 0: none.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        hidden_sizes: tuple[int, ...] = (768, 768, 768, 768),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        num_groups: tuple[int, ...] = (96, 96, 96, 96),
        expansion: int = 2,
        num_classes: int = 0,
    ):
        super().__init__()
        check_counts("r3gan_critic", {"image_channels": image_channels})
        check_stages("r3gan_critic", hidden_sizes, depths, num_groups, expansion)
        self.image_channels, self.image_size = image_channels, SMALLEST * 2 ** (len(depths) - 1)
        self.hidden_sizes, self.depths, self.num_groups = tuple(hidden_sizes), tuple(depths), tuple(num_groups)
        self.num_classes, self.expansion = num_classes, expansion
        self.first = Convolution(image_channels, hidden_sizes[0])
        self.stages = nn.ModuleList(
            nn.ModuleList(ResidualBlock(size, groups, expansion) for _ in range(depth))
            for size, depth, groups in zip(hidden_sizes, depths, num_groups, strict=True)
        )
        self.widen = nn.ModuleList(
            Convolution(before, after) if before != after else nn.Identity()
            for before, after in itertools.pairwise(hidden_sizes)
        )
        size = hidden_sizes[-1]
        self.basis = Convolution(size, size, SMALLEST, size, valid=True)
        # The classes' features are as many as the first stage has channels in the generator, which is the last here.
        self.last = Linear(size, size if num_classes else 1, bias=False)
        self.embedding = Linear(num_classes, size, bias=False) if num_classes else None

    def init_weights(self) -> None:
        init_stages(self)
        scaled_(self.first)
        scaled_(self.basis)
        scaled_(self.last)
        if self.embedding is not None:
            scaled_(self.embedding, 1 / math.sqrt(self.embedding.out_features))

    def blocks(self) -> Sequence[nn.Module]:
        return [block for stage in self.stages for block in stage.children()]

    def forward(self, x: Tensor, cond: Cond) -> Tensor:
        h = self.first(x)  # (B, D, S, S)
        for number, stage in enumerate(self.stages):
            h = self.widen[number - 1](downsampled(h)) if number else h
            for block in stage.children():
                h = block(h)
        features = self.last(self.basis(h).flatten(1))  # (B, D or 1)
        if self.embedding is None:
            return features[:, 0]
        return (features * self.embedding(F.one_hot(cond["label"], self.num_classes).to(features.dtype))).sum(1)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        label = torch.zeros(batch_size, dtype=torch.int64, device=device)
        shape = (batch_size, self.image_channels, self.image_size, self.image_size)
        return torch.zeros(shape, device=device), {"label": label}
