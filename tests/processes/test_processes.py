"""Paths, targets and times: conversions round-trip, derivatives are derivatives, published schedules are met."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.processes.chains import Chain, DDPMCosine, DDPMLinear, DDPMSigmoid, ScaledLinear
from nexus_scale.processes.gaussian import add_noise, coefficients, network_input, recover, target_of
from nexus_scale.processes.latents import LatentStats, denormalise, normalise, sample_moments
from nexus_scale.processes.paths import EDM, GVP, PATHS, Path, RectifiedFlow, VPCosine, VPSigmoid, find_path
from nexus_scale.processes.times import LogitNormal, LogNormal, Uniform, find_times, shift_time

ALL: list[Path] = [
    RectifiedFlow(),
    VPCosine(),
    VPSigmoid(),
    GVP(),
    DDPMLinear(),
    DDPMCosine(),
    DDPMSigmoid(),
    ScaledLinear(),
    DDPMLinear(zero_terminal_snr=True, snr_shift=2.0),
    EDM(),
]
PAIRS = [(path, target) for path in ALL for target in ("eps", "x0", "v", "velocity")] + [
    (EDM(), "edm"),
    (EDM(t_max=10, sigma_data=1), "edm"),
]


def inner_times(path: Path, count: int = 13) -> torch.Tensor:
    """Off both ends, and off the corners of the piecewise schedule."""
    return path.t_max * torch.linspace(0.0234, 0.9567, count, dtype=torch.float64)


def clean_and_noise(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, batch, 3, 4, 4, generator=generator, dtype=torch.float64)
    return x0, eps


@pytest.mark.parametrize(("path", "target"), PAIRS, ids=lambda value: str(value).split("(")[0])
def test_recover_inverts_every_target_in_float64(path: Path, target: str) -> None:
    t = inner_times(path)
    x0, eps = clean_and_noise(len(t))
    x_t, y = add_noise(path, x0, eps, t), target_of(path, target, x0, eps, t)
    found_x0, found_eps = recover(x_t, y, target, path, t)
    torch.testing.assert_close(found_x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found_eps, eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", ALL, ids=lambda path: type(path).__name__)
def test_derivatives_are_those_of_alpha_and_sigma(path: Path) -> None:
    t, h = inner_times(path), 1e-6
    for value, derivative in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        numeric = (value(t + h) - value(t - h)) / (2 * h)
        torch.testing.assert_close(derivative(t), numeric, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("path", ALL, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_runs_from_data_to_noise(path: Path, dtype: torch.dtype) -> None:
    t = torch.linspace(0, path.t_max, 501, dtype=dtype)
    alpha, sigma = path.alpha(t), path.sigma(t)
    assert alpha.dtype == sigma.dtype == dtype
    assert alpha[0] == 1 and sigma[0] == 0
    rises = sigma.diff() > 0 if dtype == torch.float64 else sigma.diff() >= 0  # float32 rounds to 1 before t is 1
    assert rises.all() and (alpha.diff() <= 0).all() and (alpha >= 0).all()
    if not isinstance(path, RectifiedFlow | EDM):
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t))


def test_recover_refuses_where_the_target_says_nothing() -> None:
    x0, eps = clean_and_noise(1)
    for path, target, t in (
        (RectifiedFlow(), "eps", 1.0),
        (VPCosine(), "eps", 1.0),
        (RectifiedFlow(), "x0", 0.0),
        (VPCosine(), "velocity", 0.0),
    ):
        with pytest.raises(ValueError, match="does not determine"):
            recover(x0.float(), eps.float(), target, path, torch.tensor([t]))
    with pytest.raises(ValueError, match="does not determine"):  # one bad row among good ones is enough
        recover(x0.repeat(2, 1, 1, 1), eps.repeat(2, 1, 1, 1), "eps", RectifiedFlow(), torch.tensor([0.5, 1.0]))


def test_recover_is_float32_at_least() -> None:
    x0, eps = clean_and_noise(2)
    t = torch.tensor([0.25, 0.75])
    found = recover(x0.bfloat16(), eps.bfloat16(), "velocity", RectifiedFlow(), t)
    assert found[0].dtype == found[1].dtype == torch.float32


def test_velocity_of_the_straight_line_is_sd3s() -> None:
    x0, eps = clean_and_noise(5)
    t = torch.linspace(0, 1, 5, dtype=torch.float64)
    torch.testing.assert_close(target_of(RectifiedFlow(), "velocity", x0, eps, t), eps - x0)


def test_unknown_targets_and_paths_name_the_nearest() -> None:
    with pytest.raises(ValueError, match="velocity"):
        coefficients(RectifiedFlow(), "velocitty", torch.tensor([0.5]))
    with pytest.raises(ValueError, match="needs path 'edm'"):
        coefficients(RectifiedFlow(), "edm", torch.tensor([0.5]))
    with pytest.raises(UserError, match="rectified_flow"):
        find_path("rectified_flaw")
    with pytest.raises(UserError, match="t_max"):
        find_path({"name": "edm", "tmax": 3.0})
    with pytest.raises(UserError, match="logit_normal"):
        find_times({"name": "logitnormal"})
    assert find_path({"name": "edm", "t_max": 14.6}) == EDM(t_max=14.6)
    assert all(isinstance(find_path(name), kind) for name, kind in PATHS.items())


@pytest.mark.parametrize(
    ("path", "published"),
    [
        (DDPMLinear(), {"beta_schedule": "linear"}),
        (DDPMLinear(zero_terminal_snr=True), {"beta_schedule": "linear", "rescale_betas_zero_snr": True}),
        (DDPMCosine(), {"beta_schedule": "squaredcos_cap_v2"}),
        (DDPMCosine(steps=7), {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 7}),
        (DDPMSigmoid(beta_end=0.05), {"beta_schedule": "sigmoid", "beta_end": 0.05}),
        (
            ScaledLinear(zero_terminal_snr=False),
            {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        ),
        (
            ScaledLinear(),
            {
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "beta_end": 0.012,
                "rescale_betas_zero_snr": True,
            },
        ),
    ],
    ids=str,
)
def test_chains_are_the_tables_of_diffusers(path: Chain, published: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    table = diffusers.DDPMScheduler(**published).alphas_cumprod.double()
    t = torch.arange(1, path.steps + 1, dtype=torch.float64) / path.steps
    alpha_bar = path.alpha(t) ** 2
    # diffusers' are of float32; its rescaled last step, whose beta is 1 - 2^-24, is 0
    torch.testing.assert_close(alpha_bar, table, rtol=2e-4, atol=2e-6)
    if not path.zero_terminal_snr:
        torch.testing.assert_close(alpha_bar, (1 - path.betas()).cumprod(0), rtol=1e-10, atol=0)
        torch.testing.assert_close(
            path.betas(), diffusers.DDPMScheduler(**published).betas.double(), rtol=1e-4, atol=1e-7
        )
    else:
        assert alpha_bar[-1] == 0


def test_the_cosine_chain_ends_above_zero() -> None:
    last = torch.tensor([1.0], dtype=torch.float64)
    assert 0 < DDPMCosine().alpha(last) < 1e-3 and DDPMCosine().betas()[-1] == 0.999
    assert DDPMCosine(max_beta=0.5).betas().max() == 0.5
    for path in (VPCosine(), VPSigmoid(), GVP(), ScaledLinear()):
        assert path.alpha(last.float()) == 0


def test_sigmoid_meets_chens_algorithm() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for start, end, tau in ((-3.0, 3.0, 1.0), (0.0, 3.0, 0.7)):
        low, high = (1 / (1 + math.exp(-v / tau)) for v in (start, end))
        gamma = (high - torch.sigmoid((t * (end - start) + start) / tau)) / (high - low)
        found = VPSigmoid(start=start, end=end, tau=tau).alpha(t) ** 2
        torch.testing.assert_close(found, gamma.clamp(0, 1), rtol=1e-9, atol=1e-12)


def test_gvp_is_the_quarter_circle() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(GVP().alpha(t), torch.cos(t * math.pi / 2), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(GVP().sigma(t), torch.sin(t * math.pi / 2), rtol=1e-12, atol=1e-15)


def test_cosine_meets_equation_17() -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(VPCosine().alpha(t) ** 2, f / f[0], rtol=1e-10, atol=1e-12)
    small = VPCosine().sigma(torch.tensor([1e-6]))  # float32 keeps its digits near data
    torch.testing.assert_close(
        small.double(), VPCosine().sigma(torch.tensor([1e-6], dtype=torch.float64)), rtol=1e-5, atol=0
    )


def test_edm_network_target_has_unit_variance_and_gives_the_denoiser() -> None:
    path = EDM()
    t = torch.exp(torch.linspace(-5, 4, 7, dtype=torch.float64))
    a, b = coefficients(path, "edm", t)
    torch.testing.assert_close(path.sigma_data**2 * a**2 + b**2, torch.ones_like(t))  # Karras et al., appendix B.6
    x0, eps = clean_and_noise(len(t))
    x_t, y = add_noise(path, x0, eps, t), target_of(path, "edm", x0, eps, t)
    c = path.preconditioning(t)
    torch.testing.assert_close(c.c_skip[:, None, None, None] * x_t + c.c_out[:, None, None, None] * y, x0)
    scaled, c_noise = network_input(path, x_t, t)
    torch.testing.assert_close(scaled, x_t * c.c_in[:, None, None, None])
    torch.testing.assert_close(c_noise, t.log() / 4)


@pytest.mark.parametrize("times", [Uniform(), LogitNormal(), LogitNormal(mean=0.5, std=0.7), LogNormal()], ids=str)
def test_times_follow_their_quantiles(times: Uniform | LogitNormal | LogNormal) -> None:
    draws = times.sample(ProgressRng(0, 0, "main", torch.arange(20000)))
    assert draws.shape == (20000,) and draws.dtype == torch.float32
    for u in (0.1, 0.5, 0.9):
        assert abs((draws < times.quantile(torch.tensor(u))).float().mean() - u) < 0.015


@pytest.mark.parametrize("times", [Uniform(), LogitNormal(), LogNormal()], ids=str)
def test_a_time_does_not_depend_on_the_batch_split(times: Uniform | LogitNormal | LogNormal) -> None:
    whole = times.sample(ProgressRng(0, 0, "main", torch.arange(256)))
    for size in (128, 16, 7, 1):
        parts = [times.sample(ProgressRng(0, 0, "main", part)) for part in torch.arange(256).split(size)]
        assert torch.equal(whole, torch.cat(parts)), size


def test_shift_keeps_the_ends_and_leans_towards_noise() -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    shifted = shift_time(t, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted[1:-1] > t[1:-1]).all()
    assert shift_time(t, 1.0) is t
    torch.testing.assert_close(shift_time(shifted, 1 / 3.0), t)
    torch.testing.assert_close(shift_time(torch.tensor(0.5), 3.0), torch.tensor(0.75))


def test_posterior_draws_and_model_space() -> None:
    mean, logvar = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 50.0])
    moments = torch.cat([mean, logvar]).view(1, 4, 1, 1).half()
    z = sample_moments(moments, torch.full((1, 2, 1, 1), 2.0))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.flatten(), torch.tensor([3.0, -2.0 + 2 * math.exp(10)]))  # log-variance clamped to 20
    stats = LatentStats(mean=(1.0, 2.0), std=(0.5, 4.0))
    torch.testing.assert_close(denormalise(normalise(z, stats), stats), z)
    torch.testing.assert_close(normalise(torch.tensor([[1.5, 6.0]]), stats), torch.ones(1, 2))
    assert normalise(z, None) is z
    with pytest.raises(ValueError, match="3 channels"):
        normalise(torch.zeros(1, 3, 2, 2), stats)
    with pytest.raises(ValueError, match="2C"):
        sample_moments(torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, 2, 2))
    with pytest.raises(ValueError, match="positive"):
        LatentStats(mean=(0.0,), std=(0.0,))
