"""The engine of one process: a plain PyTorch loop's numbers, state that resumes to the bit, the guard, the averages."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from nexus_scale.config.schema import AdamW, Average, Schedule
from nexus_scale.contracts import Batch, Engine, Loss, Network, Objective, Phase, Progress, UserError
from nexus_scale.engine import EngineSettings, NetSpec, build_engine, optim
from nexus_scale.engine.base import BaseEngine
from nexus_scale.engine.checkpoint import Checkpoint
from nexus_scale.engine.networks import build_network
from nexus_scale.engine.precision import measured_precision
from nexus_scale.trainer import Trainer
from tests.engine_networks import GLOBAL_BATCH, POISONS, OddNetwork, batch, build, copies, differing, load, save, train


class Fixed(Network):
    """A network that has nothing to learn."""

    def init_weights(self) -> None: ...


def read_without(
    left_out: str, fresh: dict[str, torch.Tensor], checkpoint: Checkpoint, name: str, start: int, stop: int
) -> torch.Tensor:
    """As a resume would read that had forgotten one kind of state."""
    return fresh[name][start:stop] if name.endswith(left_out) else checkpoint.read(name, start, stop)


def trained(engine: Engine) -> OddNetwork:
    module = engine.nets["model"]
    assert isinstance(module, OddNetwork)
    return module


KEPT = ("scale", "a.bias", "block.linear.bias")
"""Parameters of OddNetwork that do not decay."""


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_are_those_of_a_plain_loop(accumulation: int) -> None:
    engine = build("local", accumulation=accumulation)
    plain = build_network("model", NetSpec(OddNetwork), seed=3)
    schedule = Schedule(name="cosine", warmup_steps=2, final_ratio=0.1)
    learning = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [p for name, p in learning.items() if name not in (*KEPT, "sometimes")],
                "weight_decay": 0.1,
                "scale": 1.0,
            },
            {"params": [learning[name] for name in KEPT], "weight_decay": 0.0, "scale": 1.0},
            {"params": [learning["sometimes"]], "weight_decay": 0.1, "scale": 0.5},
        ],
        betas=(0.9, 0.95),
    )
    ema = {name: p.detach().clone() for name, p in plain.named_parameters()}
    for step in range(6):
        x, y = batch(step)
        for part, target in zip(x.chunk(accumulation), y.chunk(accumulation), strict=True):
            ((plain(part, extra=step % 2 == 0) - target).square().mean() / accumulation).backward()
        if learning["sometimes"].grad is None:
            learning["sometimes"].grad = torch.zeros(3)
        norm = nn.utils.clip_grad_norm_(list(learning.values()), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 3e-2 * optim.lr_factor(schedule, step, 12) * group["scale"]
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.9, (1 + step) / (10 + step))
        for name, p in plain.named_parameters():
            ema[name].lerp_(p.detach(), 1 - decay)
        said = train(engine, step, step + 1, accumulation)[0]
        assert said["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        assert said["skipped"] == 0.0
        assert said["lr"] == pytest.approx(3e-2 * optim.lr_factor(schedule, step, 12))
    for name, p in trained(engine).named_parameters():
        torch.testing.assert_close(p, dict(plain.named_parameters())[name], rtol=1e-5, atol=1e-6)
    for name, value in engine.parameters("ema"):
        torch.testing.assert_close(value, ema[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_resume_is_exact_to_the_bit(tmp_path: Path, precision: str) -> None:
    engine = build("local", precision=precision)
    train(engine, 0, 4)
    save(engine, tmp_path, 4)
    train(engine, 4, 8)
    other = build("local", precision=precision, seed=7)
    assert differing(copies(engine), copies(other))
    load(other, tmp_path)
    train(other, 4, 8)
    assert differing(copies(engine), copies(other)) == []
    # Without one piece of state it is not: the test can fail.
    for left_out in (".exp_avg", ".exp_avg_sq", ".optimizer_steps", ".fp32"):
        maimed = build("local", precision=precision)
        checkpoint = load(maimed, tmp_path)
        fresh = {name: shard.local.clone() for name, shard in build("local", precision=precision).shards().items()}

        maimed.load_shards(partial(read_without, left_out, fresh, checkpoint))
        train(maimed, 4, 8)
        assert differing(copies(engine), copies(maimed)), left_out


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_average_computes_and_trained_weights_come_back(precision: str) -> None:
    engine = build("local", precision=precision)
    train(engine, 0, 4)
    before, x = copies(engine), batch(50)[0]
    average = dict(engine.parameters("ema"))
    with engine.weights("ema"):
        inside = engine.nets["model"](x)
        assert not engine.nets["model"].training
    reference = OddNetwork()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(average[name])
    torch.testing.assert_close(
        inside, reference.eval()(x).detach(), rtol=0, atol=1e-6 if precision == "float32" else 0.05
    )
    assert not inside.requires_grad
    assert inside.dtype == torch.float32
    assert differing(before, copies(engine)) == []
    assert engine.nets["model"].training
    assert train(engine, 4, 5)[0]["skipped"] == 0.0


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("poison", POISONS)
def test_what_is_not_finite_leaves_everything_as_it_was(precision: str, poison: str) -> None:
    engine = build("local", precision=precision)
    train(engine, 0, 2)
    before = copies(engine)
    assert train(engine, 2, 3, poison=poison)[0]["skipped"] == 1.0
    changed = differing(before, copies(engine))
    assert all(name.endswith((".ema", ".buffer")) for name in changed), changed
    said = train(engine, 3, 4)[0]
    assert said["skipped"] == 0.0
    reference = build("local", precision=precision)
    assert said["lr"] == train(reference, 0, 4)[3]["lr"], "the schedule is a function of the step, skipped or not"
    assert int(engine.shards()["model.optimizer_steps"].local) == 3


def test_the_guard_changes_no_bit_of_a_sound_loss() -> None:
    loss = torch.randn(1000, dtype=torch.float32, requires_grad=True) * 1e3
    guarded = BaseEngine._guarded(loss)
    assert torch.equal(guarded, loss)
    (gradient,) = torch.autograd.grad(guarded.sum(), loss)
    assert torch.equal(gradient, torch.ones_like(loss))


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain, saving = build("local"), build("local", activation_checkpointing=True)
    calls = 0
    forward = saving.nets["model"].block.linear.forward

    def counting(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        result: torch.Tensor = forward(x)
        return result

    saving.nets["model"].block.linear.forward = counting
    train(plain, 0, 3)
    train(saving, 0, 3)
    assert calls == 6  # each step computes the block twice
    assert differing(copies(plain), copies(saving)) == []


def test_initial_weights_are_a_function_of_seed_and_name_and_leave_the_generator_alone() -> None:
    torch.manual_seed(123)
    expected = torch.rand(1)
    torch.manual_seed(123)
    one = build("local", seed=1)
    assert torch.equal(torch.rand(1), expected)
    two, other = build("local", seed=1), build("local", seed=2)
    assert differing(copies(one), copies(two)) == []
    assert differing(copies(one), copies(other))
    model, teacher = (dict(one.parameters(name)) for name in ("model", "teacher"))
    assert not torch.equal(model["b.bias"], teacher["b.bias"])


def test_only_the_network_in_training_learns() -> None:
    spec = AdamW()
    engine = build_engine(
        {"g": NetSpec(OddNetwork, spec), "d": NetSpec(OddNetwork, spec)},
        {},
        EngineSettings(engine="local", steps=4, micro_batch=GLOBAL_BATCH),
    )
    with engine.training("g"):
        assert not any(p.requires_grad for p in engine.nets["d"].parameters())
        assert engine.nets["g"].a.weight.requires_grad
    assert engine.nets["d"].a.weight.requires_grad
    assert not engine.nets["d"].fixed.requires_grad


@pytest.mark.parametrize(
    ("nets", "averages", "message"),
    [
        ({"model": NetSpec(OddNetwork)}, {}, "'model' is trained but has no optimizer"),
        (
            {"model": NetSpec(OddNetwork, AdamW())},
            {"ema": Average(average_of="mdel")},
            "not a trained network; trained networks: \\['model'\\]",
        ),
        ({"model": NetSpec(Fixed, AdamW())}, {}, "none of its parameters requires a gradient"),
    ],
)
def test_roles_that_cannot_be_are_refused_by_name(
    nets: dict[str, NetSpec], averages: dict[str, Average], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_engine(nets, averages, EngineSettings(engine="local"))


def test_precision_is_measured_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        chosen = measured_precision("cpu")
    assert chosen in ("float32", "bf16")
    assert f"precision auto: {chosen}" in caplog.text


def test_an_objective_is_handed_its_batch_on_the_device_of_the_engine() -> None:
    class Looks(Objective):
        given: list[Batch] = []

        def phases(self, step: int) -> list[Phase]:
            return [Phase("main", "model")]

        def loss(self, phase: str, nets: Any, batch: Batch, rng: Any, step: int) -> Loss:
            self.given.append(batch)
            return Loss(torch.zeros(()))

    engine: Any = SimpleNamespace(
        device=torch.device("meta"), nets={}, training=lambda name: nullcontext(), backward=lambda name, total, last: None,
        step=lambda name, step, last: {}, update_averages=lambda step: None,
        sum_over_ranks=lambda value: value,
    )  # fmt: skip
    numbers = torch.arange(2)
    stored = Batch(
        {"latent": torch.ones(2, 4, dtype=torch.float16), "label": numbers.to(torch.int16)}, numbers, numbers, 0
    )
    objective: Any = Looks()
    Trainer(
        steps=1, seed=0, objective=objective, engine=engine, next_batches=lambda: [stored], callbacks=(),
        progress=Progress(), stage=lambda name: None,
    ).run()  # fmt: skip
    (given,) = objective.given
    assert {name: (value.device.type, value.dtype) for name, value in given.fields.items()} == {
        "latent": ("meta", torch.float32), "label": ("meta", torch.int64),
    }  # fmt: skip
    assert given.positions.device.type == "cpu", "what keys randomness stays with the host"
