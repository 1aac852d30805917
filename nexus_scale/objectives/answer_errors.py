"""How wrong a network's answers are, sample by sample, and by the time that each sample was noised to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def sample_mean(values: Tensor, frame_mask: Tensor | None) -> Tensor:
    """Mean over a sample's values (B, C, ...), or over those of its real frames (B, C, F, ...) with a mask (B, F); (B,)."""
    if frame_mask is None:
        return values.flatten(1).mean(1)
    real = frame_mask.to(values.dtype)
    frames = values.transpose(1, 2).flatten(2).mean(2)  # (B, F)
    return (frames * real).sum(1) / real.sum(1)


def by_time(values: Tensor, bucket: Tensor, count: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Metrics `loss_t0`, `loss_t1`, ...: the sum of the values (B,) whose samples are in each of `count` buckets (B,), and how many."""
    sums = torch.zeros(count, device=values.device).index_add_(0, bucket, values)
    counts = torch.zeros(count, device=values.device).index_add_(0, bucket, torch.ones_like(values))
    return {f"loss_t{i}": pair for i, pair in enumerate(zip(sums.unbind(), counts.unbind(), strict=True))}


@dataclass(frozen=True)
class Errors:
    """Of a network's answers, each (B,) float32: the distance from the target that is trained, the mean squared error, that of an answer
    of zero, and the variational term of a learned variance."""

    distance: Tensor
    squared: Tensor
    zero: Tensor
    bits: Tensor | None
