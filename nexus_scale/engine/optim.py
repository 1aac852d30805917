"""Learning rates as functions of the step, parameter groups from tags, and optimizers' state by name.

Parameters carry their tags where they are born: `nexus_decay` (False: no weight decay) and `nexus_lr_multiplier` (1.0).
The optimizer only filters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nexus_scale.config.schema import Adam, AdamW, Optimizer, RMSprop, Schedule


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


def param_groups(parameters: Iterable[nn.Parameter], spec: Optimizer) -> list[dict[str, Any]]:
    """Optimizer groups by the parameters' tags, in order of first appearance; each has an `lr_multiplier`.

    Their lr is 0 until a step sets it, so an optimizer that takes a trial step when it is made changes nothing.
    """
    groups: dict[tuple[bool, float], dict[str, Any]] = {}
    for parameter in parameters:
        key = (bool(getattr(parameter, "nexus_decay", True)), float(getattr(parameter, "nexus_lr_multiplier", 1.0)))
        if key not in groups:
            decay = spec.weight_decay if key[0] else 0.0
            groups[key] = {"params": [], "lr": 0.0, "weight_decay": decay, "lr_multiplier": key[1]}
        groups[key]["params"].append(parameter)
    return list(groups.values())


class CountedSGD(torch.optim.SGD):
    """torch's SGD with a count of its updates, which checkpoints hold of every optimizer."""

    def step(self, closure: Any = None) -> Any:
        said = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"][:1]:
                state = self.state[parameter]
                state["step"] = state.get("step", 0) + 1
        return said


def make_optimizer(groups: list[dict[str, Any]], spec: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of a recipe over `groups`; of Adam the fastest that kernels/adam.py finds here, torch's over lists of the others."""
    from nexus_scale.kernels.adam import make_adam

    common: dict[str, Any] = {"lr": 0.0, "weight_decay": spec.weight_decay}
    if isinstance(spec, AdamW | Adam):
        return make_adam(groups, betas=spec.betas, eps=spec.eps, decoupled=isinstance(spec, AdamW), **common)
    common |= {"momentum": spec.momentum, "foreach": True}
    if isinstance(spec, RMSprop):
        return torch.optim.RMSprop(groups, alpha=spec.alpha, eps=spec.eps, **common)
    return CountedSGD(groups, nesterov=spec.nesterov, **common)


def moments_of(spec: Optimizer) -> tuple[str, ...]:
    """Names of what an optimizer keeps for each weight; torch's names, also in checkpoints."""
    if isinstance(spec, AdamW | Adam):
        return "exp_avg", "exp_avg_sq"
    momentum = ("momentum_buffer",) if spec.momentum else ()
    return ("square_avg", *momentum) if isinstance(spec, RMSprop) else momentum


@torch.no_grad()
def clip_weights(weights: list[Tensor], bound: float) -> None:
    """Moves each weight into [-bound, bound], in place."""
    torch._foreach_clamp_min_(weights, -bound)
    torch._foreach_clamp_max_(weights, bound)


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes the moments of any optimizer exist from the start, as zeros, so that live views of them can be kept.

    One step with zero gradients and learning rate leaves parameters as they are; what weight decay put into the moments is zeroed.
    Gradients remain the same objects: under offloading DeepSpeed writes into them.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    given = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, gradient in zip(parameters, given, strict=True):
        parameter.grad = gradient
        for value in optimizer.state[parameter].values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                value.zero_()
    set_steps(optimizer, 0)


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Sets the count of updates, which Adam's bias correction reads: per parameter in torch, per group in Apex."""
    for group in optimizer.param_groups:
        if "step" in group:
            if isinstance(group["step"], Tensor):
                group["step"].fill_(steps)
            else:
                group["step"] = steps
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if isinstance(state.get("step"), Tensor):
                state["step"].fill_(float(steps))
            elif "step" in state:
                state["step"] = steps


def get_steps(optimizer: torch.optim.Optimizer) -> int:
    """The number of updates that an optimizer has made."""
    for group in optimizer.param_groups:
        if "step" in group:
            return int(group["step"])
        for parameter in group["params"]:
            if "step" in optimizer.state.get(parameter, {}):
                return int(optimizer.state[parameter]["step"])
    return 0
