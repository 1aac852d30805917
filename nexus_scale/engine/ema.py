"""Moving averages over whatever part of the weights a rank holds: no gather, one fused pass.

Source: Polyak & Juditsky 1992; the warm-up of the decay is TensorFlow's `ExponentialMovingAverage(num_updates)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from nexus_scale.config.schema import Average, ConsistencyDecay, CosineDecay, HalfLifeDecay, PowerDecay
from nexus_scale.processes.sigmas import scales_at


def decay_at(average: Average, step: int, steps: int) -> float:
    """Part of the old average that stays after the update of step `step` (counted from 0) of `steps`."""
    decay = average.decay
    if isinstance(decay, PowerDecay):
        return (step / (step + 1)) ** (gamma_of(decay.sigma_rel) + 1)
    if isinstance(decay, ConsistencyDecay):
        scales = scales_at(step / steps, decay.start_scales, decay.end_scales)
        return math.exp(decay.start_scales * math.log(decay.start_decay) / scales)
    if isinstance(decay, CosineDecay):
        return 1 - (1 - decay.base) * (math.cos(math.pi * min(1.0, step / steps)) + 1) / 2
    if isinstance(decay, HalfLifeDecay):
        half_life = decay.steps if decay.ramp is None else min(decay.steps, decay.ramp * step)
        return 0.5 ** (1 / max(half_life, 1e-8))
    return min(decay, (1 + step) / (10 + step)) if average.warmup else decay


@cache
def gamma_of(sigma_rel: float) -> float:
    """The exponent of a power profile of relative width `sigma_rel`, which is (g + 1)^1/2 (g + 2)^-1 (g + 3)^-1/2 and falls with g."""
    low, high = 0.0, 1.0

    def width(gamma: float) -> float:
        return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)

    while width(high) > sigma_rel:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if width(middle) > sigma_rel else (low, middle)
    return (low + high) / 2


class MovingAverage:
    """The average of a list of float32 tensors, in the same order and shapes (whole parameters, or a rank's shards).

    Args:
        steps: length of the run, which some decays are functions of.
    """

    def __init__(self, spec: Average, source: Sequence[Tensor], steps: int):
        self.spec, self.steps = spec, steps
        self.source = list(source)
        self.values = [tensor.detach().clone() for tensor in self.source]
        self._learns = [False] * len(self.values)

    def decay(self, step: int) -> float:
        """Part that stays after the update of step `step`."""
        return decay_at(self.spec, step, self.steps)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """average <- decay * average + (1 - decay) * weights"""
        torch._foreach_lerp_(self.values, self.source, 1.0 - self.decay(step))

    def leave_to_optimizer(self, learns: Sequence[bool]) -> None:
        """Says which values the optimizer's step moves (`learning`); `update_rest` moves the others."""
        self._learns = list(learns)

    @property
    def learning(self) -> list[Tensor]:
        return [value for value, learns in zip(self.values, self._learns, strict=True) if learns]

    @torch.no_grad()
    def update_rest(self, step: int) -> None:
        """Moves what is not `learning`."""
        rest = [i for i, learns in enumerate(self._learns) if not learns]
        if rest:
            values, source = [self.values[i] for i in rest], [self.source[i] for i in rest]
            torch._foreach_lerp_(values, source, 1.0 - self.decay(step))
