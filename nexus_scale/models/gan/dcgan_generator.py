"""DCGAN's generator: transposed convolutions and batch norms from a vector of noise to an image.

Source: Radford et al. 2016, "Unsupervised Representation Learning with Deep Convolutional Generative Adversarial Networks", section 3 and
figure 1, in the layers of PyTorch's example; a class beside the noise: Mirza & Osindero 2014, "Conditional Generative Adversarial Nets".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network
from nexus_scale.models.layers.batch_norms import BatchNorm
from nexus_scale.models.layers.counts import check_counts, halved
from nexus_scale.models.layers.image_convs import DoublingConv, TransposedConv

KERNEL = 4
STD = 0.02
"""Of first weights, and of the batch norms' scales around 1."""


class Grown(nn.Module):
    """relu(norm(conv(x))), for a transposed convolution."""

    def __init__(self, conv: TransposedConv, norm_group: int):
        super().__init__()
        self.conv = conv
        self.norm = BatchNorm(conv.out_channels, norm_group)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


def base_of(network: str, image_size: int, depth: int, **counts: int) -> int:
    """Height and width of the smallest features.

    Raises:
        UserError: a size that is not halved so often, or another count below 1.
    """
    check_counts(network, {"image_size": image_size, "depth": depth, **counts})
    return halved(network, image_size, depth)


class DCGANGenerator(Network):
    """Noise (B, noise_size), and a class where it has classes -> images (B, image_channels, image_size, image_size) in [-1, 1].

    Args:
        noise_size: length of the noise.
        hidden_size: channels before the last layer; each layer before has twice as many.
        depth: layers that double height and width.
        num_classes: classes that it is told, as ones and zeros behind the noise; 0: none.
        norm_group: samples that are normalised together.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        image_size: int = 64,
        noise_size: int = 100,
        hidden_size: int = 64,
        depth: int = 4,
        num_classes: int = 0,
        norm_group: int = 64,
    ):
        super().__init__()
        base = base_of(
            "dcgan_generator", image_size, depth,
            image_channels=image_channels, noise_size=noise_size, hidden_size=hidden_size, norm_group=norm_group,
        )  # fmt: skip
        self.image_channels, self.image_size, self.hidden_size, self.depth = (
            image_channels,
            image_size,
            hidden_size,
            depth,
        )
        self.noise_size, self.num_classes, self.norm_group = noise_size, num_classes, norm_group
        widths = [hidden_size * 2 ** (depth - 1 - i) for i in range(depth)]
        self.first = Grown(TransposedConv(noise_size + num_classes, widths[0], base, bias=False), norm_group)
        self.middle = nn.ModuleList(
            Grown(DoublingConv(a, b, KERNEL, bias=False), norm_group) for a, b in pairwise(widths)
        )
        self.last = DoublingConv(hidden_size, image_channels, KERNEL, bias=False)

    @property
    def together(self) -> int:  # type: ignore[override]
        return self.norm_group

    def init_weights(self) -> None:
        init_dcgan(self)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.middle)

    def forward(self, z: Tensor, cond: Cond) -> Tensor:
        if self.num_classes:
            z = torch.cat([z, F.one_hot(cond["label"], self.num_classes).to(z.dtype)], dim=1)
        h = self.first(z[:, :, None, None].to(self.last.weight.dtype))  # (B, C, s, s)
        for block in self.middle:
            h = block(h)
        return torch.tanh(self.last(h))

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        label = torch.zeros(batch_size, dtype=torch.int64, device=device)
        return torch.zeros(batch_size, self.noise_size, device=device), {"label": label}


def init_dcgan(network: nn.Module) -> None:
    """Convolutions N(0, 0.02^2), scales of norms N(1, 0.02^2), the rest zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(module.weight, std=STD)
        elif isinstance(module, BatchNorm):
            module.init_weights(STD)
