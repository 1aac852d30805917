"""diffusers' scheduler of a flow-matching run, as its config: the times of samplers/ode.py and the shifts of processes/times.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.processes.paths import RectifiedFlow, find_path
from nexus_scale.processes.times import ExponentialShift, find_time_shift


def flow_match(objective: Mapping[str, Any], sample: Mapping[str, Any], latents: Sequence[int]) -> dict[str, Any]:
    """The FlowMatchEulerDiscreteScheduler that draws as a recipe's sampler does.

    Args:
        objective, sample: the recipe's sections.
        latents: shape (B, C, H, W) that the network is configured for. diffusers has no square-root rule of shifts: its value at this size
            is written.
    Raises:
        UserError: it cannot draw from this network, whose answer it takes for a velocity.
    """
    path, target = find_path(objective.get("path", "rectified_flow")), objective.get("target", "velocity")
    if not isinstance(path, RectifiedFlow) or target != "velocity":
        raise UserError(
            f"diffusers' flow scheduler walks path rectified_flow with target velocity; this recipe has {path} and {target}"
        )
    if sample and sample.get("name") != "ode":
        raise UserError(
            f"diffusers' flow scheduler takes the steps of sampler ode; this recipe draws with {sample.get('name')}"
        )
    rule = find_time_shift(sample.get("shift", 1.0), "shift")
    times: dict[str, Any] = {"shift": rule.of(latents)}
    if isinstance(rule, ExponentialShift):
        times = {
            "shift": 1.0,
            "use_dynamic_shifting": True,
            "base_shift": rule.base_shift,
            "max_shift": rule.max_shift,
            "base_image_seq_len": rule.base_tokens,
            "max_image_seq_len": rule.max_tokens,
        }
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, **times}
