"""diffusers' scheduler configs, read: the path, the target and the sampler of ours that steps as the scheduler does.

What would step otherwise is refused, with the setting that is to blame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.interop.schedulers import ALGORITHMS, BETAS, BY_RATIO, PREDICTIONS, SOLVERS, VARIANCES
from nexus_scale.io.plain_json import read_json
from nexus_scale.processes.paths import PATHS

FILE = "scheduler_config.json"

FLOW = "FlowMatchEulerDiscreteScheduler"
_CLIPS = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "timestep_spacing": "leading", "snr_shift_scale": 3.0,
    "clip_sample": True, "set_alpha_to_one": True,
}  # fmt: skip
_SD = {"beta_start": 0.00085, "beta_end": 0.012}
_DISTILLED = {**_SD, "beta_schedule": "scaled_linear", "timestep_spacing": "leading", "set_alpha_to_one": True}
COMMON: Mapping[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "rescale_betas_zero_snr": False,
}
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "DDPMScheduler": {"timestep_spacing": "leading", "variance_type": "fixed_small", "clip_sample": True, "thresholding": False},
    "DDIMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": True, "thresholding": False},
    "PNDMScheduler": {"timestep_spacing": "leading", "set_alpha_to_one": False, "skip_prk_steps": False},
    "LCMScheduler": {**_DISTILLED, "original_inference_steps": 50, "timestep_scaling": 10.0, "clip_sample": False, "thresholding": False},
    "TCDScheduler": {**_DISTILLED, "original_inference_steps": 50},
    "EulerDiscreteScheduler": {"final_sigmas_type": "zero", "interpolation_type": "linear", "timestep_type": "discrete"},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {**_SD, "clip_sample": False},
    "KDPM2DiscreteScheduler": _SD,
    "LMSDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": {
        "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": True,
        "euler_at_final": False, "final_sigmas_type": "zero", "thresholding": False,
    },
    "DPMSolverSinglestepScheduler": {
        "solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "lower_order_final": False,
        "final_sigmas_type": "zero", "thresholding": False,
    },
    FLOW: {
        "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
        "max_image_seq_len": 4096, "time_shift_type": "exponential", "invert_sigmas": False, "stochastic_sampling": False,
    },
    "CogVideoXDDIMScheduler": _CLIPS,
    "CogVideoXDPMScheduler": _CLIPS,
    "UniPCMultistepScheduler": {
        "solver_order": 2, "predict_x0": True, "solver_type": "bh2", "lower_order_final": True,
        "final_sigmas_type": "zero", "thresholding": False,
    },
}  # fmt: skip
"""Settings that a config may leave out, where they are not those of `COMMON`."""
UNKNOWN: Mapping[str, Any] = {
    "trained_betas": None, "interpolation_type": "linear", "timestep_type": "discrete", "use_lu_lambdas": False,
    "use_flow_sigmas": False, "use_dynamic_shifting": False, "solver_p": None, "disable_corrector": [], "sigma_min": None,
    "sigma_max": None, "lambda_min_clipped": float("-inf"), "shift_terminal": None,
}  # fmt: skip
"""Settings that none of ours has, with the value that asks for nothing."""
_BY_RATIO = {SOLVERS[name].class_name for name in BY_RATIO}


@dataclass(frozen=True)
class Scheduler:
    """A scheduler in our words: the objective's `path` and `target`, and `sample`, without `steps`."""

    class_name: str
    path: dict[str, Any]
    target: str
    sample: dict[str, Any]


@dataclass(frozen=True)
class _Config:
    """A config with what it leaves out."""

    class_name: str
    values: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def own(self, key: str) -> Any:
        """A setting of this scheduler; None where it has none such, whatever a config of another carried along."""
        return self.values[key] if key in DEFAULTS[self.class_name] else None

    def refuse(self, key: str, expected: str) -> None:
        raise UserError(
            f"{self.class_name}: {key} is {self.values.get(key)!r}; expected {expected}: no sampler of ours steps so"
        )


def scheduler_at(place: Path) -> Scheduler:
    """The scheduler of a pipeline's folder, of a folder with a config, or of the config itself.

    Raises:
        UserError: there is none, or none that a sampler of ours equals.
    """
    files = (place / "scheduler" / FILE, place / FILE, place)
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"{place}: has no scheduler; expected {FILE} in it or in its folder scheduler/")
    try:
        return scheduler_of(read_json(file, dict[str, Any]) or {})
    except ValueError as error:
        raise UserError(f"{error}") from None


def scheduler_of(config: Mapping[str, Any]) -> Scheduler:
    """What a config says, in our words.

    Raises:
        UserError: an unknown scheduler, or a setting that none of ours has; names it.
    """
    name = str(config.get("_class_name"))
    if name not in DEFAULTS:
        raise UserError(f"scheduler {name}: no sampler of ours; expected {', '.join(sorted(DEFAULTS))}")
    known = _Config(name, {**COMMON, **DEFAULTS[name], **config})
    if name == FLOW:
        return _flow(known)
    for key in ("beta_schedule", "prediction_type", "timestep_spacing", "variance_type", "algorithm_type"):
        if not isinstance(known.values.get(key) or "", str):
            known.refuse(key, "a name")
    for key, nothing in UNKNOWN.items():
        value = config.get(key, nothing)
        if value != nothing and str(value) != "-inf":
            known.refuse(key, repr(nothing))
    targets = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    if known["prediction_type"] not in targets:
        known.refuse("prediction_type", " or ".join(targets))
    target = targets[known["prediction_type"]]
    return Scheduler(name, _path(known), target, READERS.get(name, _solver)(known))


def _flow(config: _Config) -> Scheduler:
    """Of flow matching: Euler's steps, whose shift may follow the size."""
    nothing = {
        "invert_sigmas": False,
        "stochastic_sampling": False,
        "time_shift_type": "exponential",
        "shift_terminal": None,
    }
    levels = {f"use_{name}_sigmas": False for name in ("karras", "exponential", "beta")}
    for key, value in {**nothing, **levels}.items():
        if config.values.get(key, value) != value:
            config.refuse(key, repr(value))
    shift: Any = float(config["shift"])
    if config["use_dynamic_shifting"]:
        ends = {"base_tokens": "base_image_seq_len", "max_tokens": "max_image_seq_len"}
        shift = {"name": "exponential", "base_shift": config["base_shift"], "max_shift": config["max_shift"]}
        shift |= {ours: config[theirs] for ours, theirs in ends.items()}
    return Scheduler(config.class_name, {"name": "rectified_flow"}, "velocity", {"name": "ode", "shift": shift})


def _path(config: _Config) -> dict[str, Any]:
    kinds = {theirs: cls for cls, theirs in BETAS.items()}
    if config["beta_schedule"] not in kinds:
        config.refuse("beta_schedule", " or ".join(kinds))
    cls = kinds[config["beta_schedule"]]
    path = {
        "name": next(name for name, each in PATHS.items() if each is cls),
        "steps": config["num_train_timesteps"],
        "zero_terminal_snr": bool(config["rescale_betas_zero_snr"]),
    }
    if (ratio := config.own("snr_shift_scale")) is not None:
        path["snr_shift"] = float(ratio)
    rising = config["beta_schedule"] != "squaredcos_cap_v2"
    if config.class_name in _BY_RATIO and path["zero_terminal_snr"]:
        config.refuse("rescale_betas_zero_snr", "false: sigma / alpha is infinite at its end")
    return path | ({key: config[key] for key in ("beta_start", "beta_end")} if rising else {})


def _common(config: _Config) -> dict[str, Any]:
    """Spacing, levels of noise, ends and clipping."""
    sample: dict[str, Any] = {"spacing": config["timestep_spacing"], "offset": config["steps_offset"], "final": "data"}
    if config.own("set_alpha_to_one") is False or config.own("final_sigmas_type") == "sigma_min":
        sample["final"] = "first"
    levels = [name for name in ("karras", "exponential", "beta") if config.values.get(f"use_{name}_sigmas")]
    if levels and config.class_name in _BY_RATIO and config["timestep_spacing"] != "linspace":
        config.refuse(
            "timestep_spacing", f"linspace with use_{levels[0]}_sigmas, whose ends would be those of the spaced times"
        )
    values = config.values
    if config.own("thresholding"):
        sample["clip"] = {
            "quantile": values.get("dynamic_thresholding_ratio", 0.995),
            "most": values.get("sample_max_value", 1.0),
        }
    elif config.own("clip_sample"):
        reach = values.get("clip_sample_range", 1.0)
        sample["clip"] = True if reach == 1 else {"to": reach}
    return sample | {"sigmas": levels[0] if levels else "spaced"}


def _solver(config: _Config) -> dict[str, Any]:
    """The settings that SOLVERS names."""
    name, solver = next((name, each) for name, each in SOLVERS.items() if each.class_name == config.class_name)
    for key, value in solver.constants.items():
        if config[key] != value:
            config.refuse(key, repr(value))
    settings = {ours: config[theirs] for ours, theirs in solver.settings.items() if ours != "clip"}
    return {**_common(config), "name": name, **settings}


def _ancestral(config: _Config) -> dict[str, Any]:
    kinds = {theirs: ours for ours, theirs in VARIANCES.items()} | {
        "fixed_small_log": "small",
        "fixed_large_log": "large",
    }
    if config["variance_type"] not in kinds:
        config.refuse("variance_type", " or ".join(kinds))
    common = _common(config)
    kept: dict[str, Any] = {key: common[key] for key in ("spacing", "offset", "clip") if key in common}
    return {"name": "ancestral", "variance": kinds[config["variance_type"]], **kept}


def _ddim(config: _Config) -> dict[str, Any]:
    # theirs keeps the network's eps where x0 is clipped; ours unless it is told
    found = _solver(config)
    return found | ({"keeps_eps": True} if "clip" in found else {})


def _of_clips(config: _Config) -> dict[str, Any]:
    if not config["set_alpha_to_one"]:
        config.refuse("set_alpha_to_one", "true")
    kind: dict[str, Any] = {"name": "dpm"} if "DPM" in config.class_name else {"name": "ancestral", "variance": "none"}
    return kind | {"spacing": config["timestep_spacing"]}


def _pndm(config: _Config) -> dict[str, Any]:
    if config["prediction_type"] != "epsilon":
        config.refuse("prediction_type", "epsilon: of v it extrapolates what ours does not")
    return _solver(config)


def _tcd(config: _Config) -> dict[str, Any]:
    return {**_common(config), "name": "tcd", "original_steps": config["original_inference_steps"], "final": "first"}


def _dpm(config: _Config) -> dict[str, Any]:
    kinds = {theirs: ours for ours, theirs in ALGORITHMS.items()}
    if config["algorithm_type"] not in kinds:
        config.refuse("algorithm_type", " or ".join(kinds))
    predicts, eta = kinds[config["algorithm_type"]]
    if config["solver_order"] == 3 and eta:
        config.refuse("solver_order", "1 or 2 with an SDE: of the third order diffusers has a sign otherwise")
    return {**_solver(config), "predicts": predicts, "eta": eta}


def _singlestep(config: _Config) -> dict[str, Any]:
    if config["algorithm_type"] != "dpmsolver++":
        config.refuse("algorithm_type", "dpmsolver++")
    return {**_solver(config), "spacing": "linspace"}


def _unipc(config: _Config) -> dict[str, Any]:
    return {**_solver(config), "predicts": "x0" if config["predict_x0"] else "eps"}


READERS: Mapping[str, Callable[[_Config], dict[str, Any]]] = {
    "DDPMScheduler": _ancestral,
    "DDIMScheduler": _ddim,
    "CogVideoXDDIMScheduler": _of_clips,
    "CogVideoXDPMScheduler": _of_clips,
    "PNDMScheduler": _pndm,
    "TCDScheduler": _tcd,
    "DPMSolverMultistepScheduler": _dpm,
    "DPMSolverSinglestepScheduler": _singlestep,
    "UniPCMultistepScheduler": _unipc,
}
"""Those that have more to say than `SOLVERS`."""
