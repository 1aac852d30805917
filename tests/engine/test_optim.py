"""Schedules have their closed forms, tags are read, optimizers are torch's to the bit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from nexus_scale.config.schema import SGD, Adam, AdamW, RMSprop, Schedule
from nexus_scale.engine import optim
from nexus_scale.kernels import adam, choice
from nexus_scale.kernels.adam import clip_weights, made_ready


def factors(schedule: Schedule, steps: int = 100) -> list[float]:
    return [optim.lr_factor(schedule, step, steps) for step in range(steps)]


def test_warmup_rises_linearly_and_reaches_the_peak() -> None:
    values = factors(Schedule(name="constant", warmup_steps=4))
    assert values[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert set(values[4:]) == {1.0}


def test_cosine_and_linear_have_their_closed_forms() -> None:
    cosine = factors(Schedule(name="cosine", warmup_steps=20, final_ratio=0.1))
    linear = factors(Schedule(name="linear", warmup_steps=20, final_ratio=0.1))
    assert cosine[20] == linear[20] == 1.0
    assert cosine[60] == pytest.approx(0.55)
    assert linear[60] == pytest.approx(0.55)
    assert cosine[40] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert linear[40] == pytest.approx(0.775)
    # The end of the run itself would have the final ratio, and later steps stay there.
    for name in ("cosine", "linear"):
        assert optim.lr_factor(Schedule(name=name, warmup_steps=20, final_ratio=0.1), 100, 100) == pytest.approx(0.1)
        assert optim.lr_factor(Schedule(name=name, warmup_steps=20, final_ratio=0.1), 500, 100) == pytest.approx(0.1)


def test_warmup_stable_decay_is_flat_then_falls() -> None:
    values = factors(Schedule(name="wsd", warmup_steps=10, final_ratio=0.2, decay_steps=20))
    assert values[9:81] == [1.0] * 72
    assert values[90] == pytest.approx(0.6)
    assert values[99] == pytest.approx(1 - 0.8 * 19 / 20)
    assert optim.lr_factor(Schedule(name="wsd", warmup_steps=0, final_ratio=0.0), 95, 100) == pytest.approx(
        0.5
    )  # a tenth of the run by default


def test_parameters_are_told_apart_by_their_tags() -> None:
    weight, bias, slow = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    bias.nexus_decay = False
    slow.nexus_lr_multiplier = 0.1
    assert optim.tags_of([weight, bias, slow], AdamW(weight_decay=0.3)) == ([0.3, 0.0, 0.3], [1.0, 1.0, 0.1])


KINDS: dict[str, tuple[Any, type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (AdamW(betas=(0.9, 0.95), weight_decay=0.1), torch.optim.AdamW, {"betas": (0.9, 0.95), "fused": True}),
    "adam": (Adam(betas=(0.5, 0.9), weight_decay=0.1), torch.optim.Adam, {"betas": (0.5, 0.9), "fused": True}),
    "rmsprop": (RMSprop(weight_decay=0.1), torch.optim.RMSprop, {}),
    "rmsprop with momentum": (RMSprop(alpha=0.9, momentum=0.5), torch.optim.RMSprop, {"alpha": 0.9, "momentum": 0.5}),
    "sgd": (SGD(), torch.optim.SGD, {}),
    "sgd with momentum": (
        SGD(momentum=0.9, nesterov=True, weight_decay=0.1), torch.optim.SGD, {"momentum": 0.9, "nesterov": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_on_a_cpu_a_step_has_torchs_bits(kind: str) -> None:
    """Those of its own optimizers, whose lists are made anew in every step; and they keep what they say they keep."""
    choice.forget()
    spec, reference_class, arguments = KINDS[kind]
    start = [torch.linspace(-1, 1, 15).view(5, 3), torch.linspace(0, 2, 700), torch.ones(1)]
    ours: list[Any] = [nn.Parameter(tensor.clone()) for tensor in start]
    theirs = [nn.Parameter(tensor.clone()) for tensor in start]
    decays = [spec.weight_decay, spec.weight_decay, 0.0]
    update: Any = optim.make_update(spec, ours, weight_decays=decays, lr_multipliers=[1.0, 0.5, 1.0])
    assert all(torch.equal(a, b) for a, b in zip(ours, start, strict=True)), "room for moments moves nothing"
    assert all(not value.any() for values in update.moments.values() for value in values)
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(theirs, decays, strict=True)]
    reference = reference_class(groups, lr=0.0, **{"foreach": None if "fused" in arguments else True, **arguments})
    generator = torch.Generator().manual_seed(0)
    for number in range(6):
        if number == 4:
            update.steps = 9
            for p in theirs:
                if isinstance(reference.state[p].get("step"), torch.Tensor):
                    reference.state[p]["step"].fill_(9)
        gradients = [torch.randn(a.shape, generator=generator) for a in ours]
        for group, b, gradient, scale in zip(reference.param_groups, theirs, gradients, (1.0, 0.5, 1.0), strict=True):
            group["lr"], b.grad = 0.01 * (number + 1) * scale, gradient.clone()
        update(gradients, lr=0.01 * (number + 1))
        reference.step()
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert torch.equal(a, b) and a.grad is None
            kept = {k: v for k, v in reference.state[b].items() if isinstance(v, torch.Tensor) and v.shape == b.shape}
            assert set(kept) == set(update.moments), "nothing that a checkpoint would leave out"
            assert all(torch.equal(update.moments[name][i], value) for name, value in kept.items())
    assert update.steps == 11
    assert not torch.equal(ours[0].detach(), start[0])


def test_weights_are_clipped_in_place() -> None:
    weights = [torch.tensor([-2.0, 0.005, 0.5]), torch.tensor([0.01])]
    clip_weights(weights, 0.01)
    assert torch.equal(torch.cat(weights), torch.tensor([-0.01, 0.005, 0.01, 0.01]))


def test_an_adam_without_a_fused_kernel_steps_as_it_is() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], foreach=True)
    assert made_ready(optimizer) == optimizer.step


class FusedAdam(torch.optim.Optimizer):
    """In the place of Apex's: it counts steps per group, makes its state in its first step, and writes into what it is given."""

    def __init__(self, groups: list[dict[str, Any]], *, adam_w_mode: bool, **given: Any):
        super().__init__(groups, given)

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                for name in ("exp_avg", "exp_avg_sq"):
                    self.state[p].setdefault(name, torch.zeros_like(p)).add_(p.grad)
                p.data.sub_(group["lr"] * p.grad)


def test_apex_steps_with_clipping_skips_averages_and_a_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        adam, "_adam", lambda groups, decoupled, kernel, **given: FusedAdam(groups, adam_w_mode=decoupled, **given)
    )
    masters = [torch.ones(3), torch.ones(2)]
    copies = [master.bfloat16() for master in masters]
    tags = {"weight_decays": [0.1, 0.0], "lr_multipliers": [1.0, 0.5]}
    update = adam.TorchUpdate(AdamW(), masters, **tags, copies=copies, kernel="apex")
    averages = [master.clone() for master in masters]
    update.follow([averages])
    for factor in (0.5, math.nan):
        gradients = [torch.ones(3, dtype=torch.bfloat16), torch.ones(2, dtype=torch.bfloat16)]
        update(gradients, lr=0.5, factor=torch.tensor(factor), decays=[0.5])
    assert update.steps == 1
    assert [float(value[0]) for value in (*masters, *copies)] == [0.75, 0.875, 0.75, 0.875]
    assert [float(value[0]) for value in averages] == [0.8125, 0.90625], "they moved twice"
    assert [float(value[0]) for value in update.moments["exp_avg"]] == [0.5, 0.5]
    update.steps = 7
    assert update.steps == 7 and {group["step"] for group in update.optimizer.param_groups} == {7}
