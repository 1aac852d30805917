"""A residual critic with spectral norms, told classes by projection, or naming them: that of SNGAN and cGANs with projection; without
spectral norms and with means in place of sums WGAN-GP's. The counterpart of `sngan_generator`.

Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks", appendix B.4; Miyato & Koyama 2018, "cGANs with
Projection Discriminator"; Gulrajani et al. 2017, appendix F; Odena et al. 2017 (auxiliary classes); layers as in their code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network, UserError
from nexus_scale.models.gan.sngan_generator import init_residual
from nexus_scale.models.layers import linear, spectral_norms
from nexus_scale.models.layers.counts import check_counts, halved
from nexus_scale.models.layers.spectral_norms import SpectralNormed
from nexus_scale.models.layers.tags import KeepsTags, tag_param


class Embedding(KeepsTags):
    """A row for each class: label (B,) -> (B, D)."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.weight = tag_param(nn.Parameter(torch.empty(num_classes, hidden_size)), decay=False)

    def forward(self, label: Tensor) -> Tensor:
        return F.embedding(label, self.weight)


class DownBlock(nn.Module):
    """(B, C, H, W) -> (B, C', H/2, W/2), or of the same size: twice ReLU and convolution beside a shortcut. Before the first one of a
    critic, which is given pixels, there is no ReLU."""

    def __init__(self, in_channels: int, out_channels: int, *, spectral: bool, first: bool, halves: bool):
        super().__init__()
        conv: Any = spectral_norms.Conv2d if spectral else linear.Conv2d
        self.first, self.halves = first, halves
        inner = out_channels if first else in_channels
        self.conv1, self.conv2 = conv(in_channels, inner), conv(inner, out_channels)
        self.shortcut = conv(in_channels, out_channels, 1) if halves or in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        if self.first:  # the paper's order, which costs less
            return F.avg_pool2d(h, 2) + self.shortcut(F.avg_pool2d(x, 2))  # type: ignore[misc]
        h = h + (x if self.shortcut is None else self.shortcut(x))
        return F.avg_pool2d(h, 2) if self.halves else h


class SNGANCritic(Network):
    """Images (B, image_channels, image_size, image_size), and a class where it projects -> (B,), larger for real ones; where it names
    classes, also their logits (B, num_classes).

    Args:
        widths: channels behind each block.
        depth: the first so many blocks halve height and width.
        spectral: whether weights are divided by their largest singular value.
        pooling: of the last features over places.
        num_classes: of `classes`; 0: none.
        classes: `projection` is told them, `auxiliary` names them.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        image_size: int = 32,
        widths: tuple[int, ...] = (128, 128, 128, 128),
        depth: int = 2,
        spectral: bool = True,
        pooling: Literal["sum", "mean"] = "sum",
        num_classes: int = 0,
        classes: Literal["projection", "auxiliary"] = "projection",
    ):
        super().__init__()
        check_counts("sngan_critic", {"image_channels": image_channels, "image_size": image_size, "depth": depth})
        if not widths or min(widths) < 1 or depth > len(widths):
            raise UserError(
                f"sngan_critic: got widths {list(widths)} and depth {depth}; expected widths of at least 1, at least {depth} of them"
            )
        halved("sngan_critic", image_size, depth)
        self.image_channels, self.image_size, self.widths, self.depth = image_channels, image_size, tuple(widths), depth
        self.spectral, self.pooling, self.num_classes, self.classes = spectral, pooling, num_classes, classes
        dense: Any = spectral_norms.Linear if spectral else linear.Linear
        table: Any = spectral_norms.Embedding if spectral else Embedding
        self.middle = nn.ModuleList(
            DownBlock(before, width, spectral=spectral, first=i == 0, halves=i < depth)
            for i, (before, width) in enumerate(zip((image_channels, *widths), widths, strict=False))
        )
        self.last = dense(widths[-1], 1)
        told = num_classes > 0 and classes == "projection"
        self.embed = table(num_classes, widths[-1]) if told else None
        self.named = dense(widths[-1], num_classes) if num_classes and not told else None

    def init_weights(self) -> None:
        for block in self.middle:
            init_residual(block)
        for layer in (self.last, self.embed, self.named):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
        for dense in (self.last, self.named):
            if dense is not None:
                nn.init.zeros_(dense.bias)
        for module in self.modules():
            if isinstance(module, SpectralNormed):
                module.init_vectors()

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.middle)

    def forward(self, x: Tensor, cond: Cond) -> Tensor | tuple[Tensor, Tensor]:
        h = x.to(self.last.weight.dtype)
        for block in self.middle:
            h = block(h)
        h = F.relu(h)
        h = h.sum((2, 3)) if self.pooling == "sum" else h.mean((2, 3))  # (B, D)
        answers = self.last(h)[:, 0]
        if self.embed is not None:
            answers = answers + (self.embed(cond["label"]) * h).sum(1)
        return answers if self.named is None else (answers, self.named(h))

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        label = torch.zeros(batch_size, dtype=torch.int64, device=device)
        shape = (batch_size, self.image_channels, self.image_size, self.image_size)
        return torch.zeros(shape, device=device), {"label": label}
