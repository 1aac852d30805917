"""The course of a U-Net: levels down, a middle, levels up, and what each place on the way down hands to its counterpart on the way up.

Source: Ronneberger et al. 2015; Ho et al. 2020, whose levels up have one stage more than those down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from nexus_scale.models.layers.conv_blocks import Downsample, ResnetBlock, Upsample


class MakeStage(Protocol):
    """`make(level, in_channels, out_channels)`: a stage, called as `stage(x, silu_c, *context, skip=...)`."""

    def __call__(self, level: int, in_channels: int, out_channels: int) -> nn.Module: ...


class Level(nn.Module):
    """Stages of one resolution, and what leads to the next one; None at the end. It holds them and is not called itself."""

    resample: nn.Module | None

    def __init__(self, stages: Sequence[nn.Module], resample: nn.Module | None = None):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.resample = resample

    def parts(self) -> Iterator[nn.Module]:
        """In the order in which they compute."""
        yield from self.stages
        if self.resample is not None:
            yield self.resample


class Levels(nn.Module):
    """x (B, widths[0], H, W) through all levels and back.

    Args:
        widths: channels of each level.
        depths: stages of each level on the way down; there is one more on the way up.
        stage: makes one.
        middle: stages at the lowest resolution.
        embed_dim, num_groups, eps, dropout, scale_shift: of the residual blocks that change the resolution, with `resnet_resample`;
            else a convolution does.
        padding: see `Downsample`.
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        stage: MakeStage,
        middle: Sequence[nn.Module],
        *,
        embed_dim: int,
        num_groups: int,
        eps: float,
        dropout: float,
        scale_shift: bool,
        resnet_resample: bool,
        padding: int = 1,
    ):
        super().__init__()

        def resampler(channels: int, down: bool) -> nn.Module:
            if not resnet_resample:
                return Downsample(channels, padding) if down else Upsample(channels)
            return ResnetBlock(
                channels, channels, embed_dim, num_groups=num_groups, eps=eps, dropout=dropout, scale_shift=scale_shift,
                resample="down" if down else "up",
            )  # fmt: skip

        last, width, kept = len(widths) - 1, widths[0], [widths[0]]
        down, up = list[Level](), list[Level]()
        for level, out in enumerate(widths):
            stages = []
            for _ in range(depths[level]):
                stages.append(stage(level, width, out))
                width = out
                kept.append(out)
            down.append(Level(stages, resampler(out, True) if level < last else None))
            kept += [out] * (level < last)
        for level, out in reversed(list(enumerate(widths))):
            stages = []
            for _ in range(depths[level] + 1):
                stages.append(stage(level, width + kept.pop(), out))
                width = out
            up.append(Level(stages, resampler(out, False) if level else None))
        self.down, self.middle, self.up = nn.ModuleList(down), Level(middle), nn.ModuleList(up)

    def forward(self, x: Tensor, silu_c: Tensor, *context: Any) -> Tensor:
        """silu_c: (B, embed_dim). context: what else all stages are given. A side that is odd becomes (side + 1) / 2 on the way down."""
        return self.ascend(*self.descend(x, silu_c, *context), silu_c, *context)

    def descend(self, x: Tensor, silu_c: Tensor, *context: Any) -> tuple[Tensor, list[Tensor]]:
        """What the middle gives, and what each place on the way down hands to its counterpart on the way up, in the order of the way."""
        kept = [x]
        for level in self._of(self.down):
            for stage in level.stages:
                x = stage(x, silu_c, *context)
                kept.append(x)
            if level.resample is not None:
                x = level.resample(x, silu_c)
                kept.append(x)
        for stage in self.middle.stages:
            x = stage(x, silu_c, *context)
        return x, kept

    def ascend(self, x: Tensor, kept: Sequence[Tensor], silu_c: Tensor, *context: Any) -> Tensor:
        """The way up, (B, widths[0], H, W), from what `descend` gives."""
        kept = list(kept)
        for level in self._of(self.up):
            for stage in level.stages:
                x = stage(x, silu_c, *context, skip=kept.pop())
            if level.resample is not None:
                x = level.resample(x, silu_c, *kept[-1].shape[2:])
        return x

    def parts(self) -> Iterator[nn.Module]:
        """Stages and what lies between them, in the order in which they compute."""
        for level in (*self._of(self.down), self.middle, *self._of(self.up)):
            yield from level.parts()

    @staticmethod
    def _of(levels: nn.ModuleList) -> list[Level]:
        return [level for level in levels if isinstance(level, Level)]
