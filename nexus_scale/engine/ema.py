"""Exponential moving averages over whatever part of the weights a rank holds: no gather, one fused pass.

Source: Polyak & Juditsky 1992; the warm-up of the decay is TensorFlow's `ExponentialMovingAverage(num_updates)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nexus_scale.engine.settings import AverageSpec


class Average:
    """The average of a list of float32 tensors, in the same order and shapes (whole parameters, or a rank's shards)."""

    def __init__(self, spec: AverageSpec, source: Sequence[Tensor]):
        self.spec = spec
        self.source = list(source)
        self.values = [tensor.detach().clone() for tensor in self.source]

    def decay(self, step: int) -> float:
        """Part of the old average that stays at step `step` (counted from 0)."""
        return min(self.spec.decay, (1 + step) / (10 + step)) if self.spec.warmup else self.spec.decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- decay * average + (1 - decay) * weights"""
        torch._foreach_lerp_(self.values, self.source, 1.0 - self.decay(step))
