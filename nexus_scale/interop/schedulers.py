"""diffusers' scheduler of a run, as its config: of flow matching (samplers/ode.py, shifts of processes/times.py), or of a chain's steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.processes.chains import Chain, DDPMCosine, DDPMLinear, DDPMSigmoid, ScaledLinear
from nexus_scale.processes.paths import RectifiedFlow, find_path
from nexus_scale.processes.times import ExponentialShift, find_time_shift

STEPS = 1000
"""Of the chains whose steps networks are told."""
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
BETAS: dict[type[Chain], str] = {
    DDPMLinear: "linear",
    ScaledLinear: "scaled_linear",
    DDPMCosine: "squaredcos_cap_v2",
    DDPMSigmoid: "sigmoid",
}


def chain(objective: Mapping[str, Any], sample: Mapping[str, Any], latents: Sequence[int] = ()) -> dict[str, Any]:
    """The DDPMScheduler that draws as a recipe's ancestral sampler does, or for its steps without noise the DDIMScheduler.

    Args:
        objective, sample: the recipe's sections.
        latents: has no meaning here.
    Raises:
        UserError: diffusers has none for the path, the target, the sampler or its variance.
    """
    path, target = find_path(objective.get("path", "rectified_flow")), objective.get("target", "velocity")
    if not isinstance(path, Chain) or target not in PREDICTIONS or sample.get("name", "ancestral") != "ancestral":
        raise UserError(
            "diffusers' DDPMScheduler walks a chain's steps (path: ddpm_linear, ddpm_cosine, ... with target eps, v or x0, sampler "
            f"ancestral); this recipe has path {path}, target {target} and sampler {sample.get('name')}"
        )
    if path.steps != STEPS:
        raise UserError(f"the network is told thousandths, and a scheduler of {path.steps} steps tells those")
    if path.snr_shift != 1 or (isinstance(path, DDPMCosine) and path != DDPMCosine(steps=path.steps)):
        raise UserError(f"diffusers' DDPMScheduler has the paper's betas alone; this recipe has path {path}")
    learned = objective.get("variance") == "learned"
    variance = sample.get("variance", "learned")
    if learned != (variance == "learned"):
        raise UserError(
            "diffusers' DDPMScheduler draws with a variance that the network learned, or with a fixed one where it learned none; this "
            f"recipe has objective.variance {objective.get('variance', 'fixed')} and sample.variance {variance}"
        )
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler" if variance == "none" else "DDPMScheduler",
        "num_train_timesteps": path.steps,
        "beta_schedule": BETAS[type(path)],
        **{name: getattr(path, name) for name in ("beta_start", "beta_end") if hasattr(path, name)},
        "rescale_betas_zero_snr": path.zero_terminal_snr,
        "prediction_type": PREDICTIONS[target],
        "timestep_spacing": sample.get("spacing", "linspace"),
        "clip_sample": bool(sample.get("clip", False)),
        "steps_offset": 0,
    }
    return config | ({"set_alpha_to_one": True} if variance == "none" else {"variance_type": VARIANCES[variance]})


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
