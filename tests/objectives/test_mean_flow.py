"""MeanFlow against Gsunshine/py-meanflow (golden numbers), and a mixture whose average velocities are known."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Guidance, Request, UserError
from nexus_scale.objectives.mean_flow import MeanFlow
from nexus_scale.processes.gaussian import expand
from nexus_scale.processes.times import LogitNormal
from nexus_scale.samplers.ode import ODE
from tests.golden import mean_flow as golden
from tests.mixture import three_in_a_plane
from tests.objectives.test_consistency import Told

FOUND = np.load(golden.FILE)
PLAIN: dict[str, Any] = {"conditions": (), "condition_drop": 0.0, "input": "image"}


class Exact(MeanFlow):
    """With the derivative that the paper has, by forward-mode differentiation."""

    def change(self, u: Callable[[Tensor, Tensor], Tensor], z: Tensor, t: Tensor, v: Tensor) -> Tensor:
        _, du = torch.func.jvp(u, (z, t), (v, torch.ones_like(t)))
        return du.detach()


def plain(w: Tensor) -> Callable[..., Tensor]:
    return lambda z, t, cond: golden.network(z, t, cond["span"], w)


def batch_of(x: Tensor, **others: Tensor) -> Batch:
    return Batch({"image": x, **others}, torch.arange(len(x)), torch.arange(len(x)))


@pytest.mark.parametrize("name", golden.CASES)
def test_losses_and_gradients_are_those_of_the_published_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    power, offset = golden.CASES[name]
    found = {}
    for cls in (Exact, MeanFlow):
        objective, w = cls(**PLAIN, power=power, offset=offset), golden.weights(2).requires_grad_()
        monkeypatch.setattr(objective, "spans", lambda rng: golden.times())
        rng = Told(noise=golden.drawn(1, golden.SHAPE))
        total = objective.loss("main", {"model": plain(w)}, batch_of(golden.drawn(0, golden.SHAPE)), rng, 0).total  # type: ignore[arg-type]
        total.backward()
        assert w.grad is not None
        found[cls] = float(total.detach()), w.grad
    wanted = float(FOUND[f"{name}/loss"]), torch.from_numpy(FOUND[f"{name}/grad"])
    assert found[Exact][0] == pytest.approx(wanted[0], rel=1e-5)
    torch.testing.assert_close(found[Exact][1], wanted[1], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(found[MeanFlow][1], wanted[1], rtol=2e-3, atol=2e-4)  # by the difference


@pytest.mark.parametrize("name", golden.TIMES)
def test_times_are_drawn_as_in_the_published_code(name: str) -> None:
    mean_t, std_t, mean_r, std_r = golden.TIMES[name]
    own = None if name == "v0" else {"name": "logit_normal", "mean": mean_r, "std": std_r}
    objective = MeanFlow(**PLAIN, times={"name": "logit_normal", "mean": mean_t, "std": std_t}, earlier=own, apart=0.75)
    assert isinstance(objective.times, LogitNormal)
    of_t, of_r, apart = golden.uniforms()
    rng = Told(times=torch.special.ndtri(of_t.double()).float(), earlier=of_r, apart=apart)
    t, r = objective.spans(rng)  # type: ignore[arg-type]
    torch.testing.assert_close(t, torch.from_numpy(FOUND[f"{name}/t"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(r, torch.from_numpy(FOUND[f"{name}/r"]), rtol=1e-5, atol=1e-6)
    assert 10 < int((t > r).sum()) < 64 and bool((t >= r).all())


def test_velocities_under_guidance_are_those_of_the_paper() -> None:
    """omega v + kappa v_cond + (1 - omega - kappa) v_null at times within the interval, v elsewhere; who is told nothing learns v."""
    objective = MeanFlow(input="image", omega=1.5, kappa=0.4, interval=(0.3, 0.8), condition_drop=0.5)
    z, v, t = golden.drawn(0, (3, 2, 2, 2)), golden.drawn(1, (3, 2, 2, 2)), torch.tensor([0.2, 0.5, 0.7])
    cond = {"label": torch.tensor([1, 2, 3])}

    def network(z: Tensor, t: Tensor, cond: Any) -> Tensor:
        assert bool((cond["span"] == 0).all())
        told = cond["label"] * ~cond.get("drop", torch.zeros(3, dtype=torch.bool))
        return z * expand(t, z) + expand(told.float(), z)

    found = objective.guided({"model": network}, z, t, v, cond)
    null = z * expand(t, z)
    mixed = 1.5 * v + 0.4 * (null + expand(cond["label"].float(), z)) - 0.9 * null
    torch.testing.assert_close(found, torch.where(expand(t > 0.3, z), mixed, v))


# ---------------------------------------------------------------------------------------------------- a mixture

DATA = three_in_a_plane()


def flowed(z: Tensor, t: Tensor, r: Tensor, steps: int = 24) -> Tensor:
    """Where the mixture's flow leads from (z, t) at r, by Runge-Kutta of fourth order, float64."""
    z, t = z.double(), t.double()
    h = (r.double() - t) / steps
    velocity = DATA.network(MeanFlow(**PLAIN).path, "velocity")
    for _ in range(steps):
        H = expand(h, z)
        a = velocity(z, t, {})
        b = velocity(z + H / 2 * a, t + h / 2, {})
        c = velocity(z + H / 2 * b, t + h / 2, {})
        d = velocity(z + H * c, t + h, {})
        z, t = z + H / 6 * (a + 2 * b + 2 * c + d), t + h
    return z


def knowing(z: Tensor, t: Tensor, cond: Any) -> Tensor:
    """The mixture's average velocity over the span."""
    span = cond["span"].double()
    velocity = DATA.network(MeanFlow(**PLAIN).path, "velocity")(z.double(), t.double(), {})
    average = (z.double() - flowed(z, t, t - span)) / expand(span.clamp(min=1e-9), z)
    return torch.where(expand(span > 1e-9, z), average, velocity)


def test_a_mixtures_average_velocity_is_what_is_learned() -> None:
    """With the mixture's own velocity in the place of a sample's, the target is the average velocity itself, at every span."""
    x, t = DATA.draw(96), torch.linspace(0.15, 0.95, 96)
    z = (1 - expand(t, x)) * x + expand(t, x) * golden.drawn(3, tuple(x.shape))
    r = t * torch.linspace(0.9, 0.05, 96)
    v = knowing(z, t, {"span": torch.zeros(96)})
    objective = MeanFlow(**PLAIN)
    du = objective.change(lambda z, t: knowing(z, t, {"span": t - r}), z.double(), t.double(), v)
    target, average = v - expand(t - r, z) * du, knowing(z, t, {"span": t - r})
    assert float((target - average).abs().max()) < 2e-3 < 0.05 * float((v - average).abs().max())


def test_one_jump_leads_where_four_lead() -> None:
    objective, noise = MeanFlow(**PLAIN), golden.drawn(4, (32, 2, 1, 1))
    made = [
        objective.generate(
            {"model": knowing},
            {},
            Request((2, 1, 1), sampler=ODE(steps=steps, spacing="trailing")),
            Told(noise=noise),  # type: ignore[arg-type]
        ).samples
        for steps in (1, 4)
    ]
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=2e-3)
    torch.testing.assert_close(made[0].double(), flowed(noise, torch.ones(32), torch.zeros(32)), rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(MeanFlow, interval=(0.8, 0.2)), "the earlier time first"),
        (partial(MeanFlow, interval=(0.2, 0.8)), "without guidance"),
        (partial(MeanFlow, omega=2.0, condition_drop=0.0), "need conditions that training drops"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], MeanFlow], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
    assert "sampler ode with method euler" in str(MeanFlow().misfit(ODE(method="heun"), Guidance()))
    assert MeanFlow().misfit(ODE(steps=1), Guidance()) is None
