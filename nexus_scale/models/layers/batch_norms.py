"""Batch norms that do not depend on the number of workers: statistics are of neighbours in the global batch, as many as is said.

A micro-batch is cut into groups of neighbours, and each is normalised by itself, so that two workers learn what one learns. Running
statistics follow the mean over all groups of an optimizer step (`contracts.Follower`), once for each.

Source: Ioffe & Szegedy 2015; groups smaller than the batch: Hoffer et al. 2017, "Train longer, generalize better" (ghost batch norm);
classes that scale and shift: de Vries et al. 2017, Miyato & Koyama 2018.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.models.layers.tags import KeepsTags, tag_param

EPS, MOMENTUM = 1e-5, 0.1


class Statistics(nn.Module):
    """x (B, C, H, W) -> (x - mean) / std of each channel: of `group` neighbours in training, of running means otherwise.

    With fewer samples left over, those are a group. torch's batch norm, where all of a batch is one group.
    """

    running_mean: Tensor
    running_var: Tensor
    pending: Tensor

    def __init__(self, channels: int, group: int):
        super().__init__()
        self.channels, self.group = channels, group
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        # of the groups since the last step: sums of means and of unbiased variances, and their number
        self.register_buffer("pending", torch.zeros(2 * channels + 1), persistent=False)

    def forward(self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """weight, bias: (C,), of all samples alike."""
        weight, bias = (None if one is None else one.float() for one in (weight, bias))  # as the statistics are
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, eps=EPS)
        whole = len(x) - len(x) % self.group
        parts = [self._normalised(part, weight, bias) for part in (x[:whole], x[whole:]) if len(part)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _normalised(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """x: some groups, or a smaller one. Groups lie side by side on channels, so that torch's own batch norm computes them."""
        group = min(self.group, len(x))
        groups = len(x) // group
        y = x.unflatten(0, (groups, group)).transpose(0, 1).flatten(1, 2)  # (group, groups * C, H, W)
        found = self.running_mean.new_zeros(2, groups * self.channels)
        weight, bias = (None if one is None else one.repeat(groups) for one in (weight, bias))
        y = F.batch_norm(y, found[0], found[1], weight, bias, training=True, momentum=1.0, eps=EPS)
        with torch.no_grad():
            sums = found.unflatten(1, (groups, self.channels)).sum(1).flatten()  # (2 C,)
            self.pending.add_(torch.cat([sums, sums.new_full((1,), float(groups))]))
        return y.unflatten(1, (groups, self.channels)).transpose(0, 1).flatten(0, 1)

    def seen(self) -> Tensor:
        return self.pending

    @torch.no_grad()
    def follow(self, total: Tensor) -> None:
        count = total[-1]
        sound = total.isfinite().all() & (count > 0)
        for held, sums in zip((self.running_mean, self.running_var), total[:-1].chunk(2), strict=True):
            held.copy_(torch.where(sound, held.lerp(sums / count, MOMENTUM), held))
        self.pending.zero_()

    def init_weights(self) -> None:
        nn.init.zeros_(self.running_mean)
        nn.init.ones_(self.running_var)
        nn.init.zeros_(self.pending)

    def extra_repr(self) -> str:
        return f"{self.channels}, group={self.group}"


class BatchNorm(KeepsTags, Statistics):
    """torch's BatchNorm2d of groups, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, group: int):
        super().__init__(channels, group)
        self.weight = tag_param(nn.Parameter(torch.ones(channels)), decay=False)
        self.bias = tag_param(nn.Parameter(torch.zeros(channels)), decay=False)

    def forward(self, x: Tensor, *_: Tensor | None) -> Tensor:
        return super().forward(x, self.weight, self.bias)

    def init_weights(self, std: float = 0.0) -> None:
        """The weights N(1, std^2)."""
        super().init_weights()
        nn.init.normal_(self.weight, mean=1.0, std=std)
        nn.init.zeros_(self.bias)


class ConditionalBatchNorm(KeepsTags, Statistics):
    """Each class scales and shifts by its own numbers: x (B, C, H, W), label (B,) -> (B, C, H, W)."""

    def __init__(self, channels: int, group: int, num_classes: int):
        super().__init__(channels, group)
        self.weight = tag_param(nn.Parameter(torch.ones(num_classes, channels)), decay=False)
        self.bias = tag_param(nn.Parameter(torch.zeros(num_classes, channels)), decay=False)

    def forward(self, x: Tensor, label: Tensor | None = None, *_: Tensor | None) -> Tensor:
        assert label is not None
        scale, shift = (F.embedding(label, table)[:, :, None, None] for table in (self.weight, self.bias))
        return super().forward(x) * scale + shift

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
