"""Every recipe trains through its `tiny:` block: three steps, saved, resumed after the second, compared to the bit."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import RunFolder
from nexus_scale.engine.checkpoint import newest
from nexus_scale.generate.trained import make_draw
from nexus_scale.train import Place, train
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


def families() -> list[str]:
    """One recipe of each family, for the runs with two workers."""
    return sorted({name.split("/")[0]: name for name in sorted(distinct(), reverse=True)}.values())


def run_once(name: str, root: Path, workers: int, precision: str = "float32") -> None:
    recipe = recipes.load_recipe(name, {"callbacks": CALLBACKS}, tiny=True)
    cluster = recipes.cluster_from({"workers": workers, "threads_per_worker": 1, "precision": precision}, "test")
    train(recipe, cluster, Place(RunFolder(root), root / "data", root.parent), make_draw)


def worker(rank: int, world_size: int, name: str, root: str, precision: str) -> None:
    run_once(name, Path(root), world_size, precision)


def tensors(root: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest(RunFolder(root).checkpoints)
    assert checkpoint is not None and checkpoint.step == 3
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
def test_three_steps_saved_and_resumed(name: str, tmp_path: Path, whole_run: Callable[[str], Path]) -> None:
    without_the_last(whole_run(name), tmp_path / "resumed")
    run_once(name, tmp_path / "resumed", workers=0)
    whole = tensors(whole_run(name))
    assert_same_bits(whole, tensors(tmp_path / "resumed"))
    rows = (tmp_path / "resumed" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 3, "a resumed run writes no row twice"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), [*((name, "float32") for name in families()), (families()[0], "bf16")])
def test_two_workers_resume_to_the_bit_and_agree_with_one(
    name: str, precision: str, tmp_path: Path, whole_run: Callable[[str], Path]
) -> None:
    run_ranks(2, worker, name, str(tmp_path / "whole"), precision, timeout=600)
    without_the_last(tmp_path / "whole", tmp_path / "resumed")
    run_ranks(2, worker, name, str(tmp_path / "resumed"), precision, timeout=600)
    whole = tensors(tmp_path / "whole")
    assert_same_bits(whole, tensors(tmp_path / "resumed"))
    if precision == "float32":
        alone = tensors(whole_run(name))
        assert alone.keys() == whole.keys()
        for key, value in alone.items():
            if key.endswith((".fp32", ".ema")):
                torch.testing.assert_close(whole[key], value, rtol=1e-3, atol=1e-5, msg=key)
