"""ControlNet of a text-conditioned U-Net: a copy of its way down learns to follow a picture, and what it says is added on the way up.

Source: Zhang et al. 2023, "Adding conditional control to text-to-image diffusion models".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, UserError
from nexus_scale.models.adapters.residuals import ResidualAdapter
from nexus_scale.models.diffusion.unet_condition import UNetCondition
from nexus_scale.models.layers import init
from nexus_scale.models.layers.linear import Conv2d


class ConditionConvs(nn.Module):
    """A picture at the resolution of latents, (B, C, H, W) -> (B, out, H / 2^n, W / 2^n), n one less than `widths`."""

    def __init__(self, in_channels: int, widths: Sequence[int], out_channels: int):
        super().__init__()
        self.conv_in = Conv2d(in_channels, widths[0])
        self.blocks = nn.ModuleList(
            conv
            for before, after in pairwise(widths)
            for conv in (Conv2d(before, before), Conv2d(before, after, stride=2))
        )
        self.conv_out = Conv2d(widths[-1], out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv_in(x))
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)


class UNetControlNet(ResidualAdapter):
    """The way down of a `unet_condition`, which is also given a picture; what each place there gives goes through a convolution that
    starts at zero, and is added to the base's.

    It begins with the base's weights by `init_from`, of the base's own run or folder. 361.3 M parameters beside Stable Diffusion 1.5.
    """

    def __init__(
        self,
        *,
        base: Callable[[], UNetCondition],
        condition: str = "control",
        condition_channels: int = 3,
        condition_widths: tuple[int, ...] = (16, 32, 96, 256),
    ):
        """
        Args:
            base: makes the controlled network; the program gives it.
            condition: the picture that it follows, by its name among the conditions: (B, condition_channels, H, W) in [-1, 1].
            condition_widths: channels of the convolutions that the picture goes through; each but the first halves it, so that there are
                one more than the autoencoder has halvings: 4 for Stable Diffusion's 8.
        """
        super().__init__()
        with torch.device("meta"):
            made = base()
        if not isinstance(made, UNetCondition):
            raise UserError(f"unet_control_net: adapts a {type(made).__name__}; expected a unet_condition")
        if condition_channels < 1 or not condition_widths or min(condition_widths) < 1:
            raise UserError(
                f"unet_control_net: got condition_channels {condition_channels}, condition_widths {list(condition_widths)}; expected "
                "numbers of at least 1"
            )
        self.condition, self.condition_channels = condition, condition_channels
        self.condition_widths = tuple(condition_widths)
        self.twin = base()
        self.twin.cut()
        widths = self.twin.widths
        self.condition_embed = ConditionConvs(condition_channels, condition_widths, widths[0])
        places = [widths[0]]
        for level, width in enumerate(widths):
            places += [width] * (self.twin.depth[level] + (level < len(widths) - 1))
        self.down_convs = nn.ModuleList(Conv2d(width, width, 1) for width in places)
        self.middle_conv = Conv2d(widths[-1], widths[-1], 1)
        self.keep(made)

    def residuals(self, x: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        """For each place on the way down, and the middle.

        Raises:
            ValueError: no such picture, or not of the size that the latents are of.
        """
        self.twin.compiled = self.compiled
        h, context = self.twin.taken(x, t, cond)
        picture = self.given(cond)
        told = self.condition_embed((picture.to(h.dtype) + 1) / 2)
        if told.shape != h.shape:
            factor = 2 ** (len(self.condition_widths) - 1)
            raise ValueError(
                f"condition {self.condition!r} is {tuple(picture.shape[1:])} for latents of {tuple(x.shape[2:])}; condition_widths "
                f"{list(self.condition_widths)} take one of {self.condition_channels} channels and {factor} times their size"
            )
        last, kept = self.twin.levels.descend(h + told, *context)
        return [conv(part) for conv, part in zip((*self.down_convs, self.middle_conv), (*kept, last), strict=True)]

    def init_weights(self) -> None:
        """The copy as its network has it; what is added starts as zero."""
        self.twin.init_weights()
        for module in self.condition_embed.modules():
            if isinstance(module, Conv2d):
                init.uniform_(module)
        for conv in (self.condition_embed.conv_out, *self.down_convs, self.middle_conv):
            assert isinstance(conv, Conv2d)
            init.zero_(conv)

    def blocks(self) -> Sequence[nn.Module]:
        return self.twin.blocks()

    def example_condition(self, batch_size: int, device: torch.device | str) -> Tensor:
        side = self.twin.latent_size * 2 ** (len(self.condition_widths) - 1)
        return torch.zeros(batch_size, self.condition_channels, side, side, device=device)
