"""Every sampler that diffusers has, step by step against its scheduler, with several targets, spacings and numbers of steps.

Both compute in float64 on the same levels of noise: theirs are rounded to float32 in between, ours are laid in their place, and the grids
are compared by themselves. Each of their steps begins where ours did, so that no error is carried on.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.config import registry
from nexus_scale.contracts import Start
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.processes.chains import DDPMLinear, ScaledLinear
from nexus_scale.processes.gaussian import expand, recover
from nexus_scale.processes.paths import EDM, Path, RectifiedFlow
from nexus_scale.samplers.grid import Point, points_at, times_of

diffusers = pytest.importorskip("diffusers")

STEPS, FEW = (1, 4, 7, 13, 20, 50), (1, 7, 20)
"""All numbers of steps with a sampler's first spacing, few with its others."""
SD, PIXELS = ScaledLinear(zero_terminal_snr=False), DDPMLinear()
BETAS = {
    SD: {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    PIXELS: {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
}
PREDICTION = {"eps": "epsilon", "x0": "sample", "v": "v_prediction", "velocity": "flow_prediction"}
SHAPE = (2, 3, 4, 4)


def network(x: Tensor, t: Tensor) -> Tensor:
    """An answer that depends on all it is given."""
    return torch.tanh(1.3 * x + expand(t, x)) - 0.4 * x.roll(1, -1)


def rng() -> ProgressRng:
    return ProgressRng(0, 0, "sample", torch.arange(SHAPE[0]), torch.device("cpu"))


def x_T() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def walked(sampler: Any, path: Path, target: str) -> list[Tensor]:
    """Our states, the first one included."""
    states: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if not states:
            states.append(x)
        return recover(x, network(x, t), target, path, t)

    sampler.sample(denoise, x_T(), path=path, rng=rng(), callback=lambda i, t, x, x0: states.append(x))
    return states


@dataclass(frozen=True)
class Case:
    """A sampler of ours, with the scheduler that it equals.

    Attributes:
        ratio: theirs keeps x / alpha, as k-diffusion does.
        calls: network evaluations of theirs in each step; the last step has one where `data` is where it ends.
        noise: how our rng calls the noise of a step, None where theirs draws none.
    """

    name: str
    scheduler: str
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    path: Path = SD
    targets: tuple[str, ...] = ("eps", "v")
    spacings: tuple[str, ...] = ("leading", "linspace", "trailing")
    ratio: bool = False
    calls: int = 1
    step: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [self.name, *(f"{k}={v}" for k, v in self.ours.items())]
        return "-".join(words).replace(" ", "")


K = {"ratio": True}
SDE = {"algorithm_type": "sde-dpmsolver++"}
FIRST = {"final": "first"}
CASES = [
    Case("ddim", "DDIMScheduler", targets=("eps", "x0", "v"), theirs={"clip_sample": False, "set_alpha_to_one": True}),
    Case("ddim", "DDIMScheduler", {"eta": 0.7, **FIRST}, {"clip_sample": False, "set_alpha_to_one": False}, step={"eta": 0.7}),
    Case("ddim", "DDIMScheduler", {"clip": True, "keeps_eps": True}, {"clip_sample": True}, PIXELS),
    Case("ddim", "DDIMScheduler", {"clip": {"quantile": 0.9, "most": 1.5}},
         {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}, PIXELS,
         step={"use_clipped_model_output": True}),
    Case("ancestral", "DDPMScheduler", {"variance": "small", "clip": {"quantile": 0.9, "most": 1.5}},
         {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5}, PIXELS, spacings=("leading",)),
    Case("ancestral", "DDPMScheduler", {"variance": "small"}, {"variance_type": "fixed_small", "clip_sample": False}, PIXELS),
    # theirs adds noise to the data itself where the last step begins above the first of the chain, as trailing's does; ours never
    Case("ancestral", "DDPMScheduler", {"variance": "large", "clip": True}, {"variance_type": "fixed_large"}, PIXELS,
         spacings=("leading", "linspace")),
    # of v theirs extrapolates v, at other samples than it is then resolved with; ours extrapolates eps, as the paper
    Case("pndm", "PNDMScheduler", FIRST, {"skip_prk_steps": True, "set_alpha_to_one": False}, targets=("eps",)),
    Case("pndm", "PNDMScheduler", {}, {"skip_prk_steps": True, "set_alpha_to_one": True}, targets=("eps",)),
    Case("lcm", "LCMScheduler", spacings=("",)),
    Case("tcd", "TCDScheduler", {"eta": 0.3}, spacings=("",), step={"eta": 0.3}),
    Case("tcd", "TCDScheduler", {"eta": 0.0}, spacings=("",), step={"eta": 0.0}),
    Case("euler", "EulerDiscreteScheduler", **K),
    Case("euler", "EulerDiscreteScheduler", FIRST, {"final_sigmas_type": "sigma_min"}, **K),
    Case("euler_ancestral", "EulerAncestralDiscreteScheduler", **K),
    Case("heun", "HeunDiscreteScheduler", calls=2, **K),
    Case("midpoint", "KDPM2DiscreteScheduler", spacings=("trailing",), calls=2, **K),
    Case("lms", "LMSDiscreteScheduler", **K),
    Case("dpm_multistep", "DPMSolverMultistepScheduler", {"order": 1}),
    Case("dpm_multistep", "DPMSolverMultistepScheduler", {"order": 2}, targets=("eps", "x0", "v")),
    Case("dpm_multistep", "DPMSolverMultistepScheduler", {"order": 2, "method": "heun", "euler_at_final": True, **FIRST},
         {"euler_at_final": True, "final_sigmas_type": "sigma_min"}),
    Case("dpm_multistep", "DPMSolverMultistepScheduler", {"order": 3, "lower_order_final": False, **FIRST},
         {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    Case("dpm_multistep", "DPMSolverMultistepScheduler", {"order": 3, "predicts": "eps", **FIRST},
         {"final_sigmas_type": "sigma_min", "algorithm_type": "dpmsolver"}),
    Case("dpm_multistep", "DPMSolverMultistepScheduler", {"order": 2, "eta": 1.0}, SDE),
    Case("dpm_multistep", "DPMSolverMultistepScheduler", {"order": 2, "eta": 1.0, "method": "heun"}, SDE),
    Case("dpm_multistep", "DPMSolverMultistepScheduler", {"order": 2, "eta": 1.0, "predicts": "eps", **FIRST},
         {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min"}),
    Case("dpm_multistep", "DPMSolverMultistepScheduler", {"clip": {"quantile": 0.995, "most": 1.0}}, {"thresholding": True}, PIXELS),
    Case("dpm_multistep", "DPMSolverMultistepScheduler", {"order": 2, "shift": 3.0}, {"use_flow_sigmas": True, "flow_shift": 3.0},
         RectifiedFlow(), ("velocity",), ("",)),
    Case("dpm_singlestep", "DPMSolverSinglestepScheduler", {"order": 2}, spacings=("linspace",)),
    Case("dpm_singlestep", "DPMSolverSinglestepScheduler", {"order": 3, "method": "heun"}, spacings=("linspace",)),
    Case("dpm_singlestep", "DPMSolverSinglestepScheduler", {"order": 3, **FIRST}, {"final_sigmas_type": "sigma_min"},
         spacings=("linspace",)),
    Case("unipc", "UniPCMultistepScheduler", {"order": 2}, targets=("eps", "x0", "v")),
    Case("unipc", "UniPCMultistepScheduler", {"order": 3, "scaling": "bh1", **FIRST}, {"final_sigmas_type": "sigma_min"}),
    Case("unipc", "UniPCMultistepScheduler", {"order": 3, "predicts": "eps", **FIRST},
         {"final_sigmas_type": "sigma_min", "predict_x0": False}),
]  # fmt: skip


def config_of(case: Case, spacing: str, target: str) -> dict[str, Any]:
    named = {"order": "solver_order", "method": "solver_type", "scaling": "solver_type"}
    own = {named[key]: value for key, value in case.ours.items() if key in named}
    spaced = {"timestep_spacing": spacing} if spacing and case.name != "dpm_singlestep" else {}
    betas = BETAS.get(case.path, {})
    return {"prediction_type": PREDICTION[target], **betas, **own, **spaced, **case.theirs}


def make(case: Case, steps: int, spacing: str) -> Any:
    more = {"spacing": spacing} if spacing else {}
    return registry.find("samplers", case.name)(steps=steps, **case.ours, **more)


def begun(case: Case, steps: int, spacing: str, target: str) -> Any:
    scheduler = getattr(diffusers, case.scheduler).from_config(config_of(case, spacing, target))
    scheduler.set_timesteps(steps)
    return scheduler


def goes_elsewhere(scheduler: Any, times: Tensor) -> bool:
    """Whether a scheduler leaves its own grid: DDIM and PNDM step by 1000 // steps, wherever the next of their times is."""
    if type(scheduler).__name__ not in ("DDIMScheduler", "PNDMScheduler"):
        return False
    step = 1000 // scheduler.num_inference_steps
    whole = (times * 1000).round() - 1
    return any(max(here - step, -1) != max(there, -1) for here, there in pairwise([*whole.tolist()[:-1], -1]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_step_equals_the_scheduler(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = 0
    for place, spacing in enumerate(case.spacings):
        for number, steps in enumerate(STEPS if place == 0 else FEW):
            compared += compare(case, steps, spacing, case.targets[number % len(case.targets)], monkeypatch)
    assert compared >= len(FEW)


def compare(case: Case, steps: int, spacing: str, target: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether theirs could be compared: it walks its own grid."""
    sampler, path = make(case, steps, spacing), case.path
    points = sampler.points(path) if hasattr(sampler, "points") else points_at(path, sampler.times(path).tolist())
    scheduler = begun(case, steps, spacing, target)
    if goes_elsewhere(scheduler, sampler.times(path)):
        return False
    states = walked(sampler, path, target)
    lay_in_place(scheduler, points, path)
    noise: list[Tensor] = []
    module = importlib.import_module(type(scheduler).__module__)
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: noise[0])
    timesteps = iter(scheduler.timesteps)
    for i, (here, there) in enumerate(pairwise(points)):
        noise[:] = [rng().normal(f"noise_{i}", SHAPE[1:]).double()]
        scale = (here.alpha, there.alpha) if case.ratio else (1.0, 1.0)
        x = states[i] / scale[0]
        for call in range(calls_of(case, i, steps, there)):
            at = here if call == 0 else asked_again(case, here, there)
            asked = x * (at.alpha if case.ratio else 1.0)
            t = torch.full((SHAPE[0],), at.t, dtype=torch.float64)
            x = scheduler.step(network(asked, t), next(timesteps), x, return_dict=False, **case.step)[0]
        error = (states[i + 1] - x * scale[1]).abs().max()
        assert error < 3e-6 * states[i + 1].abs().max(), f"{case} {spacing} {target} {steps}: step {i}, {error}"
    return True


def lay_in_place(scheduler: Any, points: list[Point], path: Path) -> None:
    """Gives a scheduler our levels of noise, in float64."""
    scheduler.alphas_cumprod = path.alpha((torch.arange(1000, dtype=torch.float64) + 1) / 1000).square()
    if hasattr(scheduler, "final_alpha_cumprod"):
        clean = scheduler.final_alpha_cumprod == 1
        scheduler.final_alpha_cumprod = torch.ones(()).double() if clean else scheduler.alphas_cumprod[0]
    if not hasattr(scheduler, "sigmas"):
        return
    flow = isinstance(path, RectifiedFlow)
    levels = torch.tensor([point.sigma if flow else point.ratio for point in points], dtype=torch.float64)
    twice = torch.cat([levels[:1], levels[1:].repeat_interleave(2)])
    if hasattr(scheduler, "sigmas_interpol"):
        between = levels.log().lerp(levels.roll(1).log(), 0.5).exp()
        scheduler.sigmas_interpol = torch.cat([between[:1], between[1:].repeat_interleave(2)])
        scheduler.sigmas = twice
    elif type(scheduler).__name__.startswith("Heun"):
        scheduler.sigmas = twice
    else:
        scheduler.sigmas = levels
    scheduler.set_begin_index(0)


def calls_of(case: Case, step: int, steps: int, there: Point) -> int:
    """How often theirs asks the network in a step."""
    if case.name == "pndm":
        return 2 if step == 0 and steps > 1 else 1
    return case.calls if there.sigma > 0 else 1


def asked_again(case: Case, here: Point, there: Point) -> Point:
    """Where theirs asks the network a second time in a step."""
    if case.name != "midpoint":
        return there
    ratio = math.sqrt(here.ratio * there.ratio)
    return points_at(case.path, times_of(case.path, [ratio]))[0]


# ------------------------------------------------------------------------------------------------------- grids


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["ddim", "ancestral", "pndm", "lcm", "tcd", "euler", "lms", "dpm_multistep", "dpm_singlestep", "unipc"]
)
def test_the_grid_is_the_schedulers(name: str) -> None:
    """To the step of the chain, but where theirs lies between two: k-diffusion's under `linspace`. Ours are whole everywhere, because the
    network was trained at whole ones and the path between them is a convention (theirs is a line in sigma)."""
    case = next(case for case in CASES if case.name == name)
    for spacing in case.spacings:
        for offset in (0, 1) if spacing == "leading" else (0,):
            for steps in STEPS:
                sampler = registry.find("samplers", name)(
                    steps=steps, offset=offset, **{"spacing": spacing} if spacing else {}
                )
                config = config_of(case, spacing, "eps") | ({"steps_offset": offset} if offset else {})
                scheduler = getattr(diffusers, case.scheduler).from_config(config)
                scheduler.set_timesteps(steps)
                theirs = torch.tensor(list(dict.fromkeys(scheduler.timesteps.double().tolist())), dtype=torch.float64)
                ours = sampler.times(case.path)[:-1] * 1000 - 1
                assert len(ours) == len(theirs)
                between = case.ratio and spacing == "linspace"
                assert (ours - theirs).abs().max() <= (0.5 if between else 1e-9), f"{name} {spacing} {steps}"


@pytest.mark.filterwarnings("ignore")
def test_ddim_of_diffusers_leaves_its_grid_where_the_steps_do_not_divide_the_chain() -> None:
    """It steps from t to t - 1000 // steps, whatever its next time is: under `linspace`, and under `trailing` where 1000 / steps is not
    whole. The network is then asked at times whose noise the sample does not have; ours goes to the grid's next time, as the paper."""
    case, left = CASES[0], set()
    for spacing in case.spacings:
        for steps in STEPS:
            times = make(case, steps, spacing).times(case.path)
            if goes_elsewhere(begun(case, steps, spacing, "eps"), times):
                left.add((spacing, steps))
    assert left == {(spacing, steps) for spacing in ("linspace", "trailing") for steps in (7, 13)} | {
        ("linspace", steps) for steps in (4, 20, 50)
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("levels", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("name", ["dpm_multistep", "dpm_singlestep", "unipc", "euler", "heun", "lms"])
def test_levels_of_noise_are_the_schedulers(name: str, levels: str) -> None:
    """And our times have them; theirs are rounded to whole steps by some schedulers, which moves the network's time and not x."""
    pytest.importorskip("scipy")
    case = next(case for case in CASES if case.name == name)
    for steps in STEPS[1:]:
        config = config_of(case, "linspace", "eps") | {f"use_{levels}_sigmas": True}
        scheduler = getattr(diffusers, case.scheduler).from_config(config)
        scheduler.set_timesteps(steps)
        sampler = registry.find("samplers", name)(steps=steps, sigmas=levels)
        ours = torch.tensor([point.ratio for point in sampler.points(SD)])
        theirs = torch.unique_consecutive(scheduler.sigmas) if name == "heun" else scheduler.sigmas
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-6)
        asked = scheduler.timesteps.double()
        asked = torch.unique_consecutive(asked) if name == "heun" else asked
        assert (asked - (sampler.times(SD)[:-1] * 1000 - 1)).abs().max() <= 1.01


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["ddim", "euler", "dpm_multistep", "unipc"])
def test_a_walk_begins_at_given_samples_as_image_to_image_does(name: str) -> None:
    case, strength, steps = next(case for case in CASES if case.name == name), 0.6, 20
    sampler, given = (
        make(case, steps, "leading"),
        torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)).double(),
    )
    scheduler = begun(case, steps, "leading", "eps")
    lay_in_place(scheduler, sampler.points(SD), SD)
    begin = steps - int(steps * strength)
    if name != "ddim":
        scheduler.set_begin_index(begin)
    points = sampler.points(SD)[begin:]
    scales = [point.alpha if case.ratio else 1.0 for point in points]
    x = (points[0].alpha * given + points[0].sigma * x_T()) / scales[0]
    for point, scale, timestep in zip(points, scales, scheduler.timesteps[begin:], strict=False):
        t = torch.full((SHAPE[0],), point.t, dtype=torch.float64)
        x = scheduler.step(network(x * scale, t), timestep, x, return_dict=False)[0]
    ours = sampler.sample(
        lambda x, t: recover(x, network(x, t), "eps", SD, t), x_T(), path=SD, start=Start(given, strength)
    )
    assert (ours - x).abs().max() < 3e-5 * x.abs().max()


@pytest.mark.parametrize("steps", STEPS[:-1])
def test_every_step_equals_the_scheduler_of_consistency_models(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It applies the boundary to the network's answer itself; ours is told the consistency function, as its objective has it."""
    scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=False)
    sampler, path, states = registry.find("samplers", "consistency")(steps=steps, scales=40), EDM(), []

    def boundary(x: Tensor, answer: Tensor, sigma: Tensor) -> Tensor:
        return 0.25 / ((sigma - 0.002) ** 2 + 0.25) * x + (sigma - 0.002) * 0.5 / (sigma**2 + 0.25).sqrt() * answer

    def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        states.append(x)
        return boundary(x, network(x / (t[0] ** 2 + 0.25).sqrt(), t[:1].log() / 4), t[0]), x

    ours = sampler.sample(denoise, x_T(), path=path, rng=rng())
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), sampler.times(path)[:-1], rtol=1e-6, atol=0)
    scheduler.sigmas = torch.cat([sampler.times(path)[:-1], torch.tensor([0.002])])
    for i, timestep in enumerate(scheduler.timesteps):
        noise = rng().normal(f"noise_{i}", SHAPE[1:]).double()
        monkeypatch.setattr("diffusers.schedulers.scheduling_consistency_models.randn_tensor", lambda *a, **k: noise)  # noqa: B023
        answer = network(scheduler.scale_model_input(states[i], timestep), sampler.times(path)[i : i + 1].log() / 4)
        x = scheduler.step(answer, timestep, states[i], return_dict=False)[0]
        after = states[i + 1] if i + 1 < steps else ours
        assert (after - x).abs().max() < 1e-5 * x.abs().max(), i


def test_restart_without_repeats_is_heun() -> None:
    walks = [walked(registry.find("samplers", name)(steps=9, **settings), SD, "eps") for name, settings in
             (("heun", {}), ("restart", {"repeats": 0}))]  # fmt: skip
    assert all(torch.equal(one, other) for one, other in zip(*walks, strict=True))
