"""Likelihood, velocity, straightness and couplings against what is known of a mixture of Gaussians; no training."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Batch, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.couplings import OptimalTransport, find_coupling
from nexus_scale.processes.flow import bits_of, divergence, log_likelihood, straightness, velocity_of
from nexus_scale.processes.gaussian import add_noise, network_input, recover, target_of
from nexus_scale.processes.paths import EDM, GVP, ConditionalOT, Path, RectifiedFlow, VPCosine, VPLinear, find_path
from tests.golden import torchcfm
from tests.mixture import Mixture, three_in_a_plane

MIXTURE = three_in_a_plane()
PATHS = [RectifiedFlow(), VPLinear(), VPCosine(), EDM()]


def name_of(path: Path) -> str:
    return type(path).__name__


# ------------------------------------------------------------------------------------------------------ paths


@pytest.mark.parametrize("path", [ConditionalOT(sigma_min=0.05), VPLinear()], ids=name_of)
def test_slopes_of_a_path_are_its_derivatives_and_its_ends_are_data_and_noise(path: Path) -> None:
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64, requires_grad=True)
    for value, slope in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        (expected,) = torch.autograd.grad(value(t).sum(), t)
        torch.testing.assert_close(slope(t).detach(), expected, rtol=1e-9, atol=1e-12)
    ends = torch.tensor([0.0, 1.0])
    assert path.alpha(ends).tolist() == pytest.approx([1, 0], abs=0.01)
    assert path.sigma(ends).tolist() == pytest.approx([getattr(path, "sigma_min", 0), 1], abs=1e-4)


def test_the_variance_preserving_path_is_the_flow_matching_librarys() -> None:
    """alpha and sigma of `VPScheduler(beta_min=0.1, beta_max=20)` of flow_matching, which prints time the other way round:
    log alpha_s = -(1 - s)^2 (beta_max - beta_min) / 4 - (1 - s) beta_min / 2."""
    s = torch.linspace(0, 0.99, 34, dtype=torch.float64)
    log_alpha = -0.25 * (1 - s) ** 2 * (20 - 0.1) - 0.5 * (1 - s) * 0.1
    torch.testing.assert_close(VPLinear().alpha(1 - s), log_alpha.exp())
    torch.testing.assert_close(VPLinear().sigma(1 - s), (1 - (2 * log_alpha).exp()).sqrt())
    with pytest.raises(UserError, match="beta_min of at most beta_max"):
        find_path({"name": "vp_linear", "beta_min": 2.0, "beta_max": 1.0})


# ------------------------------------------------------------------------------------------------- likelihood


@pytest.mark.parametrize("path", PATHS, ids=name_of)
def test_the_likelihood_of_the_exact_flow_is_the_density(path: Path) -> None:
    # of mean 0: what is left of the data at the end (alpha(1) is 0.007 on the linear path, EDM's sigma is 80) counts only by its square
    centred = replace(MIXTURE, means=MIXTURE.means - MIXTURE.mean)
    x = centred.draw(32).double()
    velocity = velocity_of(centred.predictor(path), path)
    found = log_likelihood(velocity, path, x, tolerance=1e-6)
    torch.testing.assert_close(found.nats, centred.log_density(x), atol=8e-4, rtol=0)
    assert 20 < found.evaluations < 1000


def test_an_estimated_divergence_is_right_on_average() -> None:
    path, x = RectifiedFlow(), MIXTURE.draw(8).double()
    velocity, t = velocity_of(MIXTURE.predictor(path), path), torch.full((8,), 0.4, dtype=torch.float64)
    moves, exact = divergence(velocity, x, t)
    torch.testing.assert_close(moves, velocity(x, t))
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64).view(4, 2, 1, 1)
    guesses = torch.stack([divergence(velocity, x, t, sign.expand_as(x))[1] for sign in signs])
    torch.testing.assert_close(guesses.mean(0), exact)
    assert not torch.allclose(guesses[0], exact, rtol=1e-3), "one alone is an estimate"


def likelihood(objective: Denoising, x: Tensor, **settings: Any) -> dict[str, Tensor]:
    rows = torch.arange(len(x))
    network = MIXTURE.network(objective.path, objective.target)
    rng = ProgressRng(0, 0, "likelihood", rows)
    given = {"exact": True, "tolerance": 1e-5, "earliest": 1e-5, **settings}
    return dict(objective.likelihood({"model": network}, Batch({"image": x}, rows, rows), rng, **given))


@pytest.mark.parametrize(
    ("path", "target", "times"),
    [("rectified_flow", "velocity", "uniform"), ("vp_linear", "eps", "uniform"), ("edm", "edm", "log_normal")],
)
def test_an_objective_gives_bits_for_each_value(path: str, target: str, times: str) -> None:
    objective = Denoising(path=path, target=target, times=times, conditions=(), condition_drop=0, input="image")
    x = MIXTURE.draw(16)
    found = likelihood(objective, x)
    # the network computes in float32 here, and EDM's divides by sigma = 8e-4 where the data are
    expected = bits_of(MIXTURE.log_density(x), 2)
    torch.testing.assert_close(found["bits"], expected, atol=0.02, rtol=0)
    assert ("straightness" in found) == (path != "edm")
    estimated = likelihood(objective, x, exact=False)["bits"]
    assert float((estimated - expected).mean().abs()) < 0.3


def test_bytes_are_dequantised_to_a_probability() -> None:
    """Of a density that is 1 / 2 on [-1, 1], each of 256 bytes takes eight bits (255 widths lie between the outermost bytes)."""
    assert float(bits_of(torch.tensor([-12 * math.log(2.0)]), 12, 2 / 256)) == pytest.approx(8.0)
    objective = Denoising(conditions=(), condition_drop=0, input="image")
    pixels = torch.full((3, 2, 1, 1), 128, dtype=torch.uint8)
    found = likelihood(objective, pixels)["bits"]
    # the loader gives pictures as floats, and they are known as bytes by their values
    torch.testing.assert_close(likelihood(objective, pixels.float() / 127.5 - 1)["bits"], found, atol=0, rtol=0)
    density = MIXTURE.log_density(torch.full((1, 2), 128 / 127.5 - 1).double())
    assert found.mean() == pytest.approx(float(bits_of(density, 2, 2 / 255)), abs=0.03)
    with pytest.raises(UserError, match="have no field 'label'"):
        likelihood(Denoising(conditions=("label",), input="image"), pixels)


# ----------------------------------------------------------------------------------------------- straightness


def test_reflow_is_straighter() -> None:
    """In one dimension a flow's map T from noise to data is monotone, so of its own pairs the lines never cross: the best 2-rectified
    velocity, given x, is that of the one line through x, and its flow is straight. The 1-rectified flow's is not."""
    zero, two = torch.zeros(1, 1, dtype=torch.float64), torch.tensor([[-1.5], [1.0]], dtype=torch.float64)
    spread = torch.full((2, 1, 1), 0.04, dtype=torch.float64)
    line = Mixture(torch.tensor([0.3, 0.7], dtype=torch.float64), two, spread)
    path, noise = RectifiedFlow(), torch.linspace(-2.5, 2.5, 401, dtype=torch.float64)[:, None]
    first = velocity_of(line.predictor(path), path)
    drawn, steps = noise, 400
    for i in range(steps):
        drawn = drawn - first(drawn, torch.full((len(drawn),), 1 - i / steps, dtype=torch.float64)) / steps
    assert bool((drawn.diff(dim=0) > 0).all())

    def second(x: Tensor, t: Tensor) -> Tensor:
        lines = (1 - t[0]) * drawn + t[0] * noise  # where each pair is at this time, in order
        right = torch.searchsorted(lines[:, 0], x[:, 0].contiguous()).clamp(1, len(lines) - 1)
        share = (x - lines[right - 1]) / (lines[right] - lines[right - 1])
        slopes = noise - drawn
        return slopes[right - 1] + share * (slopes[right] - slopes[right - 1])

    before, after = (straightness(flow, path, noise[100:300]).mean() for flow in (first, second))
    assert float(before) > 0.1 and float(after) < 1e-6 * float(before)
    one_step = noise[100:300] - second(noise[100:300], torch.ones(200, dtype=torch.float64))
    torch.testing.assert_close(one_step, drawn[100:300], atol=1e-9, rtol=0)
    with pytest.raises(UserError, match="whose time ends at 1"):
        straightness(first, EDM(), zero)


# --------------------------------------------------------------------------------------------------- couplings


def batch(count: int = 32, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.arange(first, first + count)
    return MIXTURE.draw(64)[rows], ProgressRng(3, 5, "main", rows).normal("noise", (2, 1, 1)), rows


def cost(x0: Tensor, noise: Tensor) -> float:
    return float((x0 - noise).square().sum())


def test_optimal_transport_is_the_cheapest_assignment_within_a_group() -> None:
    ot = pytest.importorskip("scipy.optimize")
    x0, noise, rows = batch()
    found = OptimalTransport(group=16).paired(x0, noise, rows, True)
    for part in (slice(0, 16), slice(16, 32)):
        assert sorted(found[part].flatten(1).tolist()) == sorted(noise[part].flatten(1).tolist()), "noise is exchanged"
        squared = torch.cdist(x0[part].flatten(1).double(), noise[part].flatten(1).double()).square()
        chosen = ot.linear_sum_assignment(squared.numpy())
        assert cost(x0[part], found[part]) == pytest.approx(float(squared[chosen].sum()), rel=1e-6)
    assert cost(x0, found) < 0.8 * cost(x0, noise)


def test_a_pair_does_not_depend_on_how_a_batch_is_divided_and_a_divided_group_is_refused() -> None:
    coupling = find_coupling({"name": "optimal_transport", "group": 16})
    x0, noise, rows = batch()
    whole = coupling.paired(x0, noise, rows, True)
    parts = [coupling.paired(*(value[rows] for value in (x0, noise)), rows, True) for rows in rows.split(16)]
    assert torch.equal(whole, torch.cat(parts))
    with pytest.raises(
        UserError, match=r"16 samples exchange their noise, and the micro-batch has 8: set cluster\.micro"
    ):
        coupling.paired(*batch(8), True)
    assert coupling.paired(*batch(8), False).shape == (8, 2, 1, 1)


@pytest.mark.parametrize("coupling", ["optimal_transport", "given"])
def test_an_objective_trains_on_the_coupled_pairs(coupling: str) -> None:
    x0, noise, rows = batch(64)
    fields = {"latents": x0, "noise": noise.flip(0)} if coupling == "given" else {"image": x0}
    objective = Denoising(coupling=coupling, times="uniform", conditions=(), condition_drop=0, input="image")
    assert tuple(objective.fields) == tuple(fields)
    seen: list[Tensor] = []

    def network(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        seen.append((x - (1 - t).view(-1, 1, 1, 1) * x0) / t.view(-1, 1, 1, 1))
        return torch.zeros_like(x)

    loss = objective.loss("main", {"model": network}, Batch(fields, rows, rows), ProgressRng(3, 5, "main", rows), 5)
    expected = noise.flip(0) if coupling == "given" else OptimalTransport().paired(x0, noise, rows, True)
    torch.testing.assert_close(seen[0], expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(loss.total, (expected - x0).square().mean())


def test_mistakes_in_couplings_are_named() -> None:
    with pytest.raises(UserError, match="did you mean 'optimal_transport'"):
        Denoising(coupling="optimal_transprt")
    with pytest.raises(UserError, match=r"objective\.mirror: pairs"):
        Denoising(coupling="given", mirror=True)


# ------------------------------------------------------------------------------------------------- the originals


def test_places_velocities_and_assignments_are_torchcfms() -> None:
    """Whose time runs the other way: its 0 is noise, so that its velocity is ours with the other sign. Its plan is a permutation, from
    which it draws pairs with replacement; ours takes each pair once."""
    theirs, given = np.load(torchcfm.FILE), torchcfm.known()
    x0, noise, t = given["data"], given["noise"], 1 - given["times"]
    paths = {"straight": RectifiedFlow(), "lipman": ConditionalOT(sigma_min=torchcfm.SIGMA), "trigonometric": GVP()}
    for name, path in paths.items():
        x, y = add_noise(path, x0, noise, t), target_of(path, "velocity", x0, noise, t)
        torch.testing.assert_close(x, torch.from_numpy(theirs[f"{name}_x"]), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(-y, torch.from_numpy(theirs[f"{name}_velocity"]), rtol=1e-9, atol=1e-9)
    rows = torch.arange(len(x0))
    ours = OptimalTransport(group=len(x0)).paired(x0, noise, rows, True)
    assert torch.equal(ours, noise[torch.from_numpy(theirs["plan"].argmax(0))])


def test_the_preconditioning_is_diffusers() -> None:
    """What EDM's network is given and what its answer becomes, of `EDMEulerScheduler`."""
    scheduler = pytest.importorskip("diffusers").EDMEulerScheduler()
    path, generator = EDM(), torch.Generator().manual_seed(0)
    for sigma in (0.002, 0.3, 5.0, 80.0):
        x, y = (torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
        t = torch.full((2,), sigma, dtype=torch.float64)
        given, told = network_input(path, x, t)
        torch.testing.assert_close(given, scheduler.precondition_inputs(x, t[0]), rtol=1e-6, atol=0)
        torch.testing.assert_close(told, scheduler.precondition_noise(t), rtol=1e-6, atol=0)
        clean = scheduler.precondition_outputs(x, y, t[0])
        torch.testing.assert_close(recover(x, y, "edm", path, t)[0], clean, rtol=1e-6, atol=1e-6)
    # the error of F counts evenly, which is EDM's weight (sigma^2 + data^2) / (sigma data)^2 on the error of x0
    t = torch.logspace(-2, 1.5, 8, dtype=torch.float64)
    weight = (t.square() + 0.25) / (0.5 * t).square()
    torch.testing.assert_close(weight * path.preconditioning(t).c_out.square(), torch.ones_like(t))
