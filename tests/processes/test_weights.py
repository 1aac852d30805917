"""Weights and distances are the papers' for every target, times are drawn as they say, and what cannot be trained is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Batch, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.chains import DDPMLinear
from nexus_scale.processes.distances import find_distance
from nexus_scale.processes.gaussian import coefficients
from nexus_scale.processes.paths import EDM, GVP, Path, RectifiedFlow, VPCosine
from nexus_scale.processes.times import Importance, Mode, Times, find_times
from nexus_scale.processes.weights import (
    P2,
    WEIGHTS,
    Debiased,
    EDMWeight,
    MinSNR,
    SoftMinSNR,
    Weight,
    find_weight,
    weight_of,
)

STEPS = torch.arange(1, 1001, dtype=torch.float64) / 1000


def snr_of_diffusers() -> Tensor:
    diffusers = pytest.importorskip("diffusers")
    from diffusers.training_utils import compute_snr

    return compute_snr(diffusers.DDPMScheduler(), torch.arange(1000)).double()


def test_min_snr_is_what_diffusers_trains_with() -> None:
    """train_text_to_image.py: min(SNR, gamma), over SNR for epsilon and over SNR + 1 for v_prediction."""
    snr = snr_of_diffusers()
    cut = snr.clamp_max(5)
    for target, expected in (("eps", cut / snr), ("v", cut / (snr + 1)), ("x0", cut)):
        found = weight_of(MinSNR(gamma=5), DDPMLinear(), target, STEPS)
        assert found is not None and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=1e-7)


def published(snr: Tensor) -> dict[str, tuple[Weight, str, Tensor]]:
    """Each weight as its paper or its authors' code states it, with the target that it is stated for."""
    return {
        "p2": (P2(gamma=0.5, k=2), "eps", (2 + snr) ** -0.5),
        "soft": (SoftMinSNR(gamma=4), "x0", 1 / (1 / snr + 1 / 4)),
        "debiased": (Debiased(), "eps", snr**-0.5),
        "edm": (EDMWeight(sigma_data=0.5), "x0", (1 / snr + 0.25) / (0.25 / snr)),
    }


@pytest.mark.parametrize("name", published(torch.ones(1)))
@pytest.mark.parametrize("path", [DDPMLinear(), RectifiedFlow(), GVP(), EDM()], ids=lambda path: type(path).__name__)
def test_weights_meet_their_papers_and_one_target_another(name: str, path: Path) -> None:
    t = path.t_max * torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    alpha, sigma = path.alpha(t), path.sigma(t)
    snr = (alpha / sigma).square()
    weight, target, expected = published(snr)[name]
    found = weight_of(weight, path, target, t)
    assert found is not None
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    # an error in x0 is one in every other target, and weighs the same in all
    of_x0 = weight_of(weight, path, "x0", t)
    assert of_x0 is not None
    for other in ("eps", "v", "velocity", *(("edm",) if isinstance(path, EDM) else ())):
        a, b = coefficients(path, other, t)
        error = a - b * alpha / sigma  # of the target, where x0 is wrong by 1 and eps by -alpha / sigma
        there = weight_of(weight, path, other, t)
        assert there is not None
        torch.testing.assert_close(there.double() * error.square(), of_x0.double(), rtol=1e-5, atol=0)


def test_edm_and_soft_min_snr_are_their_authors_of_f() -> None:
    """Karras et al.: lambda * c_out^2 = 1. k-diffusion: (sigma sigma_data)^2 / (sigma^2 + sigma_data^2)^2."""
    sigma = torch.exp(torch.linspace(-5, 4, 15, dtype=torch.float64))
    of_edm = weight_of(EDMWeight(sigma_data=0.5), EDM(), "edm", sigma)
    of_soft = weight_of(SoftMinSNR(gamma=1 / 0.25), EDM(), "edm", sigma)
    assert of_edm is not None and of_soft is not None
    torch.testing.assert_close(of_edm, torch.ones(15))
    torch.testing.assert_close(of_soft.double(), 0.25 * sigma**2 / (sigma**2 + 0.25) ** 2, rtol=1e-5, atol=0)


def test_weights_have_their_limits_at_both_ends() -> None:
    for name in ("min_snr", "soft_min_snr", "p2"):
        for target in ("eps", "v", "x0"):
            found = weight_of(find_weight(name), VPCosine(), target, torch.tensor([0.0, 1.0]))
            assert found is not None and bool((found.isfinite() & (found >= 0)).all()), (name, target)
    ends = weight_of(MinSNR(gamma=5), VPCosine(), "eps", torch.tensor([0.0, 1.0]))
    assert ends is not None
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0]), atol=1e-5, rtol=1e-5)
    assert weight_of(find_weight("constant"), VPCosine(), "v", torch.ones(1)) is None


def test_pseudo_huber_is_squared_near_and_linear_far() -> None:
    x = torch.tensor([[[1e-3, 100.0]], [[0.0, 2e-3]]])

    def mean(values: Tensor) -> Tensor:
        return values.flatten(1).mean(1)

    by_value = find_distance({"name": "pseudo_huber", "c": 1.0}).of(x.square(), mean)
    torch.testing.assert_close(by_value[0], torch.tensor(math.sqrt(1e4 + 1) - 1), rtol=1e-4, atol=0)
    torch.testing.assert_close(by_value[1], torch.tensor(2e-6), rtol=0.1, atol=0)
    by_sample = find_distance({"name": "pseudo_huber", "c": 1.0, "per": "sample"}).of(x.square(), mean)
    torch.testing.assert_close(by_sample[0], torch.tensor(2 * (math.sqrt(5001) - 1)), rtol=1e-4, atol=0)


# ------------------------------------------------------------------------------------------------- the objective


def trained(**arguments: Any) -> Any:
    """The loss of 64 samples under a network that answers half its input."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.arange(64)
    batch = Batch({"image": torch.randn(64, 2, 3, 3, generator=generator)}, rows, rows)
    objective = Denoising(input="image", conditions=(), **arguments)
    return objective, objective.loss(
        "main", {"model": lambda x, t, cond: 0.5 * x}, batch, ProgressRng(0, 0, "main", rows), 0
    )


def test_the_loss_is_weighted_and_what_is_shown_by_time_is_not() -> None:
    settings = {"path": "ddpm_linear", "target": "v", "times": "discrete"}
    _, plain = trained(**settings)
    objective, weighted = trained(**settings, weight={"name": "min_snr", "gamma": 2.0})
    t = objective.times.sample(ProgressRng(0, 0, "main", torch.arange(64)))
    weight = weight_of(objective.weight, objective.path, "v", t)
    assert weight is not None and not torch.allclose(plain.total, weighted.total)
    torch.testing.assert_close(weighted.metrics["mse"], plain.total)
    assert "mse" not in plain.metrics
    for i in range(4):
        assert torch.equal(weighted.metrics[f"loss_t{i}"][0], plain.metrics[f"loss_t{i}"][0])
    _, far = trained(**settings, distance={"name": "pseudo_huber", "c": 1e4})
    torch.testing.assert_close(far.total, plain.total, rtol=1e-3, atol=0)
    torch.testing.assert_close(far.metrics["mse"], plain.total)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "vp_cosine", "target": "velocity", "times": "uniform"}, "infinite at t = 0"),
        ({"path": "edm", "target": "edm", "times": "uniform"}, "begins in noise at 80"),
        ({"path": "rectified_flow", "target": "x0", "times": "uniform", "weight": "edm"}, "count for nothing"),
        (
            {"path": "vp_cosine", "target": "eps", "times": "discrete", "weight": "debiased"},
            r"1e\+06 at t = 1 for target 'eps'",
        ),
        ({"times": {"name": "importance", "of": {"name": "stratified", "intervals": 4}}}, "depends on no other"),
        ({"times": {"name": "stratified", "intervals": 4, "of": "importance"}}, "depends on no other"),
        ({"weight": "minsnr"}, "min_snr"),
        ({"weight": {"name": "min_snr", "gamma": 0}}, "gamma"),
        ({"distance": "huber"}, "pseudo_huber"),
        ({"path": "vp_cosine", "target": "v", "variance": "learned"}, "steps are counted"),
    ],
)
def test_what_cannot_be_trained_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Denoising(**arguments)


def test_what_can_be_trained_is_not_refused() -> None:
    for weight in WEIGHTS:
        for target in ("eps", "x0", "v"):
            Denoising(path="ddpm_linear", target=target, times="discrete", weight=weight)
        Denoising(path="edm", target="edm", times="log_normal", weight=weight)
        Denoising(path="gvp", target="velocity", times={"name": "uniform", "earliest": 0.001}, weight=weight)
    Denoising(path="vp_cosine", target="velocity", times={"name": "uniform", "earliest": 1e-5})


# ------------------------------------------------------------------------------------------------- times


def rng_of(rows: Tensor, step: int = 0) -> ProgressRng:
    return ProgressRng(0, step, "main", rows)


@pytest.mark.parametrize("scale", [-0.9, 0.0, 1.29])
def test_mode_is_what_diffusers_trains_sd3_with(scale: float) -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    theirs = 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)  # diffusers' `mode`, of u falling
    torch.testing.assert_close(Mode(scale=scale).quantile(u), theirs.flip(0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spec", ["uniform", {"name": "uniform", "earliest": 0.2}, "mode", "importance"], ids=str)
def test_times_do_not_depend_on_the_split_and_follow_their_quantiles(spec: Any) -> None:
    times: Times = find_times(spec)
    whole = times.sample(rng_of(torch.arange(20000)))
    assert torch.equal(whole[:256], torch.cat([times.sample(rng_of(part)) for part in torch.arange(256).split(7)]))
    for u in (0.1, 0.5, 0.9):
        assert abs((whole < times.quantile(torch.tensor(u))).float().mean() - u) < 0.015


def test_importance_draws_what_costs_more_and_expects_the_same() -> None:
    times = Importance(shares=8, warm_up=3, decay=0.5)
    rows = torch.arange(4096)

    def cost(t: Tensor) -> Tensor:
        return 0.1 + 5 * t.square()

    def step(number: int, ranks: int, times: Importance) -> Tensor:
        """The losses of a global batch on several ranks, which then follow their sum."""
        held, found = [], []
        for part in rows.chunk(ranks):
            t, counts, share = times.draw(rng_of(part, number))
            times.see(share, cost(t))
            found.append(cost(t) * counts)
            held.append(times._seen.pop())
        times._seen = [held[0]]
        times.follow(lambda mine: torch.stack(held).sum(0))
        return torch.cat(found)

    first = step(0, 1, times)
    assert torch.equal(times.probabilities(), times.probabilities()) and times.samples.sum() == 4096
    probability = times.probabilities()
    middles = (torch.arange(8) + 0.5) / 8
    expected = cost(middles.double()) / cost(middles.double()).sum()
    torch.testing.assert_close(probability, expected, rtol=0.05, atol=2e-3)
    second = step(1, 1, times)
    analytic = 0.1 + 5 / 3
    assert abs(first.mean() - analytic) < 0.1 and abs(second.mean() - analytic) < 0.03
    assert second.std() < 0.4 * first.std(), "which is what it is for"

    # two ranks know what one knows, and a restored one goes on to the bit
    other = Importance(shares=8, warm_up=3, decay=0.5)
    step(0, 2, other)
    torch.testing.assert_close(other.probabilities(), probability, rtol=1e-12, atol=0)
    restored = Importance(shares=8, warm_up=3, decay=0.5)
    restored.load_state_dict({name: value.clone() for name, value in times.state_dict().items()})
    assert torch.equal(step(2, 1, restored), step(2, 1, times))
    # a loss that is not finite leaves its share as it is
    before = times.squares.clone()
    times.see(torch.tensor([3, 4]), torch.tensor([math.nan, 1.0]))
    times.follow(lambda mine: mine)
    assert (
        times.squares[3] == before[3] and times.squares[4] != before[4] and bool(times.probabilities().isfinite().all())
    )
