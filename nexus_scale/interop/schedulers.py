"""diffusers' scheduler of a run, as its config: of flow matching (samplers/ode.py, shifts of processes/times.py), or of a chain's steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from nexus_scale.config import registry
from nexus_scale.contracts import UserError
from nexus_scale.objectives.consistency import Consistency
from nexus_scale.processes.chains import Chain, DDPMCosine, DDPMLinear, DDPMSigmoid, ScaledLinear
from nexus_scale.processes.paths import RectifiedFlow, find_path
from nexus_scale.processes.times import ExponentialShift, find_time_shift

FindScheduler = Callable[[Mapping[str, Any], Mapping[str, Any], Sequence[int]], dict[str, Any]]
"""A scheduler's config, from a recipe's `objective:` and `sample:` and the shape of latents."""
STEPS = 1000
"""Of the chains whose steps networks are told."""
FOR_GOOD = 10**12
"""A step by which every schedule has ended."""
PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
VARIANCES = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
BETAS: dict[type[Chain], str] = {
    DDPMLinear: "linear",
    ScaledLinear: "scaled_linear",
    DDPMCosine: "squaredcos_cap_v2",
    DDPMSigmoid: "sigmoid",
}


class Solver(NamedTuple):
    """A scheduler of diffusers that steps as a sampler of ours does.

    Attributes:
        class_name: theirs.
        settings: what ours are called there, by our names.
        constants: what it needs beside them.
        ends: how it says that it ends at the data, and at the first step of the chain; None: it has one end alone.
        levels: it spaces levels of noise where `sigmas` asks for it.
    """

    class_name: str
    settings: Mapping[str, str] = MappingProxyType({})
    constants: Mapping[str, Any] = MappingProxyType({})
    ends: tuple[str, Any, Any] | None = None
    levels: bool = False


_SIGMA, _ALPHA = ("final_sigmas_type", "zero", "sigma_min"), ("set_alpha_to_one", True, False)
SOLVERS: Mapping[str, Solver] = {
    "ddim": Solver("DDIMScheduler", {"clip": "clip_sample"}, ends=_ALPHA),
    "pndm": Solver("PNDMScheduler", constants={"skip_prk_steps": True}, ends=_ALPHA),
    "lcm": Solver("LCMScheduler", {"original_steps": "original_inference_steps", "timestep_scaling": "timestep_scaling"}, ends=_ALPHA),
    "euler": Solver("EulerDiscreteScheduler", ends=_SIGMA, levels=True),
    "euler_ancestral": Solver("EulerAncestralDiscreteScheduler"),
    "heun": Solver("HeunDiscreteScheduler", levels=True),
    "midpoint": Solver("KDPM2DiscreteScheduler", levels=True),
    "lms": Solver("LMSDiscreteScheduler", levels=True),
    "dpm_multistep": Solver(
        "DPMSolverMultistepScheduler",
        {"order": "solver_order", "method": "solver_type", "lower_order_final": "lower_order_final", "euler_at_final": "euler_at_final"},
        ends=_SIGMA,
        levels=True,
    ),
    "dpm_singlestep": Solver(
        "DPMSolverSinglestepScheduler",
        {"order": "solver_order", "method": "solver_type", "lower_order_final": "lower_order_final"},
        ends=_SIGMA,
        levels=True,
    ),
    "unipc": Solver("UniPCMultistepScheduler", {"order": "solver_order", "scaling": "solver_type"}, ends=_SIGMA, levels=True),
}  # fmt: skip
ALGORITHMS = {
    ("x0", 0.0): "dpmsolver++", ("eps", 0.0): "dpmsolver", ("x0", 1.0): "sde-dpmsolver++", ("eps", 1.0): "sde-dpmsolver",
}  # fmt: skip
"""Of DPMSolverMultistepScheduler, by `predicts` and `eta`."""
COMMON = {
    "steps",
    "spacing",
    "offset",
    "final",
    "sigmas",
    "clip",
    "order",
    "predicts",
    "eta",
    "keeps_eps",
    "guidance",
    "name",
}
BY_RATIO = ("euler", "euler_ancestral", "heun", "midpoint", "lms")
"""k-diffusion's, which step in sigma / alpha."""


def _solver(name: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the scheduler that steps as a sampler does.

    Raises:
        UserError: a setting of ours that it has not, or a grid that it leaves.
    """
    solver = SOLVERS[name]
    given = {key: value for key, value in sample.items() if key not in ("name", "guidance")}
    sampler = registry.find("samplers", name)(**given)
    for why in (*_unnamed(name, vars(sampler), sample), *_other_grid(name, vars(sampler))):
        raise UserError(f"{solver.class_name} of diffusers {why}")
    config = {
        "_class_name": solver.class_name,
        **solver.constants,
        "timestep_spacing": sampler.spacing if sampler.sigmas == "spaced" else "linspace",
        "steps_offset": sampler.offset,
        **{theirs: getattr(sampler, ours) for ours, theirs in solver.settings.items()},
    }
    if solver.ends is not None:
        config[solver.ends[0]] = solver.ends[2 if sampler.final == "first" else 1]
    if sampler.sigmas != "spaced":
        config[f"use_{sampler.sigmas}_sigmas"] = True
    if name == "dpm_multistep":
        config["algorithm_type"] = ALGORITHMS[sampler.predicts, sampler.eta]
    elif name == "unipc":
        config["predict_x0"] = sampler.predicts == "x0"
    elif name == "dpm_singlestep":
        config["algorithm_type"] = "dpmsolver++"
    return config | _clip(solver, sampler.clip)


def _clip(solver: Solver, clip: Any) -> dict[str, Any]:
    if isinstance(clip, bool):
        return {"clip_sample": clip} if "clip" in solver.settings else {}
    if "to" in clip:
        return {"clip_sample": True, "clip_sample_range": clip["to"]}
    ratio, most = clip.get("quantile", 0.995), clip.get("most", 1.0)
    return {"clip_sample": False, "thresholding": True, "dynamic_thresholding_ratio": ratio, "sample_max_value": most}


def _unnamed(name: str, told: Mapping[str, Any], sample: Mapping[str, Any]) -> Iterator[str]:
    """Settings of ours that a scheduler has no word for."""
    solver, plain = SOLVERS[name], registry.find("samplers", name)()
    odd = [key for key in sample if key not in {*COMMON, *solver.settings} and sample[key] != getattr(plain, key)]
    if told["final"] == "first" and solver.ends is None:
        odd.append("final")
    if told["sigmas"] != "spaced" and not (solver.levels and isinstance(told["sigmas"], str)):
        odd.append("sigmas")
    cuts = isinstance(told["clip"], Mapping) and "to" not in told["clip"]
    cuts = cuts and name in ("dpm_multistep", "dpm_singlestep", "unipc")
    if told["clip"] and "clip" not in solver.settings and not cuts:
        odd.append("clip")
    if name == "dpm_multistep":
        known = (told["predicts"], told["eta"]) in ALGORITHMS and (told["order"] < 3 or not told["eta"])
        odd += [] if known else ["eta"]
    elif name in ("ddim", "euler_ancestral") and told["eta"] != (name == "euler_ancestral"):
        odd.append("eta")
    elif name == "unipc" and told["order"] > 3:
        odd.append("order")
    yield from (f"has no setting for sample.{key} = {told.get(key)!r}; leave it out" for key in odd)
    if name == "ddim" and told["clip"] and not told["keeps_eps"]:
        yield "keeps the network's eps where x0 is clipped; set sample.keeps_eps: true"


def _other_grid(name: str, told: Mapping[str, Any]) -> Iterator[str]:
    """Grids that a scheduler walks otherwise than ours."""
    steps, spacing, spaced = told["steps"], told["spacing"], told["sigmas"] == "spaced"
    if name in ("ddim", "pndm") and (spacing == "linspace" or (spacing == "trailing" and STEPS % steps)):
        yield f"leaves its own grid under {spacing} at {steps} steps; choose spacing leading, or trailing with steps that divide {STEPS}"
    if name in BY_RATIO and spaced and spacing == "linspace" and steps > 1 and (STEPS - 1) % (steps - 1):
        yield f"walks between the chain's steps under linspace at {steps} steps; choose spacing leading or trailing"
    if name in BY_RATIO and not spaced and spacing == "leading":
        yield "takes the ends of its levels from leading times; choose spacing linspace"
    if name == "dpm_singlestep" and spaced and spacing != "linspace":
        yield "walks linspace alone; choose spacing linspace"
    if name == "unipc" and not spaced and told["final"] == "first":
        yield "ends its levels twice at the lowest; choose final data"


def chain(objective: Mapping[str, Any], sample: Mapping[str, Any], latents: Sequence[int] = ()) -> dict[str, Any]:
    """The scheduler that draws as a recipe's sampler does, such as DDPMScheduler for ancestral, or for its steps without noise
    DDIMScheduler.

    Args:
        objective, sample: the recipe's sections.
        latents: has no meaning here.
    Raises:
        UserError: diffusers has none for the path, the target, the sampler or its variance.
    """
    path, target = find_path(objective.get("path", "rectified_flow")), objective.get("target", "velocity")
    name = sample.get("name", "ancestral")
    if not isinstance(path, Chain) or target not in PREDICTIONS or name not in ("ancestral", *SOLVERS):
        raise UserError(
            "diffusers' DDPMScheduler walks a chain's steps (path: ddpm_linear, ddpm_cosine, ... with target eps, v or x0, sampler "
            f"ancestral); this recipe has path {path}, target {target} and sampler {sample.get('name')}"
        )
    if path.steps != STEPS:
        raise UserError(f"the network is told thousandths, and a scheduler of {path.steps} steps tells those")
    if path.snr_shift != 1 or (isinstance(path, DDPMCosine) and path != DDPMCosine(steps=path.steps)):
        raise UserError(f"diffusers' DDPMScheduler has the paper's betas alone; this recipe has path {path}")
    learned = objective.get("variance") == "learned"
    common: dict[str, Any] = {
        "num_train_timesteps": path.steps,
        "beta_schedule": BETAS[type(path)],
        **{name: getattr(path, name) for name in ("beta_start", "beta_end") if hasattr(path, name)},
        "rescale_betas_zero_snr": path.zero_terminal_snr,
        "prediction_type": PREDICTIONS[target],
    }
    if name != "ancestral" and not learned:
        if name == "pndm" and target != "eps":
            raise UserError(
                "PNDMScheduler of diffusers extrapolates v, which then stands for other samples; its target is eps"
            )
        return common | _solver(name, sample)
    variance = sample.get("variance", "learned")
    if learned != (variance == "learned"):
        raise UserError(
            "diffusers' DDPMScheduler draws with a variance that the network learned, or with a fixed one where it learned none; this "
            f"recipe has objective.variance {objective.get('variance', 'fixed')} and sample.variance {variance}"
        )
    if variance == "none":
        return common | _without_noise(sample)
    return {
        "_class_name": "DDPMScheduler",
        **common,
        "timestep_spacing": sample.get("spacing", "linspace"),
        "steps_offset": sample.get("offset", 0),
        "variance_type": VARIANCES[variance],
        **_clip(SOLVERS["ddim"], sample.get("clip", False)),
    }


def _without_noise(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Of ancestral's steps without variance: DDIMScheduler. Behind a clipped x0 that keeps the network's eps, where ours, and DPM-Solver++
    of the first order, take what the x0 leaves.

    Raises:
        UserError: neither walks the sampler's grid, or has its clip.
    """
    clip, spacing = sample.get("clip", False), sample.get("spacing", "linspace")
    walk = {"steps": sample.get("steps", 250), "spacing": spacing, "offset": sample.get("offset", 0)}
    if not clip:
        return _solver("ddim", walk)
    if spacing != "trailing":
        raise UserError(
            f"diffusers steps so behind a clipped x0 under spacing trailing alone; this recipe has {spacing}: choose trailing, or sampler "
            "ddim with keeps_eps: true"
        )
    cut = {"quantile": 1.0, "most": 1.0} if clip in (True, {"to": 1.0}) else clip
    return _solver("dpm_multistep", {**walk, "order": 1, "clip": cut})


def of_noise_alone(objective: Mapping[str, Any], sample: Mapping[str, Any], latents: Sequence[int]) -> dict[str, Any]:
    """The scheduler with which DDPMPipeline, which tells its network nothing but time, draws as a recipe's sampler does: of a chain, or
    of flow matching in Euler's steps.

    Raises:
        UserError: there is none; see `chain` and `flow_match`.
    """
    if not isinstance(find_path(objective.get("path", "rectified_flow")), RectifiedFlow):
        return chain(objective, sample, latents)
    kind = {"method": sample.get("method", "euler"), "spacing": sample.get("spacing", "linspace")}
    if kind != {"method": "euler", "spacing": "linspace"}:
        raise UserError(
            f"diffusers' flow scheduler takes Euler's steps at even times down to 0.001; this recipe's sampler has {kind}"
        )
    return flow_match(objective, sample, latents)


def counted(scheduler: FindScheduler, counts_steps: bool) -> FindScheduler:
    """`scheduler`, for a network that counts DDPM's steps, or is told 1000 t: it refuses the one that would be a step off."""

    def found(objective: Mapping[str, Any], sample: Mapping[str, Any], latents: Sequence[int]) -> dict[str, Any]:
        config = scheduler(objective, sample, latents)
        flows = config["_class_name"].startswith("FlowMatch")
        if flows == counts_steps:
            tells, counts = ("1000 t", "1000 t - 1") if flows else ("1000 t - 1, the number of a step,", "1000 t")
            raise UserError(
                f"{config['_class_name']} of diffusers tells the network {tells} and this one was trained on {counts}: train it with "
                f"counts_steps: {str(not flows).lower()}"
            )
        return config

    return found


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


def consistency(objective: Mapping[str, Any], sample: Mapping[str, Any], latents: Sequence[int] = ()) -> dict[str, Any]:
    """The CMStochasticIterativeScheduler that draws as a consistency model does: in as many steps as it is asked for, or at `timesteps`
    that count levels from the highest down.

    Args:
        objective, sample: the recipe's sections.
        latents: has no meaning here.
    Raises:
        UserError: the recipe's sampler is another.
    """
    if sample.get("name", "consistency") != "consistency":
        raise UserError(
            f"diffusers' ConsistencyModelPipeline takes the steps of sampler consistency; this recipe draws with {sample.get('name')}"
        )
    arguments: dict[str, Any] = {key: tuple(it) if isinstance(it, list) else it for key, it in objective.items()}
    trained = Consistency(**arguments)
    return {
        "_class_name": "CMStochasticIterativeScheduler",
        "num_train_timesteps": sample.get("scales", trained.scales_at(FOR_GOOD)),
        "sigma_min": trained.sigma_min,
        "sigma_max": trained.path.t_max,
        "sigma_data": trained.path.sigma_data,
        "s_noise": 1.0,
        "rho": trained.rho,
        "clip_denoised": trained.clip or bool(sample.get("clip", False)),
    }
