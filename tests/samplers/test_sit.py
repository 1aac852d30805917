"""SiT's formulas: paths, targets, scores and both samplers equal what its own code computes (tests/golden/sit.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.processes.gaussian import add_noise, recover, target_of
from nexus_scale.processes.paths import EDM, find_path
from nexus_scale.samplers.grid import points_at
from nexus_scale.samplers.interpolant_sde import InterpolantSDE
from nexus_scale.samplers.ode import ODE
from tests.golden import sit
from tests.mixture import three_in_a_plane

GOLDEN = {name: torch.from_numpy(value) for name, value in np.load(sit.FILE).items()}
T = 1 - torch.tensor([0.2, 0.85], dtype=torch.float64)


class GivenNoise:
    """`noise_<i>` as the golden numbers had it."""

    def normal(self, name: str, shape: Any) -> Tensor:
        return sit.drawn(2 + int(name.removeprefix("noise_")))


def denoise(path: Any) -> Any:
    """The golden network, whose velocity points from noise to data, in our time."""
    return lambda x, t: recover(x, -sit.velocity(x, 1 - t), "velocity", path, t)


@pytest.mark.parametrize("theirs", sit.PATHS)
def test_paths_and_targets(theirs: str) -> None:
    path = find_path(sit.PATHS[theirs])
    x_t = add_noise(path, sit.drawn(1), sit.drawn(0), T)
    torch.testing.assert_close(x_t, GOLDEN[f"{theirs}/x_t"], rtol=1e-9, atol=1e-9)
    velocity = target_of(path, "velocity", sit.drawn(1), sit.drawn(0), T)
    torch.testing.assert_close(-velocity, GOLDEN[f"{theirs}/velocity"], rtol=1e-9, atol=1e-9)
    _, eps = denoise(path)(x_t, T)
    score = -eps / path.sigma(T).view(-1, 1, 1, 1)
    torch.testing.assert_close(score, GOLDEN[f"{theirs}/score"], rtol=1e-8, atol=1e-8)


CASES = [name for name in GOLDEN if name.count("/") == 3]


@pytest.mark.parametrize("case", CASES)
def test_the_sde_is_theirs(case: str) -> None:
    theirs, form, last, method = case.split("/")
    path = find_path(sit.PATHS[theirs])
    sampler = InterpolantSDE(
        steps=sit.STEPS, diffusion=sit.FORMS[form], norm=0.7, last=sit.LASTS[last], method=method.lower()  # type: ignore[arg-type]
    )  # fmt: skip
    found = sampler.sample(denoise(path), sit.drawn(0), path=path, rng=GivenNoise())  # type: ignore[arg-type]
    torch.testing.assert_close(found, GOLDEN[case], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("theirs", ["Linear", "GVP"])
def test_the_ode_is_theirs(theirs: str) -> None:
    """Euler in equal steps of time. On the straight line it is DDIM's step; on the quarter circle ours, which is exact for a fixed
    (x0, eps), is another of the same order."""
    path = find_path(sit.PATHS[theirs])
    if theirs == "Linear":
        found = ODE(steps=sit.STEPS, spacing="trailing").sample(denoise(path), sit.drawn(0), path=path)
        torch.testing.assert_close(found.double(), GOLDEN[f"{theirs}/ode"], rtol=1e-5, atol=1e-5)
        return
    x = sit.drawn(0)
    for i in range(sit.STEPS):
        t = torch.full((2,), 1 - i / sit.STEPS, dtype=torch.float64)
        x0, eps = denoise(path)(x, t)
        x = x - (path.alpha_dot(t).view(-1, 1, 1, 1) * x0 + path.sigma_dot(t).view(-1, 1, 1, 1) * eps) / sit.STEPS
    torch.testing.assert_close(x, GOLDEN[f"{theirs}/ode"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("form", sit.FORMS)
def test_diffusion_coefficients(form: str) -> None:
    path = find_path("gvp")
    sampler = InterpolantSDE(diffusion=sit.FORMS[form], norm=0.7)  # type: ignore[arg-type]
    found = [sampler.coefficient(path, at) for at in points_at(path, T.tolist())]
    torch.testing.assert_close(
        torch.tensor(found, dtype=torch.float64), GOLDEN[f"diffusion/{form}"], rtol=1e-8, atol=1e-10
    )


def test_every_coefficient_draws_the_same_distribution() -> None:
    """Mean and covariance of a mixture whose score is known, whatever w(t)."""
    from nexus_scale.kernels.random import ProgressRng

    mixture, path = three_in_a_plane(), find_path("rectified_flow")
    rng = ProgressRng(0, 0, "sample", torch.arange(4000))
    noise = rng.normal("noise", (2, 1, 1))
    for form in ("sigma", "increasing_decreasing"):
        sampler = InterpolantSDE(steps=60, diffusion=form, last_size=0.01)  # type: ignore[arg-type]
        drawn = sampler.sample(mixture.predictor(path), noise, path=path, rng=rng).double().flatten(1)
        torch.testing.assert_close(drawn.mean(0), mixture.mean, atol=0.05, rtol=0)
        torch.testing.assert_close(drawn.T.cov(), mixture.covariance, atol=0.08, rtol=0)


def test_mistakes_are_named() -> None:
    path, x = find_path("rectified_flow"), torch.zeros(1, 1, 2, 2)
    with pytest.raises(UserError, match="'score' is infinite at t = 1"):
        InterpolantSDE(steps=3, diffusion="score").sample(lambda x, t: (x, x), x, path=path, rng=GivenNoise())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="less than first"):
        InterpolantSDE(first=0.03)
    with pytest.raises(UserError, match="walks times of a chain"):
        InterpolantSDE().sample(lambda x, t: (x, x), x, path=EDM())
    for setting in ({"sigmas": "karras"}, {"spacing": "leading"}, {"offset": 1}):
        with pytest.raises(UserError, match="equal steps"):
            InterpolantSDE(**setting).points(path)
