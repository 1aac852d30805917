"""Consistency models against openai/consistency_models (golden numbers), diffusers' scheduler, and a mixture whose answer is known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nexus_scale.contracts import Batch, Guidance, Request, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives.consistency import Consistency
from nexus_scale.processes.gaussian import expand
from tests.golden import consistency as golden
from tests.mixture import three_in_a_plane

FOUND = np.load(golden.FILE)


class Told:
    """Random numbers that are given."""

    def __init__(self, **values: Tensor):
        self.values = values
        self.positions = torch.arange(len(next(iter(values.values()))))

    def normal(self, name: str, shape: Any = ()) -> Tensor:
        return self.values[name]

    uniform = normal


def batch_of(x: Tensor) -> Batch:
    return Batch({"image": x}, torch.arange(len(x)), torch.arange(len(x)))


def rng_of(count: int, step: int = 0) -> ProgressRng:
    return ProgressRng(0, step, "main", torch.arange(count), torch.device("cpu"))


def plain(w: Tensor) -> Callable[..., Tensor]:
    return lambda x, c_noise, cond: golden.network(x, c_noise, w)


@pytest.mark.parametrize("name", golden.CASES)
def test_losses_and_gradients_are_those_of_the_published_code(name: str) -> None:
    distils, distance, weight = golden.CASES[name]
    ours = weight.replace("+1", "_plus_one").replace("-", "_")
    objective = Consistency(scales=golden.SCALES, distance=distance, weight=ours, distils=distils)  # type: ignore[arg-type]
    place = golden.SCALES - 2 - golden.indices()
    rng = Told(noise=golden.drawn(3), times=(place + 0.5) / (golden.SCALES - 1))
    w = golden.weights(1).requires_grad_()
    nets = {"model": plain(w), "target": plain(golden.weights(2)), "teacher": plain(golden.weights(4))}
    total = objective.loss("main", nets, batch_of(0.5 * golden.drawn(0)), rng, 0).total  # type: ignore[arg-type]
    total.backward()
    assert float(total.detach()) == pytest.approx(float(FOUND[f"{name}/loss"].mean()), rel=1e-5)
    torch.testing.assert_close(w.grad, torch.from_numpy(FOUND[f"{name}/grad"]), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", golden.SCHEDULES)
def test_scales_grow_as_in_the_published_code(name: str) -> None:
    first, last, steps = golden.SCHEDULES[name]
    objective = Consistency(scales=first, scales_end=last, growth="square_root", growth_steps=steps)
    assert [objective.scales_at(step) for step in golden.STEPS_OF_RUN] == FOUND[f"{name}/scales"].tolist()
    assert objective.scales_at(10 * steps) == last + 1


def test_improved_training_doubles_its_intervals_at_equal_parts_of_the_run() -> None:
    """iCT, section 3.4: N(k) = min(s0 2^floor(k / K'), s1) + 1 with K' = floor(K / (log2(floor(s1 / s0)) + 1))."""
    K, s0, s1 = 400_000, 10, 1280
    every = math.floor(K / (math.log2(s1 // s0) + 1))
    objective = Consistency(scales=s0, scales_end=s1, growth="doubling_intervals", double_every=every)
    assert every == 50_000
    for step in (0, 49_999, 50_000, 123_456, 399_999, 400_000):
        assert objective.scales_at(step) == min(s0 * 2 ** (step // every), s1) + 1


def test_improved_training_draws_levels_by_a_log_normal_and_weighs_them_by_their_distance() -> None:
    """iCT, sections 3.1, 3.3 and 3.5; the probability of a pair is erf's difference at its two levels."""
    count, scales = 40_000, 11
    objective = Consistency(times={"name": "log_normal", "mean": -1.1, "std": 2.0})
    high, low = objective._pairs(rng_of(count), scales, torch.device("cpu"))
    levels = objective.levels(scales)
    z = (levels.double().log() + 1.1) / (2.0 * math.sqrt(2))
    wanted = torch.special.erf(z).diff()
    drawn = torch.bincount(torch.searchsorted(levels, low), minlength=scales)[: scales - 1] / count
    torch.testing.assert_close(drawn.double(), wanted / wanted.sum(), rtol=0, atol=4 * 0.5 / count**0.5)
    assert torch.equal(high, levels[torch.searchsorted(levels, low) + 1])

    x, w = 0.5 * golden.drawn(0), golden.weights(1)
    improved = Consistency(target="model", scales=scales)
    assert improved.needs == ("model",)
    rng = Told(noise=golden.drawn(3), times=torch.full((len(x),), 0.55))
    found = improved.loss("main", {"model": plain(w)}, batch_of(x), rng, 0).total  # type: ignore[arg-type]
    f = [
        improved.answer(plain(w), x + sigma * golden.drawn(3), torch.full((len(x),), float(sigma)), {})
        for sigma in (levels[6], levels[5])
    ]
    c = 0.00054 * math.sqrt(3 * 4 * 5)
    huber = ((f[0] - f[1]).square().flatten(1).sum(1) + c**2).sqrt() - c
    assert float(found) == pytest.approx(float(huber.mean() / (levels[6] - levels[5])), rel=1e-5)


def test_a_network_that_is_its_own_target_leaves_out_the_same() -> None:
    """What dropout leaves out of the answer is left out of the goal: between two calls at one level nothing would differ."""
    dropout = nn.Dropout(0.5)
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        seen.append(dropout(torch.ones_like(x)))
        return x

    Consistency(target="model").loss("main", {"model": model}, batch_of(torch.zeros(4, 1, 8, 8)), rng_of(4), 0)
    assert torch.equal(seen[0], seen[1]) and 0 < float((seen[0] == 0).float().mean()) < 1


def test_two_steps_are_those_of_the_published_code_and_of_diffusers_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import CMStochasticIterativeScheduler
    from diffusers.schedulers import scheduling_consistency_models as theirs

    w, noise, again = golden.weights(1), golden.drawn(8), golden.drawn(9)
    objective = Consistency(clip=True)
    level = float(objective.levels(golden.SCALES).flip(0)[golden.LEVELS_DRAWN[1]])
    objective = Consistency(clip=True, sigmas=(level,))
    rng = Told(noise=noise, noise_1=again)
    made = objective.generate({"model": plain(w)}, {}, Request(golden.SHAPE[1:]), rng).samples  # type: ignore[arg-type]
    torch.testing.assert_close(made, torch.from_numpy(FOUND["two_steps"]), rtol=1e-5, atol=1e-5)

    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40)
    scheduler.set_timesteps(
        timesteps=[golden.LEVELS_DRAWN[1], 0]
    )  # it counts from the highest level, and walks backwards
    monkeypatch.setattr(theirs, "randn_tensor", lambda *args, **kwargs: again)
    x = noise * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        y = golden.network(scheduler.scale_model_input(x, t), t.expand(len(x)) / 1000, w)
        x = scheduler.step(y, t, x).prev_sample
    # what it gives last is noised to sigma_min, where there is none
    torch.testing.assert_close(made, x.float(), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------- the mixture

DATA = three_in_a_plane()


Answer = Callable[[Consistency, Tensor, Tensor], Tensor]
"""The data that (x, sigma) comes from, (B, ...) float64."""


def flowed(objective: Consistency, x: Tensor, sigma: Tensor, steps: int = 32) -> Tensor:
    """Where the mixture's probability-flow ODE leads at sigma_min: the consistency function itself. Runge-Kutta of fourth order in the
    logarithm of sigma."""
    log, denoise = sigma.log(), DATA.predictor(objective.path)
    h = (math.log(objective.sigma_min) - log) / steps

    def slope(x: Tensor, log: Tensor) -> Tensor:
        sigma = log.exp()
        return expand(sigma, x) * denoise(x, sigma)[1]

    for _ in range(steps):
        H = expand(h, x)
        a = slope(x, log)
        b = slope(x + H / 2 * a, log + h / 2)
        c = slope(x + H / 2 * b, log + h / 2)
        d = slope(x + H * c, log + h)
        x, log = x + H / 6 * (a + 2 * b + 2 * c + d), log + h
    return x


def expected(objective: Consistency, x: Tensor, sigma: Tensor) -> Tensor:
    """The best denoiser's answer, which a consistency model's is not: a mean over all data that could be there."""
    return DATA.predictor(objective.path)(x, sigma)[0]


def network_of(objective: Consistency, answer: Answer, off: Tensor) -> Callable[..., Tensor]:
    """A network of that answer, plus `off` (B, 1, 1, 1) times its input, of which gradients are taken."""

    def network(scaled: Tensor, c_noise: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        sigma = (4 * c_noise.double()).exp()
        data, floor = objective.path.sigma_data, objective.sigma_min
        x = scaled.double() * expand((sigma.square() + data**2).sqrt(), scaled)
        skip = data**2 / ((sigma - floor).square() + data**2)
        out = (data * (sigma - floor) / (sigma.square() + data**2).sqrt()).clamp(min=1e-9)
        y = (answer(objective, x, sigma) - expand(skip, x) * x) / expand(out, x)
        return torch.where(expand(sigma <= floor * (1 + 1e-6), x), torch.zeros_like(y), y) + off * scaled

    return network


def disagreement(answer: Answer, scales: int, *, distils: bool, count: int) -> tuple[float, Tensor]:
    """The loss, and its gradient by `off` in each sample (B,), where network and target both have that answer."""
    objective = Consistency(
        scales=scales, sigma_min=0.02, sigma_max=10.0, distance="l2", weight="uniform", distils=distils
    )
    off = torch.zeros(count, 1, 1, 1, dtype=torch.float64, requires_grad=True)
    model = network_of(objective, answer, off)
    nets = {"model": model, "target": model, "teacher": DATA.network(objective.path, "edm")}
    total = objective.loss("main", nets, batch_of(DATA.draw(count)), rng_of(count), 0).total
    (slopes,) = torch.autograd.grad(total * count, off)
    return float(total.detach()), slopes.flatten()


def test_a_mixtures_consistency_function_is_the_fixed_point_of_distillation() -> None:
    """With a teacher that knows the mixture, loss and gradient vanish at the analytic consistency function, and do so with the order of
    Heun's method: the error of a step is of third order, and its square of sixth. At the best denoiser they do not."""
    found = [disagreement(flowed, scales, distils=True, count=192) for scales in (9, 17, 33)]
    losses = [loss for loss, _ in found]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(losses)]
    assert all(4.5 < order < 8 for order in orders), orders
    wrong = disagreement(expected, 33, distils=True, count=192)
    assert losses[-1] < 1e-6 < 1e-3 * wrong[0]
    assert float(found[-1][1].abs().mean()) < 0.01 * float(wrong[1].abs().mean())


def test_and_of_training_without_a_teacher() -> None:
    """There the loss has the variance of the noise in it, but its gradient vanishes in expectation as levels come closer; at the best
    denoiser it does not. In standard errors of the mean."""
    t = {}
    for answer in (flowed, expected):
        _, slopes = disagreement(answer, 65, distils=False, count=2048)
        t[answer] = float(slopes.mean().abs() / slopes.std() * len(slopes) ** 0.5)
    assert t[flowed] < 3 < 8 < t[expected], t


class Small(nn.Module):
    """A network of points in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, c_noise: Tensor, cond: Any) -> Tensor:
        waves = torch.stack([wave(k * c_noise) for k in (1, 2, 4, 8) for wave in (torch.sin, torch.cos)], dim=1)
        found: Tensor = self.layers(torch.cat([x.flatten(1), waves], dim=1))
        return found.view(x.shape)


def energy_distance(x: Tensor, y: Tensor) -> float:
    """0 of samples of one distribution, up to their number."""
    x, y = x.flatten(1), y.flatten(1)
    return float(2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean())


def test_a_distilled_model_draws_better_in_one_step_than_its_teacher() -> None:
    """A short training on the mixture. In one step the best denoiser answers little but the mean; its student knows where the ODE leads."""
    objective = Consistency(scales=18, sigma_min=0.02, sigma_max=10.0, distils=True, target="model")
    torch.manual_seed(0)
    model, teacher = Small(), DATA.network(objective.path, "edm")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(400):
        loss = objective.loss(
            "main", {"model": model, "teacher": teacher}, batch_of(DATA.draw(256, step)), rng_of(256, step), step
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    noise, real = torch.randn(1024, 2, 1, 1), DATA.draw(1024, seed=10_000)
    with torch.no_grad():
        drawn = objective.generate({"model": model}, {}, Request((2, 1, 1)), Told(noise=noise)).samples  # type: ignore[arg-type]
    of_teacher = expected(objective, noise * 10.0, torch.full((1024,), 10.0))
    mine, other = energy_distance(drawn, real), energy_distance(of_teacher.float(), real)
    assert mine < 0.1 * other, (mine, other)


def test_at_the_lowest_level_the_answer_is_what_was_given() -> None:
    objective = Consistency(scales=4, scales_end=16, double_every=8)
    x = torch.randn(3, 3, 4, 4)
    answer = objective.answer(lambda x, t, cond: x + 5, x, torch.full((3,), objective.sigma_min), {})
    torch.testing.assert_close(answer, x)
    levels = objective.levels(5).tolist()
    assert levels[0] == pytest.approx(0.002) and levels[-1] == pytest.approx(80, rel=1e-5) and levels == sorted(levels)
    assert [objective.scales_at(step) for step in (0, 7, 8, 16, 800)] == [4, 4, 8, 16, 16]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(Consistency, growth="square_root"), r"growth_steps 0"),
        (partial(Consistency, growth_steps=5), r"square_root alone"),
        (partial(Consistency, scales=10, scales_end=80), "needs double_every"),
        (partial(Consistency, times="logit_normal"), "uniform or log_normal"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Consistency], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
    assert "not guided" in str(Consistency(sigmas=None).misfit(None, Guidance(2.0)))  # type: ignore[arg-type]
