"""Samplers on data whose score is known: the order of each, and the mean and covariance that it draws.

Of a Gaussian every sampler makes an affine function of the noise that it begins with and of each noise that it draws: what that function is
is read off a batch in which each row has one of them, so that mean and variance of its samples are known without drawing any.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_scale.config import registry
from nexus_scale.contracts import Guidance, Predictor, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.chains import ScaledLinear
from nexus_scale.processes.gaussian import expand
from nexus_scale.processes.paths import EDM, Path, RectifiedFlow
from tests.golden import k_diffusion
from tests.mixture import three_in_a_plane

MEAN, STD = 0.7, 0.5
VP = ScaledLinear(zero_terminal_snr=False)
LEVELS = {"name": "exponential", "low": 0.05, "high": 14.0}


def gaussian(path: Path, mean: float = MEAN) -> Predictor:
    """The best denoiser of Normal(mean, STD**2)."""

    def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = expand(path.alpha(t), x), expand(path.sigma(t), x)
        x0 = mean + alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * (x - alpha * mean)
        return x0, (x - alpha * x0) / sigma

    return denoise


def consistent(path: Path) -> Predictor:
    """Where the ODE of the same data leads from x, and what is then left of it."""

    def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = expand(path.alpha(t), x), expand(path.sigma(t), x)
        x0 = MEAN + STD * (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2).sqrt()
        return x0, (x - alpha * x0) / sigma

    return denoise


@dataclass
class Units:
    """A Rng whose draws are 0, but 1 in a row of its own for each."""

    rows: int
    drawn: list[str] = field(default_factory=list)

    def normal(self, name: str, shape: Any) -> Tensor:
        assert name not in self.drawn, f"{name} is drawn twice"
        self.drawn.append(name)
        value = torch.zeros(self.rows, *shape)
        value[len(self.drawn) + 1] = 1
        return value


def moments(sampler: Any, path: Path, denoise: Predictor) -> tuple[float, float]:
    """Mean and standard deviation of what is drawn."""
    rows = 2 + sampler.steps + 10
    x_T = torch.zeros(rows, 1, dtype=torch.float64)
    x_T[1] = 1
    units: Any = Units(rows)
    x = sampler.sample(denoise, x_T, path=path, rng=units)[:, 0]
    return float(x[0]), float((x[1:] - x[0]).square().sum().sqrt())


ORDERS: list[tuple[str, dict[str, Any], float]] = [
    ("ddim", {}, 1),
    ("ddim", {"eta": 0.5}, 1),
    ("euler", {}, 1),
    ("euler_ancestral", {}, 1),
    ("heun", {}, 2),
    ("midpoint", {}, 2),
    ("lms", {"order": 2}, 2),
    ("lms", {"order": 4}, 3.6),
    ("pndm", {}, 1.6),  # its weights are those of even steps, and these are even in the logarithm
    ("dpm_multistep", {"order": 1}, 1),
    ("dpm_multistep", {"order": 2}, 2),
    ("dpm_multistep", {"order": 2, "method": "heun"}, 2),
    # the authors' third order has half of the second difference that a polynomial has: it is not of order 3, in diffusers neither
    ("dpm_multistep", {"order": 3}, 2.2),
    ("dpm_multistep", {"order": 3, "predicts": "eps", "final": "first"}, 2.1),
    ("dpm_multistep", {"order": 1, "eta": 1.0}, 1),
    ("dpm_multistep", {"order": 2, "eta": 1.0}, 2),
    ("dpm_multistep", {"order": 3, "eta": 1.0}, 2.2),
    ("dpm_singlestep", {"order": 2}, 2),
    ("dpm_singlestep", {"order": 3, "method": "heun"}, 2.9),
    ("unipc", {"order": 1, "corrects": False}, 1),
    ("unipc", {"order": 2}, 3),
    ("unipc", {"order": 3, "scaling": "bh1"}, 3.5),
]
"""Samplers with the exponent of the step in their error. Of those that draw noise that of the standard deviation, the weak order."""


@pytest.mark.parametrize(("name", "settings", "order"), ORDERS, ids=str)
def test_the_error_falls_with_the_order(name: str, settings: dict[str, Any], order: float) -> None:
    counts = [24, 48, 96, 192]
    made = [registry.find("samplers", name)(steps=count, sigmas=LEVELS, **settings) for count in counts]
    spreads = [moments(sampler, VP, gaussian(VP, 0.0))[1] for sampler in made]
    # the error at n steps less that at 2n falls as the error does
    errors = np.abs(np.diff(spreads))
    slope = -np.polyfit(np.log(counts[:-1]), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.25, slope


DRAWN: list[tuple[str, dict[str, Any]]] = [
    *((name, settings) for name, settings, order in ORDERS if order > 1.5 and "final" not in settings),
    ("ddim", {"steps": 200}),
    ("euler_ancestral", {"steps": 400}),
    ("heun", {"s_churn": 10.0, "s_noise": 1.0}),
    ("restart", {"substeps": 12}),
    ("restart", {"repeats": 4, "low": 0.05, "high": 1.0, "substeps": 8}),
]


@pytest.mark.parametrize(("name", "settings"), DRAWN, ids=str)
def test_mean_and_spread_of_a_gaussian_are_drawn(name: str, settings: dict[str, Any]) -> None:
    """On EDM's path, from its highest level of noise to the lowest."""
    sampler = registry.find("samplers", name)(**{"steps": 64, **settings})
    mean, spread = moments(sampler, EDM(), gaussian(EDM()))
    assert abs(mean - MEAN) < 0.01
    assert abs(spread - STD) < 0.02 * STD


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("name", "path"), [("consistency", EDM()), ("lcm", VP)], ids=str)
def test_a_consistency_function_is_sampled_in_any_number_of_steps(name: str, path: Path, steps: int) -> None:
    settings = {"timestep_scaling": 0.0} if name == "lcm" else {}
    mean, spread = moments(registry.find("samplers", name)(steps=steps, **settings), path, consistent(path))
    assert abs(mean - MEAN) < (0.01 if name == "consistency" else 0.06)
    assert abs(spread - STD) < 0.01 * STD


EVERY = [name for name in sorted(registry.names("samplers")) if registry.find("samplers", name).walks == "denoise"]
NOISY: dict[str, dict[str, Any]] = {
    "ddim": {"eta": 1.0},
    "dpm_multistep": {"eta": 1.0},
    "ancestral": {"variance": "small"},
    **{name: {"s_churn": 8.0} for name in ("euler", "heun", "midpoint")},
}


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("lcm", "tcd", "consistency")])
def test_mean_and_covariance_of_a_mixture_are_drawn(name: str) -> None:
    """Three Gaussians in the plane, none round; from 2,000 samples, whose own mean and covariance are 0.02 off."""
    mixture, path = three_in_a_plane(), VP
    sampler = registry.find("samplers", name)(**{"steps": 60, **NOISY.get(name, {})})
    rng = ProgressRng(0, 0, "draw", torch.arange(2000), torch.device("cpu"))
    x = (
        sampler.sample(mixture.predictor(path), rng.normal("noise", mixture.shape), path=path, rng=rng)
        .flatten(1)
        .double()
    )
    assert (x.mean(0) - mixture.mean).abs().max() < 0.1
    assert (x.T.cov() - mixture.covariance).abs().max() < 0.1


@pytest.mark.parametrize("name", EVERY)
def test_a_sample_is_the_same_in_any_batch(name: str) -> None:
    def drawn(positions: list[int]) -> Tensor:
        rng = ProgressRng(0, 0, "draw", torch.tensor(positions), torch.device("cpu"))
        sampler = registry.find("samplers", name)(**{"steps": 5, **NOISY.get(name, {})})
        return sampler.sample(gaussian(VP), rng.normal("noise", (2, 3)), path=VP, rng=rng)

    whole = drawn([0, 1, 2, 3])
    assert torch.equal(whole[2:3], drawn([2])) and torch.equal(whole[[3, 0]], drawn([3, 0]))
    assert whole[0].ne(whole[1]).any()


@pytest.mark.parametrize("name", ["heun", "midpoint", "lms", "pndm", "unipc", "dpm_singlestep", "restart", "euler"])
@pytest.mark.parametrize(
    "path", ["rectified_flow", "vp_cosine", {"name": "scaled_linear", "zero_terminal_snr": True}], ids=str
)
def test_what_steps_in_sigma_over_alpha_is_refused_where_a_path_ends_in_noise_alone(name: str, path: Any) -> None:
    """Before anything starts, with what to do; and not where the walk begins below."""
    objective = Denoising(path=path, target="v", times="uniform")
    sampler = registry.find("samplers", name)(steps=8)
    reason = objective.misfit(sampler, Guidance())
    assert reason is not None and "infinite at t = 1" in reason and "begin below it" in reason
    below = registry.find("samplers", name)(steps=8, sigmas={"name": "karras", "high": 30.0})
    assert objective.misfit(below, Guidance()) is None


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sigmas": "karas"}, "sample.sigmas: no 'karas'; did you mean 'karras'"),
        ({"sigmas": {"name": "beta", "low": 3.0, "high": 2.0}}, "low below high"),
        ({"clip": {"quantile": 1.5}}, "sample.clip: got"),
        ({"clip": {"to": 1.0, "most": 2.0}}, "sample.clip: got"),
        ({"steps": 0}, "sample.steps: got 0"),
    ],
)
def test_mistakes_in_settings_are_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said.replace(".", r"\.")):
        registry.find("samplers", "heun")(**settings)


@pytest.mark.parametrize(
    ("name", "settings", "path", "said"),
    [
        ("lcm", {}, EDM(), "walks times of a chain"),
        ("lcm", {"steps": 60}, VP, "steps <= original_steps"),
        ("ddim", {"final": "first"}, EDM(), "is the first step of a chain"),
        ("ddim", {"spacing": "leading", "offset": 500, "steps": 4}, VP, "sample.offset: got 500; expected at most 249"),
        ("ddim", {"steps": 1001}, VP, "expected 1 to 1000"),
        ("heun", {"sigmas": "karras"}, RectifiedFlow(), "a high that is finite"),
    ],
)
def test_grids_that_a_path_does_not_have_are_refused(
    name: str, settings: dict[str, Any], path: Path, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        registry.find("samplers", name)(**settings).sample(gaussian(path), torch.zeros(1, 2), path=path)


@pytest.mark.parametrize("case", k_diffusion.CASES)
def test_every_step_equals_k_diffusions(case: str) -> None:
    """What diffusers has not: churn that the network sees, fractions of eta, and the SDE of third order, in which it has a sign wrong."""
    wanted = np.load(k_diffusion.FILE)
    for steps in k_diffusion.steps_of(case):
        rows: list[Tensor] = []

        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            x0 = k_diffusion.denoised(x, t)
            return x0, (x - x0) / t[:, None]

        x = k_diffusion.sampler_of(case, steps).sample(
            denoise,
            k_diffusion.x_T(),
            path=k_diffusion.PATH,
            rng=k_diffusion.rng(),
            callback=lambda i, t, x, x0, rows=rows: rows.append(x0),
        )
        np.testing.assert_allclose(torch.cat([*rows, x]).numpy(), wanted[f"{case}_{steps}"], rtol=1e-6, atol=1e-8)
