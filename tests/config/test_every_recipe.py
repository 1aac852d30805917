"""Every recipe trains through its `tiny:` block: three steps, saved; one of each kind is resumed after the second, compared to the bit;
one of each family by two ZeRO-3 workers, whose losses are one worker's for twenty steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch

from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import RunFolder
from nexus_scale.engine.checkpoint import newest
from nexus_scale.engine.settings import EngineSettings
from nexus_scale.generate.trained import make_draw
from nexus_scale.train import Place, make_objective, train
from tests.config.test_recipe import RECIPES
from tests.distributed import run_ranks

CALLBACKS = {
    "checkpoint": {"every": 1, "keep": 10},
    "validate": {"every": 3, "samples": 4},
    "samples": {"every": 3, "count": 2},
    "metrics": {"every": 1},
}


def distinct() -> dict[str, str]:
    """Recipe names by identity of their tiny form: recipes of one architecture share a run."""
    found: dict[str, str] = {}
    for name in RECIPES:
        found.setdefault(recipes.recipe_hash(recipes.load_recipe(name, tiny=True)), name)
    return {name: identity for identity, name in found.items()}


def kinds() -> list[str]:
    """One recipe of all whose networks and objective are of the same classes, with the same arguments given, whatever their sizes."""
    found: dict[str, str] = {}
    for name in sorted(distinct()):
        recipe = recipes.load_recipe(name, tiny=True)
        networks = sorted((role, network.name) for role, network in recipe.built().items())
        found.setdefault(repr((networks, recipe.objective.name, sorted(recipe.objective.arguments))), name)
    return list(found.values())


def families() -> list[str]:
    """One recipe of each family, for the runs with two workers."""
    return sorted({name.split("/")[0]: name for name in sorted(distinct(), reverse=True)}.values())


def run_once(name: str, root: Path) -> None:
    recipe = recipes.load_recipe(name, {"callbacks": CALLBACKS}, tiny=True)
    cluster = recipes.cluster_from({"workers": 0, "threads_per_worker": 1}, "test")
    train(recipe, cluster, Place(RunFolder(root), root / "data", root.parent), make_draw)


def tensors(root: Path, step: int = 3) -> dict[str, torch.Tensor]:
    checkpoint = newest(RunFolder(root).checkpoints)
    assert checkpoint is not None and checkpoint.step == step
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def without_the_last(root: Path, copy: Path) -> None:
    """A copy of a run as it was when it stopped after the second step."""
    shutil.copytree(root, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000003")


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 4
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", sorted(distinct()))
def test_three_steps_are_trained_and_saved(name: str, whole_run: Callable[[str], Path]) -> None:
    assert all(tensor.isfinite().all() for tensor in tensors(whole_run(name)).values())
    assert len((whole_run(name) / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("name", kinds())
def test_a_run_resumes_to_the_bit(name: str, tmp_path: Path, whole_run: Callable[[str], Path]) -> None:
    without_the_last(whole_run(name), tmp_path / "resumed")
    run_once(name, tmp_path / "resumed")
    assert_same_bits(tensors(whole_run(name)), tensors(tmp_path / "resumed"))
    rows = (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 3, "a resumed run writes no row twice"


STEPS, SAVED = 20, 10
# beside one of each family, the factorised codec whose books follow what they code
TRAINED = [*((name, "float32") for name in [*families(), "facodec/tiny_speech"]), (families()[0], "bf16")]
"""What two workers train, one after another in the same processes: starting them takes longer than a family."""


def run_longer(name: str, root: Path, workers: int, precision: str = "float32") -> None:
    callbacks = {"checkpoint": {"every": SAVED, "keep": 10}, "metrics": {"every": 1}, "validate": None, "samples": None}
    recipe = recipes.load_recipe(name, {"callbacks": callbacks, "steps": STEPS}, tiny=True)
    whole = {net: {"engine": "replicated"} for net in make_objective(recipe, None).needs_whole}
    recipe = recipes.recipe_from(recipes.merge(recipes.dump(recipe), {"networks": whole}), name)
    cluster = recipes.cluster_from({"workers": workers, "threads_per_worker": 1, "precision": precision}, "test")
    train(recipe, cluster, Place(RunFolder(root), root / "data", root.parent), make_draw)


def folder_of(root: Path, name: str, precision: str) -> Path:
    return root / f"{name.replace('/', '_')}_{precision}"


def all_of_them(rank: int, world_size: int, root: str) -> None:
    sharded = partial(EngineSettings, whole_numel=0)  # networks so small stay whole otherwise
    with mock.patch("nexus_scale.train.EngineSettings", sharded):
        for name, precision in TRAINED:
            run_longer(name, folder_of(Path(root), name, precision), world_size, precision)


def losses(root: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (root / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of the runs that two ZeRO-3 workers trained, at one stretch and resumed from the middle."""
    root = tmp_path_factory.mktemp("together")
    run_ranks(2, all_of_them, str(root / "whole"), timeout=1200)
    for name, precision in TRAINED:
        copy = folder_of(root / "resumed", name, precision)
        shutil.copytree(folder_of(root / "whole", name, precision), copy)
        shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:08d}")
    run_ranks(2, all_of_them, str(root / "resumed"), timeout=1200)
    return root / "whole", root / "resumed"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), TRAINED)
def test_two_workers_give_one_workers_curve_and_resume_to_the_bit(
    name: str, precision: str, tmp_path: Path, together: tuple[Path, Path]
) -> None:
    whole, resumed = (folder_of(root, name, precision) for root in together)
    assert_same_bits(tensors(whole, STEPS), tensors(resumed, STEPS))
    if precision == "float32":
        run_longer(name, tmp_path / "alone", workers=0)
        assert len(losses(whole)) == STEPS
        assert losses(whole) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
