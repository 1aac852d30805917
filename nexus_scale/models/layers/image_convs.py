"""Convolutions of images, with any kernel and stride or to twice the size; instance norms, and pix2pix's initialisation of both."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.models.layers.tags import KeepsTags, tag_param

InstanceNorms = Literal["instance", "affine_instance"]
"""`instance`: without a scale and a shift, behind convolutions with a bias (CycleGAN); `affine_instance`: with both, behind convolutions
without one (pix2pix, whose batch norm sees one image)."""


class ImageConv(KeepsTags, nn.Conv2d):
    """A convolution, (B, C, H, W) -> (B, C', (H + 2 padding - kernel_size) / stride + 1, ...), rounded down."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        bias: bool = True,
    ):
        super().__init__(
            in_channels, out_channels, kernel_size, stride=stride, padding=padding, groups=groups, bias=bias
        )
        _tag(self)

    def reset_parameters(self) -> None:
        """Nothing: networks initialise themselves in `init_weights`, once."""


class TransposedConv(KeepsTags, nn.ConvTranspose2d):
    """A transposed convolution, (B, C, H, W) -> (B, C', (H - 1) stride - 2 padding + kernel_size + output_padding, ...)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        output_padding: int = 0,
        bias: bool = True,
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, output_padding, bias=bias)
        _tag(self)

    def reset_parameters(self) -> None:
        """Nothing: networks initialise themselves in `init_weights`, once."""


class DoublingConv(TransposedConv):
    """A transposed convolution of stride 2, (B, C, H, W) -> (B, C', 2H, 2W), with a kernel of 3 or 4 places."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, bias: bool = True):
        assert kernel_size in (3, 4), kernel_size
        super().__init__(
            in_channels, out_channels, kernel_size, stride=2, padding=1, output_padding=4 - kernel_size, bias=bias
        )


def _tag(conv: ImageConv | TransposedConv) -> None:
    tag_param(conv.weight, decay=True)
    if conv.bias is not None:
        tag_param(conv.bias, decay=False)


class InstanceNorm(KeepsTags, nn.Module):
    """Norm of each sample and channel over its places, (B, C, H, W) -> (B, C, H, W); a channel of one place becomes its shift.

    It equals a batch norm that trains on one sample at a time, and does not mix samples.
    """

    def __init__(self, channels: int, affine: bool):
        super().__init__()
        self.channels = channels
        self.scale = tag_param(nn.Parameter(torch.ones(channels)), decay=False) if affine else None
        self.shift = tag_param(nn.Parameter(torch.zeros(channels)), decay=False) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self.channels, self.scale, self.shift)

    def extra_repr(self) -> str:
        return f"{self.channels}, affine={self.scale is not None}"


def laid_out(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Images as a network's first convolution takes them: in its precision, channels last."""
    return x.to(conv.weight.dtype).contiguous(memory_format=torch.channels_last)


def reflected(x: Tensor, places: int) -> Tensor:
    """The image with its edges mirrored outwards, (B, C, H, W) -> (B, C, H + 2 places, W + 2 places).

    Of slices, since the gradient of torch's own reflection has no form on a GPU that repeats to the bit.
    """
    x = torch.cat([x[..., 1 : places + 1].flip(-1), x, x[..., -places - 1 : -1].flip(-1)], dim=-1)
    return torch.cat([x[..., 1 : places + 1, :].flip(-2), x, x[..., -places - 1 : -1, :].flip(-2)], dim=-2)


def init_as_pix2pix(network: nn.Module) -> None:
    """Convolutions N(0, 0.02^2), scales of norms N(1, 0.02^2), the rest zero. Source: Isola et al. 2017, appendix 6.2, and its code."""
    for module in network.modules():
        if isinstance(module, ImageConv | DoublingConv):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(scale := getattr(module, "scale", None), nn.Parameter):
            nn.init.normal_(scale, mean=1.0, std=0.02)
            nn.init.zeros_(module.get_parameter("shift"))
