"""Gradients that an objective takes itself (a balancer's, R1, a gradient penalty) are the same under every engine and accumulation."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale import main_job, train
from nexus_scale.config import recipe as recipes
from nexus_scale.config.schema import AdamW
from nexus_scale.contracts import (
    Batch,
    Callback,
    Engine,
    Loss,
    Nets,
    Network,
    Objective,
    Phase,
    Progress,
    Rng,
    StepInfo,
    SumOverRanks,
    UserError,
)
from nexus_scale.dry_run import describe
from nexus_scale.engine import EngineSettings, NetSpec, build_engine
from nexus_scale.engine.settings import WHOLE_NUMEL
from nexus_scale.objectives.codec import Codec
from nexus_scale.objectives.gradient_balance import Balancer
from nexus_scale.trainer import Trainer
from tests.distributed import run_ranks
from tests.training_ranks import Ranks, rows

STEPS, GLOBAL_BATCH = 3, 8


class Block(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.conv, self.linear = nn.Conv1d(1, 1, 3, padding=1), nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        along = self.conv(x[:, None])[:, 0]
        return x + F.silu(self.linear(along))  # smooth: a penalty's gradient is a second derivative


class Net(Network):
    def __init__(self, num_inputs: int, num_outputs: int):
        super().__init__()
        self.first, self.last = nn.Linear(num_inputs, 8), nn.Linear(8, num_outputs)
        self.middle = nn.ModuleList(Block(8) for _ in range(2))

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.middle)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.middle:
            x = block(x)
        return self.last(x)


def generator() -> Net:
    return Net(4, 6)


def critic() -> Net:
    return Net(6, 1)


class Adversarial(Objective):
    """A generator whose two losses are balanced at its output, and a critic with R1 and a gradient penalty where it is `penalised`."""

    needs, fields = ("model", "critic"), ("x",)

    def __init__(self, *, penalised: bool):
        self.penalised = penalised
        self.needs_whole = ("critic",) if penalised else ()
        self.balancer = Balancer({"distance": 1.0, "adversarial": 2.0}, decay=0.5)

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("generator", trains="model"), Phase("critic", trains="critic", draws=False))

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        x = batch["x"]
        if phase == "generator":
            x_hat = nets["model"](rng.normal("z", (4,)))
            losses = {"distance": (x_hat - x).square().mean(), "adversarial": F.softplus(-nets["critic"](x_hat)).mean()}
            (own,) = torch.autograd.grad(
                losses["adversarial"], x_hat, retain_graph=True
            )  # of its own size, not balanced
            return Loss((x_hat * (self.balancer.gradient(losses, x_hat) + own)).sum())
        with torch.no_grad():
            x_hat = nets["model"](rng.normal("z", (4,)))
        total = F.softplus(-nets["critic"](x)).mean() + F.softplus(nets["critic"](x_hat)).mean()
        if self.penalised:
            r1 = self._gradient(nets["critic"], x).square().sum(1).mean()
            mixed = x_hat + rng.uniform("mix", (1,)) * (x - x_hat)
            total = total + 0.5 * r1 + (self._gradient(nets["critic"], mixed).norm(dim=1) - 1).square().mean()
        return Loss(total, {"loss": total.detach()})

    @staticmethod
    def _gradient(network: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        return gradient

    def after_phase(
        self, phase: str, nets: Nets, sum_over_ranks: SumOverRanks, rng: Rng, step: int
    ) -> Mapping[str, Tensor]:
        if phase == "generator":
            self.balancer.follow(sum_over_ranks)
        return {}


class Norms(Callback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def after_step(self, info: StepInfo) -> None:
        self.found += [float(info.metrics[f"{phase}/grad_norm"][0]) for phase in ("generator", "critic")]


def norms_of(
    engine_name: str, world_size: int, accumulation: int, recomputed: bool, penalised: bool | None = None, **more: Any
) -> list[float]:
    """Gradient norms before clipping of both phases, step by step, and the norm of all weights at the end."""
    kind, sharded, whole_numel = {
        "local": ("local", True, WHOLE_NUMEL),
        "replicated": ("replicated", True, WHOLE_NUMEL),
        "whole": ("deepspeed", True, WHOLE_NUMEL),  # small, so whole by itself
        "critic whole": ("deepspeed", False, 0),  # beside a generator that is sharded
        "sharded": ("deepspeed", True, 0),
    }[engine_name]
    optimizer = AdamW(lr=1e-2, betas=(0.5, 0.9), eps=1e-3, clip_grad_norm=1.0)
    specs = {"model": NetSpec(generator, optimizer), "critic": NetSpec(critic, optimizer, sharded=sharded)}
    settings = EngineSettings(
        engine=kind, steps=STEPS, seed=1, micro_batch=GLOBAL_BATCH // world_size // accumulation,
        accumulation=accumulation, activation_checkpointing=recomputed, whole_numel=whole_numel, **more,
    )  # fmt: skip
    engine: Engine = build_engine(specs, {}, settings)
    objective = Adversarial(penalised=engine_name != "sharded" if penalised is None else penalised)
    progress, norms = Progress(), Norms()
    share = GLOBAL_BATCH // world_size
    mine = torch.arange(engine.rank * share, (engine.rank + 1) * share)

    def next_batches() -> list[Batch]:
        draw = progress.draws
        progress.draws += 1
        x = torch.randn(GLOBAL_BATCH, 6, generator=torch.Generator().manual_seed(draw))
        return [Batch({"x": x[part]}, part, part, draw) for part in mine.chunk(accumulation)]

    Trainer(
        steps=STEPS, seed=5, objective=objective, engine=engine, next_batches=next_batches, callbacks=[norms],
        progress=progress, stage=lambda name: None,
    ).run()  # fmt: skip
    weights = [tensor.flatten() for name in ("model", "critic") for _, tensor in engine.parameters(name)]
    return [*norms.found, float(torch.cat(weights).norm())]


CELLS = list(itertools.product(("replicated", "whole", "critic whole", "sharded"), (1, 2, 4), (False, True)))
BF16 = ("replicated", "whole", "critic whole")


def worker(rank: int, world_size: int) -> dict[str, Any]:
    with pytest.raises(UserError, match=r"set networks\.critic\.engine: replicated") as refused:
        norms_of("sharded", world_size, 1, False, penalised=True)
    return {
        "cells": [norms_of(name, world_size, count, recomputed) for name, count, recomputed in CELLS],
        "bf16": [norms_of(name, world_size, 2, False, precision="bf16") for name in BF16],
        "offloaded": norms_of("whole", world_size, 2, False, offload="cpu"),
        "born sharded": norms_of("critic whole", world_size, 2, False, partition_at_birth=1),
        "code": refused.value.code,
    }


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    both = run_ranks(2, worker)
    assert both[0] == both[1] and both[0]["code"] == 2
    return dict(both[0])


@pytest.fixture(scope="module")
def alone() -> dict[bool, list[float]]:
    torch.set_num_threads(1)
    return {penalised: norms_of("local", 1, 1, False, penalised=penalised) for penalised in (True, False)}


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell[0]}, {cell[1]}, {'recomputed' * cell[2]}")
def test_they_are_those_of_one_process_and_one_backward(
    cell: tuple[str, int, bool], found: dict[str, Any], alone: dict[bool, list[float]]
) -> None:
    assert found["cells"][CELLS.index(cell)] == pytest.approx(alone[cell[0] != "sharded"], rel=1e-5)


@pytest.mark.parametrize("accumulation", [2, 4])
def test_one_process_may_accumulate_and_recompute(accumulation: int, alone: dict[bool, list[float]]) -> None:
    assert norms_of("local", 1, accumulation, True) == pytest.approx(alone[True], rel=1e-5)


def test_in_bf16_and_with_optimizer_state_in_host_memory(found: dict[str, Any], alone: dict[bool, list[float]]) -> None:
    for name, norms in zip(BF16, found["bf16"], strict=True):
        assert norms == pytest.approx(found["bf16"][0], rel=5e-3), name
    assert found["bf16"][0] == pytest.approx(alone[True], rel=5e-2)
    for how in ("offloaded", "born sharded"):
        assert found[how] == pytest.approx(alone[True], rel=1e-5), how


# ------------------------------------------------------------------------------------------------- before workers start


CODEC = "codec/encodec_24khz"


def test_a_large_network_that_is_needed_whole_is_refused_before_workers_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its 14.9 M parameters would be sharded by ZeRO-3; its small form is whole by itself, and so is a replicated one."""
    monkeypatch.setattr(Codec, "needs_whole", ("model",))
    short = [f"networks.{name}.segment_seconds=0.1" for name in ("model", "discriminator")]
    paths = [f"cluster.paths.{name}={tmp_path / name}" for name in ("runs", "data")]
    roots = [*paths, "cluster.workers=2", *short]
    with pytest.raises(
        UserError, match=r"networks\.model: .*14,\d{3},\d{3} parameters.*networks\.model\.engine: replicated"
    ) as refused:
        main_job.resolve(CODEC, roots)
    assert refused.value.code == 2
    kept = main_job.resolve(CODEC, [*roots, "networks.model.engine=replicated"])
    for others in (["cluster.engine=replicated"], ["cluster.workers=0"]):
        main_job.resolve(CODEC, [*roots, *others])
    main_job.resolve(CODEC, [*paths, "cluster.workers=2"], tiny=True)
    monkeypatch.setattr(Codec, "needs_whole", ())
    there = main_job.resolve(CODEC, roots)
    assert recipes.identity(kept.recipe) == recipes.identity(there.recipe), "where weights lie is no part of the curve"
    sizes = [describe(target).partition("memory per rank, whole copies")[2].split()[0] for target in (kept, there)]
    assert float(sizes[0]) > float(sizes[1]), "a whole copy of it, too"


@pytest.mark.parametrize("how", ["input", "parameter"])
def test_what_an_objective_does_not_declare_is_seen_in_the_rehearsal(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipes.load_recipe(CODEC, tiny=True)
    dataset = train.open_data(recipe, tmp_path)
    objective = train.make_objective(recipe, None)
    assert train.rehearse(recipe, objective, dataset) == set(), "a balancer goes through networks once"
    loss = objective.loss

    def penalised(phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        total = loss(phase, nets, batch, rng, step).total
        if phase == "discriminator":
            x = batch["audio"].requires_grad_()
            logits = sum(scale.logits.sum() for scale in nets["discriminator"](x))
            of = x if how == "input" else next(nets["discriminator"].parameters())
            (gradient,) = torch.autograd.grad(logits, of, create_graph=how == "input")
            total = total + gradient.square().sum()
        return Loss(total)

    monkeypatch.setattr(objective, "loss", penalised)
    assert train.rehearse(recipe, objective, dataset) == {"discriminator"}


# ------------------------------------------------------------------------------------------------- a recipe


def test_a_codec_in_micro_batches_under_zero3_learns_what_replicated_ranks_learn(tmp_path: Path) -> None:
    """The balancer's gradients go through the discriminator; they were once divided by the accumulation."""
    found = {}
    for engine in ("deepspeed", "replicated"):
        changed = {"steps": 5, "callbacks": {"checkpoint": None}}
        ranks = Ranks(tmp_path / engine, 2, recipe=CODEC, engine=engine, micro_batch=1, **changed)
        found[engine] = [
            {name: value for name, value in row.items() if name.endswith("grad_norm")}
            for row in rows(ranks.done().root)
        ]
    assert len(found["deepspeed"]) == 5 and {"grad_norm", "generator/grad_norm"} <= {
        k for r in found["deepspeed"] for k in r
    }
    for one, other in zip(found["deepspeed"], found["replicated"], strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-7)
