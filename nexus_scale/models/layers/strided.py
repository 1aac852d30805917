"""Convolutions of kernel 4 that halve and double height and width; their parameters carry optimizer tags.

Source: Radford et al. 2016 (DCGAN), whose kernel, stride and padding these are.
"""

from __future__ import annotations

from torch import nn

from nexus_scale.models.layers.tags import KeepsTags, tag_param


def _tagged(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    assert layer.bias is not None
    tag_param(layer.weight, decay=True)
    tag_param(layer.bias, decay=False)


class Halve(KeepsTags, nn.Conv2d):
    """(B, C, H, W) -> (B, C', H / 2, W / 2)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 4, stride=2, padding=1)
        _tagged(self)

    def reset_parameters(self) -> None:
        """Nothing: networks initialise themselves in `init_weights`, once."""


class Twice(KeepsTags, nn.ConvTranspose2d):
    """(B, C, H, W) -> (B, C', 2H, 2W)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 4, stride=2, padding=1)
        _tagged(self)

    def reset_parameters(self) -> None:
        """Nothing: networks initialise themselves in `init_weights`, once."""
