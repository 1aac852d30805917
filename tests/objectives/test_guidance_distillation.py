"""A student of guidance: what it is to learn is the teacher's guided prediction, by definition, at every scale that it is told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Batch, UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives.guidance_distillation import GuidanceDistillation
from nexus_scale.processes.guidance import guide_batched


def teacher(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    return x * t[:, None, None, None] + cond["text"].mean((1, 2))[:, None, None, None]


def test_the_guided_teacher_has_no_loss_and_is_what_samplers_see() -> None:
    objective = GuidanceDistillation(path="rectified_flow", conditions=("text",), input="image", scales=(1.0, 5.0))
    batch = Batch({"image": torch.randn(4, 3, 4, 4), "text": torch.randn(4, 3, 5)}, torch.arange(4), torch.arange(4))
    rng = ProgressRng(0, 0, "main", batch.positions, torch.device("cpu"))
    heard: list[Tensor] = []

    def student(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        heard.append(cond["guidance"])
        plain = {"text": cond["text"]}
        return objective.guided(teacher, x, t, plain, cond["guidance"])

    nets = {"model": student, "teacher": teacher}
    assert float(objective.loss("main", nets, batch, rng, 0).total) == pytest.approx(0, abs=1e-12)
    assert 1 <= float(heard[0].min()) < float(heard[0].max()) <= 5
    found = objective.validate(nets, batch, rng)
    assert float(found["loss"].max()) < 1e-10 and float(found["loss_plain"].min()) > 0
    assert heard[-1].tolist() == [4.0] * 4
    wrong = {"model": lambda x, t, cond: teacher(x, t, cond), "teacher": teacher}
    assert float(objective.loss("main", wrong, batch, rng, 0).total) > 1e-3

    x, t, cond = torch.randn(4, 3, 4, 4), torch.full((4,), 0.3), {"text": batch["text"]}
    null = objective.null_condition(cond)
    expected = guide_batched(lambda one: objective.predictor({"model": teacher}, one), cond, null, 4.0)(x, t)
    got = objective.predictor(nets, {**cond, "guidance": torch.full((4,), 4.0)})(x, t)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(UserError, match="smaller scale first"):
        GuidanceDistillation(scales=(4.0, 1.0))
