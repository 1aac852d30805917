"""Each kind of GAN learns the same in twenty steps whatever the engine, the workers and the accumulation: local, replicated, ZeRO-3."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale import main_job
from nexus_scale.config import recipe as recipes
from nexus_scale.config.recipe import Recipe, network_class
from nexus_scale.contracts import Batch, Callback, Engine, Progress, StepInfo, UserError
from nexus_scale.engine import EngineSettings, NetSpec, build_engine
from nexus_scale.engine.settings import WHOLE_NUMEL
from nexus_scale.train import make_objective
from nexus_scale.trainer import Trainer
from tests.distributed import run_ranks

STEPS, GLOBAL_BATCH, WORKERS = 20, 12, 2
SMOOTH = {"eps": 1e-3}
"""Divided by less, the moments of weights that hardly learn turn the last digit of their gradients into whole updates."""

GANS: dict[str, tuple[str, dict[str, Any]]] = {
    "R1, lazy, of classes": ("gan/tiny_fashion_mnist", {"objective": {"penalty_every": 3}}),
    "pairs, R1, R2": ("gan/mixture", {"objective": {"paired": True}}),
    "clipped weights": (
        "wgan/tiny_fashion_mnist",
        {"networks": {"critic": {"optimizer": {"clip_weights": 0.05, **SMOOTH}}}, "objective": {"critic_steps": 2}},
    ),
    "gradient penalty": ("wgan_gp/tiny_fashion_mnist", {"objective": {"critic_steps": 2}}),
}
ENGINES = {"local": ("local", WHOLE_NUMEL), "replicated": ("replicated", WHOLE_NUMEL), "ZeRO-3": ("deepspeed", 0)}
"""Each with the size up to which a network stays whole by itself."""
CELLS = [(name, *cell) for name in GANS for cell in (("replicated", 3), ("ZeRO-3", 1), ("ZeRO-3", 3))]


Rows = list[dict[str, tuple[float, float]]]
"""Of each step, (sum, count) of each figure on one rank."""
Learned = tuple[Rows, list[float]]


class Losses(Callback):
    def __init__(self) -> None:
        self.rows: Rows = []

    def after_reading(self, info: StepInfo) -> None:
        kept = ("loss", "grad_norm", "r1", "r2", "gp")
        self.rows.append({name: pair for name, pair in info.metrics.items() if name.rpartition("/")[2] in kept})


def recipe_of(name: str) -> Recipe:
    recipe, changed = GANS[name]
    rates = {"optimizer": {"lr": 1e-3, **SMOOTH}, "steps": STEPS, "global_batch": GLOBAL_BATCH}
    return recipes.load_recipe(recipe, recipes.merge(rates, changed), tiny=True)


def learned(name: str, engine_name: str, world_size: int, accumulation: int) -> Learned:
    """The figures of each step, and what all weights and averages are in the end."""
    recipe = recipe_of(name)
    objective = make_objective(recipe, None)
    kind, whole_numel = ENGINES[engine_name]
    specs = {}
    for net, entry in recipe.trained().items():
        cls, arguments = network_class(entry)
        sharded = net not in objective.needs_whole
        specs[net] = NetSpec(partial(cls, **arguments), entry.optimizer or recipe.optimizer, sharded=sharded)
    share = GLOBAL_BATCH // world_size
    settings = EngineSettings(
        engine=kind,
        steps=STEPS,
        seed=1,
        micro_batch=share // accumulation,
        accumulation=accumulation,
        whole_numel=whole_numel,
    )
    engine: Engine = build_engine(specs, recipe.averages(), settings)
    progress, losses = Progress(), Losses()
    mine = torch.arange(engine.rank * share, (engine.rank + 1) * share)
    shapes = {key: tuple(field["shape"]) for key, field in recipe.data.synthetic.fields.items()}  # type: ignore[union-attr]

    def next_batches() -> list[Batch]:
        draw = progress.draws
        progress.draws += 1
        torch_rng = torch.Generator().manual_seed(draw)
        fields = {
            key: torch.randint(10, (GLOBAL_BATCH,), generator=torch_rng)
            if key == "label"
            else torch.randn(GLOBAL_BATCH, *shape, generator=torch_rng)
            for key, shape in sorted(shapes.items())
        }
        return [Batch({k: v[part] for k, v in fields.items()}, part, part, draw) for part in mine.chunk(accumulation)]

    Trainer(
        steps=STEPS, seed=5, objective=objective, engine=engine, next_batches=next_batches, callbacks=[losses],
        progress=progress, stage=lambda stage: None,
    ).run()  # fmt: skip
    names = [*recipe.trained(), *recipe.averages()]
    return losses.rows, [float(x) for net in names for _, tensor in engine.parameters(net) for x in tensor.flatten()]


def worker(rank: int, world_size: int) -> list[Learned]:
    return [learned(name, engine, world_size, accumulation) for name, engine, accumulation in CELLS]


@pytest.fixture(scope="module")
def found() -> list[list[Learned]]:
    """Of each cell, what each rank found."""
    return list(map(list, zip(*run_ranks(WORKERS, worker, timeout=900), strict=True)))


@pytest.fixture(scope="module")
def alone() -> dict[str, Learned]:
    torch.set_num_threads(1)
    return {name: learned(name, "local", 1, 1) for name in GANS}


def means(ranks: list[Learned]) -> list[dict[str, float]]:
    """Of each step, each figure over all ranks."""
    steps = zip(*(rows for rows, _ in ranks), strict=True)
    return [
        {name: sum(row[name][0] for row in rows) / sum(row[name][1] for row in rows) for name in rows[0]}
        for rows in steps
    ]


def assert_same(ours: list[Learned], theirs: Learned) -> None:
    assert all(weights == ours[0][1] for _, weights in ours)
    for step, (row, known) in enumerate(zip(means(ours), means([theirs]), strict=True)):
        assert row == pytest.approx(known, rel=1e-5, abs=1e-6), step
    assert max(abs(a - b) for a, b in zip(ours[0][1], theirs[1], strict=True)) < 1e-5


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell[0]}; {cell[1]}, {cell[2]}")
def test_two_workers_learn_what_one_learns(
    cell: tuple[str, str, int], found: list[list[Learned]], alone: dict[str, Learned]
) -> None:
    assert_same(found[CELLS.index(cell)], alone[cell[0]])


@pytest.mark.parametrize("name", GANS)
def test_one_worker_may_accumulate(name: str, alone: dict[str, Learned]) -> None:
    assert_same([learned(name, "local", 1, 3)], alone[name])
    rows = means([alone[name]])
    assert len(rows) == STEPS and all(math.isfinite(value) for row in rows for value in row.values())
    assert rows[0] != rows[-1], "it learns"
    if name == "R1, lazy, of classes":
        assert [step for step, row in enumerate(rows) if "critic/r1" in row] == list(range(0, STEPS, 3))


def test_a_large_critic_with_a_penalty_is_refused_where_it_would_be_sharded(tmp_path: Path) -> None:
    """Before a worker starts, with what to change; the recipe's own, which each worker holds, is taken."""
    large = ["networks.critic.widths=[512,512,512,512]", "cluster.workers=2"]
    large += [f"cluster.paths.runs={tmp_path / 'runs'}", f"cluster.paths.data={tmp_path / 'data'}"]
    with pytest.raises(UserError, match=r"networks\.critic: .*networks\.critic\.engine: replicated") as refused:
        main_job.resolve("wgan_gp/cifar10", [*large, "networks.critic.engine=sharded"])
    assert refused.value.code == 2
    main_job.resolve("wgan_gp/cifar10", large)
