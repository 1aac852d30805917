"""diffusers' schedulers in and out: a config that is written draws in diffusers as our sampler does, and comes back as that sampler."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.config import registry
from nexus_scale.config.recipe import load_recipe
from nexus_scale.contracts import UserError
from nexus_scale.generate.drawing import sampler_named, sampler_of
from nexus_scale.interop.scheduler_folders import COMMON, DEFAULTS, scheduler_at, scheduler_of
from nexus_scale.interop.schedulers import chain
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.processes.gaussian import expand, recover
from nexus_scale.processes.paths import find_path

diffusers = pytest.importorskip("diffusers")

SD = {"path": {"name": "scaled_linear", "zero_terminal_snr": False}, "target": "eps"}
V = {"path": "ddpm_linear", "target": "v"}
CUT = {"quantile": 0.9, "most": 2.0}
WRITTEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (SD, {"name": "ddim", "spacing": "leading", "offset": 1, "final": "first"}),
    (V, {"name": "ddim", "spacing": "trailing", "clip": {"to": 1.5}, "keeps_eps": True}),
    (V, {"name": "ddim", "spacing": "leading", "clip": CUT, "keeps_eps": True}),
    (SD, {"name": "pndm", "spacing": "leading", "offset": 1, "final": "first"}),
    (SD, {"name": "lcm", "steps": 4}),
    (SD, {"name": "euler", "spacing": "leading", "offset": 1}),
    (V, {"name": "euler", "spacing": "trailing", "final": "first"}),
    (SD, {"name": "euler", "sigmas": "karras", "spacing": "linspace"}),
    (SD, {"name": "euler_ancestral", "spacing": "trailing"}),
    (SD, {"name": "heun", "spacing": "trailing"}),
    (SD, {"name": "midpoint", "spacing": "trailing"}),
    (SD, {"name": "lms", "spacing": "leading"}),
    (SD, {"name": "dpm_multistep", "spacing": "linspace"}),
    (V, {"name": "dpm_multistep", "order": 3, "sigmas": "exponential", "spacing": "linspace"}),
    (SD, {"name": "dpm_multistep", "eta": 1.0, "spacing": "leading", "offset": 1, "clip": CUT}),
    (SD, {"name": "dpm_multistep", "predicts": "eps", "final": "first", "method": "heun", "euler_at_final": True}),
    (SD, {"name": "dpm_singlestep", "spacing": "linspace"}),
    (SD, {"name": "unipc", "spacing": "trailing"}),
    (SD, {"name": "unipc", "order": 3, "scaling": "bh1", "predicts": "eps", "final": "first", "spacing": "linspace"}),
    (SD, {"name": "ancestral", "variance": "small", "spacing": "leading", "offset": 1}),
    (V, {"name": "ancestral", "variance": "large", "spacing": "leading", "clip": CUT}),
    (SD, {"name": "ancestral", "variance": "none", "spacing": "leading", "offset": 1}),
    (V, {"name": "ancestral", "variance": "none", "spacing": "trailing", "clip": True}),
    (V, {"name": "ancestral", "variance": "none", "spacing": "trailing", "clip": CUT}),
]
SHAPE = (2, 3, 4, 4)


def network(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(1.3 * x + expand(t, x)) - 0.4 * x.roll(1, -1)


def rng() -> ProgressRng:
    return ProgressRng(0, 0, "sample", torch.arange(SHAPE[0]), torch.device("cpu"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("objective", "sample"), WRITTEN, ids=str)
def test_diffusers_draws_the_same_with_what_is_written(
    objective: dict[str, Any], sample: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its pipelines call it; a last difference of 1e-3 is that between our path and theirs between the chain's steps."""
    steps = sample.get("steps", 20)
    config = chain(objective, {"steps": steps, **sample})
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    number = iter(range(1000))
    module = importlib.import_module(type(scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        noise = lambda *_, **__: rng().normal(f"noise_{next(number)}", SHAPE[1:])  # noqa: E731
        monkeypatch.setattr(module, "randn_tensor", noise)
    scheduler.set_timesteps(steps)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    theirs = x * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        t = ((timestep + 1) / 1000).expand(SHAPE[0]).float()
        answer = network(scheduler.scale_model_input(theirs, timestep), t)
        theirs = scheduler.step(answer, timestep, theirs, return_dict=False)[0]
    path = find_path(objective["path"])

    def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return recover(x, network(x, t), objective["target"], path, t)

    arguments = {"steps": steps, **{key: value for key, value in sample.items() if key != "name"}}
    sampler = registry.find("samplers", sample["name"])(**arguments)
    ours = sampler.sample(denoise, x, path=path, rng=rng())
    assert (ours - theirs).abs().max() < 3e-3 * theirs.abs().max()

    read = scheduler_of(config)
    assert find_path(read.path) == path and read.target == objective["target"]
    again = registry.find("samplers", read.sample.pop("name"))(steps=steps, **read.sample)
    drawn = again.sample(denoise, x, path=path, rng=rng())
    other = type(again) is not type(
        sampler
    )  # the same steps in other words: ancestral without variance is ddim, or dpm_multistep
    torch.testing.assert_close(drawn, ours, rtol=0, atol=1e-5 * ours.abs().max().item() if other else 0)


@pytest.mark.parametrize("name", DEFAULTS)
def test_what_a_config_leaves_out_is_what_diffusers_takes(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    for key, value in {**COMMON, **DEFAULTS[name]}.items():
        assert key not in parameters or parameters[key].default == value, key


PUBLISHED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # Stable Diffusion 1.5 and XL, as their folders have it
    (
        {
            "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
            "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1,
            "trained_betas": None, "clip_sample": False,
        },
        {"name": "pndm", "spacing": "leading", "offset": 1, "final": "first", "sigmas": "spaced"},
    ),
    (
        {
            "_class_name": "EulerDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear", "beta_start": 0.00085,
            "interpolation_type": "linear", "prediction_type": "epsilon", "sample_max_value": 1.0, "steps_offset": 1,
            "timestep_spacing": "leading", "use_karras_sigmas": False, "skip_prk_steps": True, "set_alpha_to_one": False,
        },
        {"name": "euler", "spacing": "leading", "offset": 1, "final": "data", "sigmas": "spaced"},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("config", "sample"), PUBLISHED, ids=["sd15", "sdxl"])
def test_a_published_folder_chooses_the_sampler(config: dict[str, Any], sample: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    assert scheduler_at(tmp_path).sample == sample
    recipe = load_recipe("stable_diffusion/tiny_openmoji", {"objective": SD}, tiny=True)
    named = sampler_named(str(tmp_path), recipe=recipe)
    assert recipe.sample is not None
    sampler: Any = sampler_of(recipe, named=named)
    assert type(sampler).__name__.lower() == sample["name"] and sampler.steps == recipe.sample.arguments["steps"]
    other = load_recipe("stable_diffusion/tiny_openmoji", {"objective": {"path": "ddpm_linear"}}, tiny=True)
    with pytest.raises(UserError, match=r"is of ScaledLinear.*expected that of recipe .*DDPMLinear"):
        sampler_named(str(tmp_path), recipe=other)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"_class_name": "ScoreSdeVeScheduler"}, "scheduler ScoreSdeVeScheduler: no sampler of ours"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps is False; expected True"),
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True, "prediction_type": "v_prediction"}, "prediction_type is 'v_pred"),
        ({"_class_name": "DDIMScheduler", "trained_betas": [0.1]}, "trained_betas is"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": "laplace"}, "beta_schedule is 'laplace'"),
        ({"_class_name": "DDIMScheduler", "beta_schedule": ["linear"]}, "expected a name"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "variance_type is 'learned'"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas is True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_lu_lambdas": True}, "use_lu_lambdas is True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order is 3"),
        ({"_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "timestep_spacing": "leading"}, "timestep_spacing is"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "timestep_type is 'continuous'"),
        ({"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type is 'dpmsolver'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "deis"}, "algorithm_type is 'deis'"),
    ],
)  # fmt: skip
def test_what_steps_otherwise_is_not_read(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        scheduler_of(config)


@pytest.mark.parametrize(
    ("objective", "sample", "said"),
    [
        (V, {"name": "pndm", "spacing": "leading"}, "extrapolates v"),
        (SD, {"name": "ddim", "spacing": "linspace", "steps": 20}, "leaves its own grid under linspace"),
        (SD, {"name": "ddim", "spacing": "trailing", "steps": 13}, "leaves its own grid under trailing"),
        (SD, {"name": "ddim", "spacing": "leading", "eta": 0.5}, "no setting for sample.eta"),
        (SD, {"name": "ddim", "spacing": "leading", "clip": True}, "keeps_eps: true"),
        (SD, {"name": "euler", "spacing": "linspace", "steps": 20}, "between the chain's steps"),
        (SD, {"name": "euler", "s_churn": 3.0}, "no setting for sample.s_churn"),
        (SD, {"name": "heun", "final": "first"}, "no setting for sample.final"),
        (SD, {"name": "lms", "sigmas": {"name": "karras", "rho": 5.0}}, "no setting for sample.sigmas"),
        (SD, {"name": "euler", "sigmas": "karras", "spacing": "leading"}, "ends of its levels"),
        (SD, {"name": "dpm_multistep", "order": 3, "eta": 1.0}, "no setting for sample.eta"),
        (SD, {"name": "dpm_singlestep"}, "walks linspace alone"),
        (SD, {"name": "unipc", "corrects": False}, "no setting for sample.corrects"),
        (SD, {"name": "unipc", "shift": 3.0}, "no setting for sample.shift"),
        (SD, {"name": "ancestral", "variance": "none", "steps": 20}, "leaves its own grid under linspace"),
        (SD, {"name": "ancestral", "variance": "none", "spacing": "leading", "clip": True}, "choose trailing, or sampler ddim"),
        (SD, {"name": "ancestral", "variance": "none", "spacing": "trailing", "clip": {"to": 2.0}}, "no setting for sample.clip"),
    ],
)  # fmt: skip
def test_what_diffusers_steps_otherwise_is_not_written(
    objective: dict[str, Any], sample: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        chain(objective, sample)
