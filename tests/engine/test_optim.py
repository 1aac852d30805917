"""Schedules have their closed forms, tags make groups, Adam is torch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nexus_scale.config.schema import SGD, Adam, AdamW, RMSprop, Schedule
from nexus_scale.engine import optim
from nexus_scale.kernels.adam import made_ready, make_adam


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


def test_parameters_group_by_their_tags() -> None:
    weight, bias, slow = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    bias.nexus_decay = False
    slow.nexus_lr_multiplier = 0.1
    groups = optim.param_groups([weight, bias, slow], AdamW(weight_decay=0.3))
    assert [(g["weight_decay"], g["lr_multiplier"], len(g["params"])) for g in groups] == [
        (0.3, 1.0, 1),
        (0.0, 1.0, 1),
        (0.3, 0.1, 1),
    ]
    assert groups[1]["params"][0] is bias


def test_adam_is_torchs() -> None:
    torch.manual_seed(0)
    start = [torch.randn(5, 3), torch.randn(7)]
    spec = AdamW(lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ours = [nn.Parameter(tensor.clone()) for tensor in start]
    theirs = [nn.Parameter(tensor.clone()) for tensor in start]
    optimizer = optim.make_optimizer(optim.param_groups(ours, spec), spec)
    optim.allocate_state(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(ours, start, strict=True))  # making room for the state moves nothing
    reference = torch.optim.AdamW(theirs, lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        optimizer.step()
        reference.step()
    assert optim.get_steps(optimizer) == 5
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    optim.set_steps(optimizer, 2)
    assert optim.get_steps(optimizer) == 2


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_made_ready_gives_torchs_bits(decoupled: bool) -> None:
    def made() -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
        parameters = [nn.Parameter(torch.linspace(-1, 1, n)) for n in (5, 300, 1)]
        groups = [{"params": parameters[:2], "weight_decay": 0.1}, {"params": parameters[2:], "weight_decay": 0.0}]
        optimizer = make_adam(groups, kernel="torch_fused", lr=0.0, betas=(0.9, 0.95), decoupled=decoupled)
        optim.allocate_state(optimizer)
        return parameters, optimizer

    (ours, our_adam), (theirs, their_adam) = made(), made()
    ready = made_ready(our_adam)
    for number in range(6):
        if number == 4:
            for adam in (our_adam, their_adam):
                optim.set_steps(adam, 9)
        for group, other in zip(our_adam.param_groups, their_adam.param_groups, strict=True):
            group["lr"] = other["lr"] = 0.01 * (number + 1)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(number))
            b.grad = a.grad.clone()
        ready()
        their_adam.step()
        assert optim.get_steps(our_adam) == optim.get_steps(their_adam)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
            assert all(
                torch.equal(our_adam.state[a][key], their_adam.state[b][key]) for key in ("exp_avg", "exp_avg_sq")
            )
    assert optim.get_steps(our_adam) == 11
    assert not torch.equal(ours[0].detach(), torch.linspace(-1, 1, 5))


KINDS = {
    "adam": (Adam(betas=(0.5, 0.9), weight_decay=0.1), torch.optim.Adam, {"betas": (0.5, 0.9)}),
    "rmsprop": (RMSprop(weight_decay=0.1), torch.optim.RMSprop, {}),
    "rmsprop with momentum": (RMSprop(alpha=0.9, momentum=0.5), torch.optim.RMSprop, {"alpha": 0.9, "momentum": 0.5}),
    "sgd": (SGD(), torch.optim.SGD, {}),
    "sgd with momentum": (
        SGD(momentum=0.9, nesterov=True, weight_decay=0.1), torch.optim.SGD, {"momentum": 0.9, "nesterov": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_other_optimizers_are_torchs_and_keep_what_they_say_they_keep(kind: str) -> None:
    spec, reference_class, arguments = KINDS[kind]
    start = [torch.linspace(-1, 1, 15).view(5, 3), torch.linspace(0, 2, 7)]
    ours = [nn.Parameter(tensor.clone()) for tensor in start]
    theirs = [nn.Parameter(tensor.clone()) for tensor in start]
    optimizer = optim.make_optimizer(optim.param_groups(ours, spec), spec)
    optim.allocate_state(optimizer)
    step = made_ready(optimizer)
    reference = reference_class(theirs, lr=0.02, weight_decay=spec.weight_decay, foreach=False, **arguments)
    kept = optim.moments_of(spec)
    assert all(not optimizer.state[p][key].any() for p in ours for key in kept), "decay leaves nothing in moments"
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        step()
        reference.step()
    assert optim.get_steps(optimizer) == 5
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        held = {
            key
            for key, value in optimizer.state[a].items()
            if isinstance(value, torch.Tensor) and value.shape == a.shape
        }
        assert held == set(kept), "nothing that a checkpoint would leave out"
    optim.set_steps(optimizer, 2)
    assert optim.get_steps(optimizer) == 2


def test_weights_are_clipped_in_place() -> None:
    weights = [torch.tensor([-2.0, 0.005, 0.5]), torch.tensor([0.01])]
    optim.clip_weights(weights, 0.01)
    assert torch.equal(torch.cat(weights), torch.tensor([-0.01, 0.005, 0.01, 0.01]))


def test_an_adam_without_a_fused_kernel_steps_as_it_is() -> None:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], foreach=True)
    assert made_ready(optimizer) == optimizer.step
