"""Learning rates as functions of the step, and optimizers from recipes and tags.

Parameters carry their tags where they are born: `nexus_decay` (False: no weight decay) and `nexus_lr_multiplier` (1.0).
The optimizer only filters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import Tensor

from nexus_scale.config.schema import Optimizer, Schedule
from nexus_scale.kernels import updates
from nexus_scale.kernels.choice import chosen
from nexus_scale.kernels.update import Update


def lr_factor(schedule: Schedule, step: int, steps: int) -> float:
    """Factor of the peak learning rate for the update that makes step `step + 1` of `steps`.

    Warm-up: (step + 1) / warmup_steps. Then with p = (step - warmup) / (steps - warmup) in [0, 1) and f = final_ratio:
    constant 1; linear 1 - (1 - f) p; cosine f + (1 - f) (1 + cos(pi p)) / 2; wsd 1, and over the last decay_steps
    linearly to f.

    Source: Loshchilov & Hutter 2017 (cosine); Hu et al. 2024, MiniCPM (warm-up, stable, decay).
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    span = max(1, steps - schedule.warmup_steps)
    progress = min(1.0, (step - schedule.warmup_steps) / span)
    final = schedule.final_ratio
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "linear":
        return 1.0 - (1.0 - final) * progress
    if schedule.name == "cosine":
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule.name == "wsd":
        decay_steps = min(schedule.decay_steps or max(1, steps // 10), span)
        return 1.0 - (1.0 - final) * min(1.0, max(0.0, (step - (steps - decay_steps)) / decay_steps))
    raise ValueError(f"schedule {schedule.name!r}: expected constant, cosine, linear or wsd")


def make_update(
    spec: Optimizer,
    masters: Sequence[Tensor],
    *,
    weight_decays: Sequence[float],
    lr_multipliers: Sequence[float],
    copies: Sequence[Tensor] | None = None,
) -> Update:
    """The optimizer of a recipe over these tensors, by the kernel that is chosen in this process. `Update` says how it is called."""
    return updates.make_update(
        chosen("adam"), spec, masters, weight_decays=weight_decays, lr_multipliers=lr_multipliers, copies=copies
    )


def tags_of(parameters: Iterable[Tensor], spec: Optimizer) -> tuple[list[float], list[float]]:
    """Weight decay and learning rate multiplier of each parameter, by its tags."""
    tagged = list(parameters)
    decays = [spec.weight_decay if getattr(parameter, "nexus_decay", True) else 0.0 for parameter in tagged]
    return decays, [float(getattr(parameter, "nexus_lr_multiplier", 1.0)) for parameter in tagged]
