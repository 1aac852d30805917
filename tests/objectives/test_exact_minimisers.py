"""No training: on a mixture of Gaussians the network that minimises each objective is the one that theory names.

At a minimum the loss does not change to first order, whatever is added to the network's answer. So the slope of the loss along some
direction, measured sample by sample, is 0 within its standard error at the right answer, and far from 0 beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Cond, Objective
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives.denoising import Denoising
from tests.mixture import Mixture, three_in_a_plane

MIXTURE = three_in_a_plane()
SAMPLES, GROUPS = 16384, 64
Network = Callable[[Tensor, Tensor, Cond], Tensor]

UNIFORM = {"name": "stratified", "intervals": 64}
SETTINGS: dict[str, dict[str, Any]] = {
    "optimal transport": {
        "path": {"name": "conditional_ot", "sigma_min": 0.05},
        "target": "velocity",
        "times": UNIFORM,
    },
    "flow of diffusion": {"path": "vp_linear", "target": "velocity", "times": {"name": "uniform", "earliest": 1e-5}},
    "variance-preserving": {"path": "ddpm_linear", "target": "eps", "times": "discrete"},
    "cosine": {"path": "vp_cosine", "target": "v", "times": "uniform"},
    "x0": {"path": "rectified_flow", "target": "x0", "times": "logit_normal"},
    "edm": {"path": "edm", "target": "edm", "times": "log_normal"},
    "gvp, soft Min-SNR": {"path": "gvp", "target": "velocity", "times": UNIFORM, "weight": "soft_min_snr"},
    "zero terminal SNR, Min-SNR": {"path": "scaled_linear", "target": "v", "times": "discrete", "weight": "min_snr"},
    "x0, Min-SNR": {"path": "ddpm_cosine", "target": "x0", "times": "discrete", "weight": "min_snr"},
    "eps, P2, sigmoid": {"path": "ddpm_sigmoid", "target": "eps", "times": "discrete", "weight": "p2"},
    "eps, debiased, mode": {"path": "ddpm_linear", "target": "eps", "times": "mode", "weight": "debiased"},
    "x0, EDM's": {"path": "edm", "target": "x0", "times": "log_normal", "weight": "edm"},
}


def direction(x: Tensor, t: Tensor) -> Tensor:
    """Any function of what the network gets, of a size that does not grow with x."""
    return torch.tanh(x.roll(1, 1) + 0.5 * x) + 0.3 * torch.cos(3 * t).view(-1, 1, 1, 1)


def slopes(objective: Objective, network: Network, data: Tensor) -> tuple[float, float]:
    """The loss's slope along `direction` at the network's answer, and its standard error."""

    def loss(by: float, rows: Tensor) -> Tensor:
        batch, rng = Batch({"image": data[rows]}, rows, rows), ProgressRng(0, 0, "main", rows)

        def moved(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            return network(x, t, cond) + by * direction(x, t)

        return objective.loss("main", {"model": moved}, batch, rng, 0).total.double()

    groups = torch.arange(len(data)).chunk(GROUPS)
    found = torch.stack([(loss(0.5, rows) - loss(-0.5, rows)) for rows in groups])
    return float(found.mean()), float(found.std() / GROUPS**0.5)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_minimiser_of_a_squared_error_is_the_conditional_expectation(name: str) -> None:
    objective = Denoising(**SETTINGS[name], conditions=(), condition_drop=0, input="image")
    data = MIXTURE.draw(SAMPLES)
    exact = MIXTURE.network(objective.path, objective.target)
    slope, error = slopes(objective, exact, data)
    assert abs(slope) < 4 * error, f"{slope:.2e} is {slope / error:.1f} standard errors from 0"

    def beside(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        return exact(x, t, cond) + 0.1 * direction(x, t)

    slope, error = slopes(objective, beside, data)
    assert slope > 8 * error, "a network beside the minimum is told so"


def test_the_mixture_is_what_it_says() -> None:
    """Its density adds up to 1, its score is the density's gradient, its denoiser is the mean of what was noised to x, and it draws
    what it says."""
    alpha, sigma = 0.7, 0.6
    line = torch.linspace(-6, 6, 241, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    clean, noisy = MIXTURE.log_density(grid).exp(), MIXTURE.log_density(grid, alpha, sigma).exp()
    area = float(line[1] - line[0]) ** 2
    assert float(clean.sum()) * area == pytest.approx(1, abs=1e-6) == pytest.approx(float(noisy.sum()) * area, abs=1e-6)
    assert torch.allclose((clean[:, None] * grid).sum(0) * area, MIXTURE.mean, atol=1e-6)

    x = torch.tensor([[0.4, -0.2], [1.5, 0.1]], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(MIXTURE.log_density(x, alpha, sigma).sum(), x)
    torch.testing.assert_close(MIXTURE.score(x, alpha, sigma), slope)
    weights = clean * torch.exp(-0.5 * ((x.detach()[:, None] - alpha * grid) / sigma).square().sum(-1))  # (2, grid)
    torch.testing.assert_close(MIXTURE.posterior_mean(x, alpha, sigma), weights @ grid / weights.sum(1, keepdim=True))

    drawn = MIXTURE.draw(20000).double()
    assert drawn.shape == (20000, 2, 1, 1)
    torch.testing.assert_close(drawn.flatten(1).mean(0), MIXTURE.mean, atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.flatten(1).T.cov(), MIXTURE.covariance, atol=0.04, rtol=0)
    one = Mixture(torch.ones(1).double(), torch.zeros(1, 2).double(), torch.eye(2).double()[None])
    torch.testing.assert_close(one.score(x, 1.0, 0.0), -x)
