"""Latent consistency models against diffusers' distillation script (golden numbers) and its scheduler."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nexus_scale.contracts import Batch, UserError
from nexus_scale.interop.published import family
from nexus_scale.models.diffusion.dit import DiT
from nexus_scale.objectives.latent_consistency import LatentConsistency
from nexus_scale.processes.gaussian import expand
from tests.golden import latent_consistency as golden
from tests.mixture import three_in_a_plane
from tests.objectives.test_consistency import Told, rng_of

FOUND = np.load(golden.FILE)


def plain(w: Tensor) -> Callable[..., Tensor]:
    return lambda x, t, cond: golden.network(x, t, cond["text"], cond.get("guidance"), w)


@pytest.mark.parametrize("name", golden.CASES)
def test_losses_and_gradients_are_those_of_the_published_script(name: str) -> None:
    prediction, distance = golden.CASES[name]
    objective = LatentConsistency(
        target=golden.TARGETS[prediction], skip=golden.SKIP, scales=golden.SCALES, distance=distance, huber=golden.HUBER,  # type: ignore[arg-type]
    )  # fmt: skip
    x0 = golden.drawn(0, golden.SHAPE)
    moments = torch.cat([x0, torch.full_like(x0, -30.0)], dim=1)  # of no width
    batch = Batch({"moments": moments, "text": golden.drawn(2, golden.TEXT)}, torch.arange(5), torch.arange(5))
    rng = Told(
        posterior=torch.zeros_like(x0), noise=golden.drawn(1, golden.SHAPE), guidance=golden.shares(),
        times=(golden.index() + 0.5) / 50,
    )  # fmt: skip
    student = golden.weights(3).requires_grad_()
    nets = {"model": plain(student), "target": plain(golden.weights(5)), "teacher": plain(golden.weights(4))}
    total = objective.loss("main", nets, batch, rng, 0).total  # type: ignore[arg-type]
    total.backward()
    assert float(total.detach()) == pytest.approx(float(FOUND[f"{name}/loss"]), rel=1e-5)
    torch.testing.assert_close(student.grad, torch.from_numpy(FOUND[f"{name}/grad"]), rtol=1e-5, atol=1e-5)


def test_the_boundary_is_that_of_diffusers_scheduler() -> None:
    from diffusers import LCMScheduler

    scheduler, objective = LCMScheduler(), LatentConsistency()
    steps = [0, 1, 19, 500, 999]
    ours = objective.boundary((torch.tensor(steps) + 1).float() / 1000)
    theirs = zip(*(scheduler.get_scalings_for_boundary_condition_discrete(step) for step in steps), strict=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), torch.tensor(other, dtype=torch.float64), rtol=1e-6, atol=1e-12)
    assert [float(value[0]) for value in ours] == [1.0, 0.0]


def test_what_a_guided_step_of_the_teacher_agrees_with_is_its_fixed_point() -> None:
    """A mixture's own ODE, walked by small steps: the closer the steps of the teacher, the smaller the loss; and where target and student
    answer something else at each time, it is not."""
    data = three_in_a_plane()
    x = data.draw(64)

    def loss(skip: int, off: float) -> float:
        objective = LatentConsistency(skip=skip, scales=(1.0, 1.0), input="image", conditions=("label",), distance="l2")
        denoise = data.predictor(objective.path)

        def walked(x_t: Tensor, t: Tensor, cond: Any) -> Tensor:
            """eps of the answer: where the ODE leads at the chain's first step, by 60 steps of DDIM."""
            x = x_t.double()
            for i in range(60):
                here, there = (t.double() ** (1 - share) * (1 / 1000) ** share for share in (i / 60, (i + 1) / 60))
                x0, eps = denoise(x, here)
                x = expand(objective.path.alpha(there), x) * x0 + expand(objective.path.sigma(there), x) * eps
            found = x + off * expand(t, x)
            time = t.double()
            return (
                (x_t - expand(objective.path.alpha(time), x) * found) / expand(objective.path.sigma(time), x)
            ).float()

        nets = {"model": walked, "target": walked, "teacher": data.network(objective.path, "eps")}
        batch = Batch(
            {"image": x, "label": torch.zeros(len(x), dtype=torch.int64)}, torch.arange(len(x)), torch.arange(len(x))
        )
        return float(objective.loss("main", nets, batch, rng_of(len(x)), 0).total)

    losses = [loss(skip, 0.0) for skip in (100, 40, 10)]
    assert losses[0] > 3 * losses[1] > 9 * losses[2], losses
    assert loss(100, 3.0) > 2 * losses[0]


def test_a_student_answers_as_its_teacher_until_it_has_learned() -> None:
    args: dict[str, Any] = {
        "latent_channels": 3,
        "latent_size": 8,
        "hidden_size": 16,
        "depth": 1,
        "num_heads": 2,
        "num_classes": 3,
    }
    student, teacher = DiT(**args, numbers=("guidance",)), DiT(**args)
    student.init_weights()
    for zero in (student.final.linear, student.final.mod.linear):
        nn.init.normal_(zero.weight)
    teacher.load_state_dict({name: value for name, value in student.state_dict().items() if "number" not in name})
    x, t, label = torch.randn(2, 3, 8, 8), torch.tensor([0.2, 0.7]), {"label": torch.tensor([0, 2])}
    told = {**label, "guidance": torch.tensor([3.0, 8.0])}
    assert torch.equal(student(x, t, told), teacher(x, t, label))
    nn.init.normal_(student.number_embeds["guidance"].fc2.weight)  # type: ignore[union-attr,arg-type]
    assert not torch.equal(student(x, t, told), teacher(x, t, label))
    with pytest.raises(ValueError, match="no 'guidance' among the conditions"):
        student(x, t, label)
    with pytest.raises(UserError, match="numbers"):
        family("dit").formats["diffusers"].to_theirs(student.state_dict(), {**args, "numbers": ("guidance",)})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(LatentConsistency, skip=3), r"objective\.skip: got 3 of a chain of 1000"),
        (partial(LatentConsistency, scales=(5.0, 2.0)), "smaller scale first"),
        (partial(LatentConsistency, path="rectified_flow"), "expected a chain of steps"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], LatentConsistency], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
