"""Walks that begin at given samples, against diffusers' image-to-image: its schedulers, stepped from where its pipelines begin."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Start, UserError
from nexus_scale.processes.paths import find_path
from nexus_scale.samplers.ancestral import Ancestral
from nexus_scale.samplers.ode import ODE
from nexus_scale.samplers.start import first_step

diffusers = pytest.importorskip("diffusers")


def answer(x: Tensor, t: Tensor) -> Tensor:
    """What a network predicts."""
    return torch.tanh(x.flip(-1)) * 0.7 + 0.1 * t.view(-1, 1, 1, 1)


@pytest.mark.parametrize(("steps", "strength"), [(20, 0.5), (7, 0.75), (4, 1.0)])
def test_ddim_begins_where_stable_diffusions_image_to_image_does(steps: int, strength: float) -> None:
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    settings: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    theirs = diffusers.DDIMScheduler(**settings, clip_sample=False)
    theirs.set_timesteps(steps)
    begin = steps - min(int(steps * strength), steps)
    x = theirs.add_noise(x0, noise, theirs.timesteps[begin : begin + 1])
    for t in theirs.timesteps[begin:]:
        x = theirs.step(answer(x, (t + 1) / 1000.0), t, x).prev_sample
    path = find_path({"name": "scaled_linear", "zero_terminal_snr": False})

    def denoise(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        eps, alpha, sigma = answer(x_t, t[:1]), path.alpha(t).view(-1, 1, 1, 1), path.sigma(t).view(-1, 1, 1, 1)
        return (x_t - sigma * eps) / alpha, eps

    reached: list[int] = []
    ours = Ancestral(steps=steps, variance="none", spacing="leading").sample(
        denoise, noise, path=path, callback=lambda step, *_: reached.append(step), start=Start(x0, strength)
    )
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)
    assert reached == list(range(begin + 1, steps + 1))


@pytest.mark.parametrize(("steps", "strength"), [(20, 0.5), (8, 0.75)])
def test_a_flow_begins_where_sd3s_image_to_image_does(steps: int, strength: float) -> None:
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 4, 6, 5), torch.randn(2, 4, 6, 5)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(steps)
    begin = steps - int(steps * strength)
    theirs.set_begin_index(begin)
    x = theirs.scale_noise(x0, theirs.timesteps[begin : begin + 1].repeat(2), noise)
    for t in theirs.timesteps[begin:]:
        x = theirs.step(answer(x, t / 1000.0), t, x).prev_sample
    ours = ODE(steps=steps, shift=3.0).sample(
        lambda x_t, t: (x_t - t[0] * answer(x_t, t[:1]), x_t + (1 - t[0]) * answer(x_t, t[:1])),
        noise,
        start=Start(x0, strength),
    )
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-5)


def test_a_start_is_counted_as_diffusers_counts() -> None:
    assert [first_step(Start(torch.zeros(1), s), 10) for s in (0.1, 0.55, 1.0)] == [9, 5, 0] and first_step(
        None, 10
    ) == 0
    with pytest.raises(UserError, match="leaves none"):
        first_step(Start(torch.zeros(1), 0.09), 10)
