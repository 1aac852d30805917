"""A discriminator of patches: convolutions, no pooling to one number; each place judges the patch that it sees.

Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks" (70 x 70 pixels with 3 layers); Esser et al.
2021 (VQGAN), where it judges an autoencoder. Their batch norms mix samples, so that two workers would train otherwise than one; here they
are group norms, or what a batch norm of one image is, an instance norm. Zhu et al. 2017 (CycleGAN) norm without scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Network, UserError
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.image_convs import ImageConv, InstanceNorms, init_as_pix2pix, laid_out
from nexus_scale.models.layers.tags import KeepsTags, tag_param

SLOPE = 0.2
WIDEST = 8
"""Channels grow to at most this many times `hidden_size`."""


class Layer(KeepsTags, nn.Module):
    """leaky_relu(norm(conv(x))). `num_groups`: of the norm; as many as channels: an instance norm."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, num_groups: int, affine: bool = True):
        super().__init__()
        self.conv = ImageConv(in_channels, out_channels, 4, stride=stride, padding=1, bias=not affine)
        self.num_groups = num_groups
        self.scale = tag_param(nn.Parameter(torch.ones(out_channels)), decay=False) if affine else None
        self.shift = tag_param(nn.Parameter(torch.zeros(out_channels)), decay=False) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(F.group_norm(self.conv(x), self.num_groups, self.scale, self.shift), SLOPE)


class PatchDiscriminator(Network):
    """Images (B, image_channels, H, W) in [-1, 1] -> logits (B, 1, h, w), larger for real ones.

    Args:
        image_size: height and width that FLOPs are counted for; others work.
        hidden_size: channels of the first convolution.
        depth: layers between the first and the last; each but the last of them halves height and width.
        norm: `group`, or one of `InstanceNorms`.
        num_groups: of the group norms.
    """

    def __init__(
        self,
        *,
        image_channels: int = 3,
        image_size: int = 256,
        hidden_size: int = 64,
        depth: int = 3,
        norm: Literal["group"] | InstanceNorms = "group",
        num_groups: int = 32,
    ):
        super().__init__()
        counts = {
            "image_channels": image_channels,
            "image_size": image_size,
            "hidden_size": hidden_size,
            "depth": depth,
        }
        check_counts("patch_discriminator", {**counts, "num_groups": num_groups})
        if norm == "group" and hidden_size % num_groups:
            raise UserError(
                f"patch_discriminator.num_groups: {num_groups} does not divide hidden_size {hidden_size}; change one"
            )
        self.image_channels, self.image_size = image_channels, image_size
        self.hidden_size, self.depth, self.norm, self.num_groups = hidden_size, depth, norm, num_groups

        def width(layer: int) -> int:
            return hidden_size * min(2 ** min(layer, WIDEST), WIDEST)

        self.first = ImageConv(image_channels, hidden_size, 4, stride=2, padding=1)
        self.layers = nn.ModuleList(
            Layer(
                width(i),
                width(i + 1),
                2 if i + 1 < depth else 1,
                num_groups if norm == "group" else width(i + 1),
                norm != "instance",
            )
            for i in range(depth)
        )
        self.last = ImageConv(width(depth), 1, 4, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """
        Raises:
            ValueError: images that no patch is left of.
        """
        least = 2 ** (self.depth + 1)
        if min(x.shape[2:]) < least:
            raise ValueError(
                f"images of {x.shape[2]} x {x.shape[3]}: {self.depth} layers take at least {least} x {least} pixels; lower "
                "patch_discriminator.depth"
            )
        h = F.leaky_relu(self.first(laid_out(x, self.first)), SLOPE)
        for layer in self.layers:
            h = layer(h)
        return self.last(h)

    def init_weights(self) -> None:
        """See `init_as_pix2pix`."""
        init_as_pix2pix(self)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor]:
        return (torch.zeros(batch_size, self.image_channels, self.image_size, self.image_size, device=device),)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, depth={self.depth}"
