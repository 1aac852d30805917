"""Samplers against diffusers' scheduler, against distributions with a known score, and guidance against its formula."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.config import registry
from nexus_scale.contracts import Predictor, UserError
from nexus_scale.processes.chains import DDPMLinear
from nexus_scale.processes.gaussian import expand, recover
from nexus_scale.processes.guidance import concatenate, guide, guide_batched, rescaled_to
from nexus_scale.processes.paths import EDM, Path, RectifiedFlow, VPCosine
from nexus_scale.samplers.ode import ODE


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(x: Tensor, t: Tensor) -> Tensor:
    """Any smooth function will do."""
    return torch.tanh(1.3 * x + expand(t, x)) - 0.4 * x.roll(1, -1)


def flow(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return recover(x, network(x, t), "velocity", RectifiedFlow(), t)


@pytest.mark.parametrize("steps", [1, 7, 25])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_the_flow_match_scheduler_step_by_step(steps: int, shift: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    ours = ODE(steps=steps, shift=shift)
    torch.testing.assert_close(ours.times(), scheduler.sigmas, rtol=1e-6, atol=1e-7)
    theirs, x = [], noise(2, 3, 4, 4)
    for timestep in scheduler.timesteps:
        velocity = network(x, (timestep / 1000).expand(2))
        x = scheduler.step(velocity, timestep, x, return_dict=False)[0]
        theirs.append(x)
    states: list[Tensor] = []
    end = ours.sample(flow, noise(2, 3, 4, 4), callback=lambda step, t, x, x0: states.append(x))
    assert len(states) == steps
    for mine, other in zip(states, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(end, theirs[-1], rtol=2e-6, atol=2e-6)


class Mixture:
    """Two Gaussians on a line of features: its denoiser E[x0 | x_t] is known on every path."""

    means, weights, std = torch.tensor([-1.5, 1.0]), torch.tensor([0.3, 0.7]), 0.2

    def predictor(self, path: Path) -> Predictor:
        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            x64, alpha, sigma = x.double(), expand(path.alpha(t.double()), x), expand(path.sigma(t.double()), x)
            variance = (alpha * self.std) ** 2 + sigma**2
            distance = x64[..., None] - alpha[..., None] * self.means  # (B, D, 2)
            responsibility = (self.weights.log() - distance**2 / (2 * variance[..., None])).softmax(-1)
            posterior = self.means + (alpha * self.std**2 / variance)[..., None] * distance
            x0 = (responsibility * posterior).sum(-1)
            return x0.float(), ((x64 - alpha * x0) / sigma).float()

        return denoise

    def quantiles(self, u: Tensor) -> Tensor:
        grid = torch.linspace(-4, 4, 20001, dtype=torch.float64)
        cdf = (self.weights * 0.5 * (1 + torch.erf((grid[:, None] - self.means) / (self.std * 2**0.5)))).sum(1)
        return grid[torch.searchsorted(cdf, u.double()).clamp_max(len(grid) - 1)]


PATHS = [RectifiedFlow(), VPCosine(), DDPMLinear(), EDM()]


def transport_error(path: Path, **settings: Any) -> float:
    """Wasserstein-1 distance from samples to the mixture. In one dimension the ODE's map is monotone, so noise at
    equidistant quantiles ends at the data's quantiles."""
    u = (torch.arange(2000) + 0.5) / 2000
    x_T = (2**0.5 * torch.erfinv(2 * u.double() - 1)).float()[:, None]
    samples = ODE(**settings).sample(Mixture().predictor(path), x_T, path=path)
    return float((samples[:, 0].double().sort().values - Mixture().quantiles(u)).abs().mean())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("method", ["euler", "heun", "midpoint"])
def test_noise_is_carried_to_the_mixture(path: Path, method: str) -> None:
    coarse, fine = (transport_error(path, steps=steps, method=method) for steps in (20, 160))
    assert fine < 0.03 and fine < max(
        coarse, 0.004
    )  # where 20 steps are as good, what is left is that samples are counted


@pytest.mark.parametrize("second", ["heun", "midpoint"])
@pytest.mark.parametrize("path", [RectifiedFlow(), EDM()], ids=lambda path: type(path).__name__)
def test_two_evaluations_a_step_are_of_second_order(path: Path, second: str) -> None:
    """Against a fine solution on the smooth part: a Gaussian, where halving the step quarters the error."""

    def gaussian(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = expand(path.alpha(t.double()), x), expand(path.sigma(t.double()), x)
        x0 = alpha * x.double() / (alpha**2 + sigma**2)
        return x0.float(), ((x.double() - alpha * x0) / sigma).float()

    x_T = torch.ones(1, 1)
    exact = (
        float(x_T / (1 + float(path.sigma(torch.tensor(path.t_max))) ** -2) ** 0.5) if isinstance(path, EDM) else 1.0
    )
    errors = {
        (method, steps): abs(float(ODE(steps=steps, method=method).sample(gaussian, x_T, path=path)) - exact)
        for method in ("euler", second)
        for steps in (20, 40, 80)
    }
    assert errors[second, 40] < errors[second, 20] / 2.5
    assert errors[second, 40] < errors["euler", 40] / 5
    assert errors["euler", 80] == pytest.approx(errors["euler", 40] / 2, rel=0.2)


def test_number_of_evaluations_and_times() -> None:
    calls: list[float] = []

    def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(float(t[0]))
        return x * 0, x

    ODE(steps=4).sample(denoise, noise(2, 3))
    assert len(calls) == 4 and calls[0] == 1 and min(calls) > 0
    calls.clear()
    ODE(steps=4, method="heun").sample(denoise, noise(2, 3))
    assert len(calls) == 7 and min(calls) > 0
    for path in PATHS:
        times = ODE(steps=9, shift=3.0).times(path)
        assert (
            len(times) == 10
            and float(times[0]) == pytest.approx(path.t_max)
            and times[-1] == 0
            and (times.diff() < 0).all()
        )


def test_edm_noise_is_scaled() -> None:
    seen: list[Tensor] = []

    def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(x)
        return x * 0, x / t[:, None]

    ODE(steps=2).sample(denoise, noise(2, 3), path=EDM(t_max=10.0))
    torch.testing.assert_close(seen[0], 10 * noise(2, 3))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"method": "rk4"}, {"shift": 0.0}])
def test_mistakes_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        ODE(**wrong)
    assert registry.find("samplers", "ode") is ODE


# ------------------------------------------------------------------------------------------- guidance


def predictor(cond: Any) -> Predictor:
    def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        y = network(x, t) + expand(cond["pooled"], x)
        return recover(x, y, "velocity", RectifiedFlow(), t)

    return denoise


COND = {"pooled": torch.tensor([0.5, -1.0])}
NULL = {"pooled": torch.zeros(2), "drop": torch.ones(2, dtype=torch.bool)}


def test_scale_one_is_no_guidance_to_the_bit() -> None:
    def never(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("the unconditional predictor was called")

    x, t = noise(2, 5), torch.tensor([0.3, 0.8])
    for left, right in zip(guide(predictor(COND), never, 1.0)(x, t), predictor(COND)(x, t), strict=True):
        assert torch.equal(left, right)
    assert torch.equal(guide_batched(predictor, COND, NULL, 1.0)(x, t)[0], predictor(COND)(x, t)[0])


@pytest.mark.parametrize("scale", [0.0, 2.5, 7.0])
def test_guidance_of_the_answer_is_guidance_of_the_output(scale: float) -> None:
    x, t = noise(2, 5), torch.tensor([0.3, 0.8])
    guided = network(x, t) + scale * COND["pooled"][:, None]
    expected = recover(x, guided, "velocity", RectifiedFlow(), t)
    for denoise in (guide(predictor(COND), predictor(NULL), scale), guide_batched(predictor, COND, NULL, scale)):
        for left, right in zip(denoise(x, t), expected, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_the_batched_form_is_one_call() -> None:
    sizes: list[int] = []

    def make(cond: Any, log: list[int]) -> Predictor:
        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            log.append(len(x))
            assert len(t) == len(cond["pooled"]) == len(x)
            return x, x

        return denoise

    guide_batched(partial(make, log=sizes), COND, NULL, 3.0)(noise(2, 5), torch.full((2,), 0.5))
    assert sizes == [4]
    both = concatenate(COND, NULL)
    assert both["drop"].tolist() == [False, False, True, True]
    with pytest.raises(ValueError, match="same names"):
        concatenate({"pooled": torch.zeros(2), "text": torch.zeros(2)}, NULL)


@pytest.mark.parametrize("target", ["eps", "v"])
def test_rescaled_guidance_is_diffusers(target: str) -> None:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    path, scale, share = DDPMLinear(), 5.0, 0.7
    x, t = noise(4, 2, 3, 3), torch.linspace(0.2, 0.9, 4)
    outputs = {name: noise(4, 2, 3, 3, seed=i) for i, name in enumerate(("cond", "null"), start=1)}

    def make(cond: Any) -> Predictor:
        return lambda x, t: recover(x, outputs[cond["name"]], target, path, t)

    guided = outputs["null"] + scale * (outputs["cond"] - outputs["null"])
    expected = recover(x, rescale_noise_cfg(guided, outputs["cond"], share), target, path, t)
    weaker = make({"name": "null"})
    found = guide_batched(
        lambda cond: make({"name": "cond"}), {}, {}, scale, rescaled=rescaled_to(share, target, path), weaker=weaker
    )
    for ours, theirs in zip(found(x, t), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert rescaled_to(0.0, target, path) is None


def test_a_weaker_network_guides_under_the_same_conditions() -> None:
    """Autoguidance: weak + scale * (strong - weak); at 1 the weak one is not called, to the bit."""
    x, t = noise(2, 5), torch.tensor([0.3, 0.8])

    def weak(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return tuple(0.5 * value for value in predictor(COND)(x, t))  # type: ignore[return-value]

    strong = predictor(COND)(x, t)
    for ours, one in zip(guide_batched(predictor, COND, {}, 3.0, weaker=weak)(x, t), strong, strict=True):
        torch.testing.assert_close(ours, 0.5 * one + 3.0 * (one - 0.5 * one))
    for ours, one in zip(guide_batched(predictor, COND, {}, 1.0, weaker=weak)(x, t), strong, strict=True):
        assert torch.equal(ours, one)
    for ours, one in zip(guide_batched(predictor, COND, {}, 0.0, weaker=weak)(x, t), weak(x, t), strict=True):
        assert torch.equal(ours, one)


def test_guidance_for_an_interval_is_the_conditional_answer_elsewhere_at_half_the_cost() -> None:
    """In (low, high] as with guidance, elsewhere to the bit as without; of a batch of several times, each sample by its own."""
    x, sizes = noise(2, 5), []  # type: ignore[var-annotated]

    def counted(cond: Any) -> Any:
        answer = predictor(cond)

        def denoise(x_t: torch.Tensor, t: torch.Tensor) -> Any:
            sizes.append(len(x_t))
            return answer(x_t, t)

        return denoise

    within = guide_batched(counted, COND, NULL, 3.0, interval=(0.25, 0.5))
    always, never = guide_batched(predictor, COND, NULL, 3.0), predictor(COND)
    for time, expected, cost in ((0.5, always, 4), (0.3, always, 4), (0.25, never, 2), (0.75, never, 2)):
        t = torch.full((2,), time)
        sizes.clear()
        for ours, theirs in zip(within(x, t), expected(x, t), strict=True):
            assert torch.equal(ours, theirs)
        assert sizes == [cost], time
    mixed = torch.tensor([0.3, 0.9])
    for ours, guided, plain in zip(within(x, mixed), always(x, mixed), never(x, mixed), strict=True):
        assert torch.equal(ours[0], guided[0])
        assert torch.equal(ours[1], plain[1])
    rehearsed = guide_batched(lambda cond: lambda x, t: (x, x), COND, NULL, 3.0, interval=(0.25, 0.5))
    assert rehearsed(x.to("meta"), mixed.to("meta"))[0].shape == x.shape
