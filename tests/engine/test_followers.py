"""Layers that learn beside gradients (contracts.Follower): their state is one worker's however the global batch is cut, and is resumed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from unittest import mock

import torch

from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import RunFolder
from nexus_scale.engine.checkpoint import newest
from nexus_scale.engine.settings import EngineSettings
from nexus_scale.generate.trained import make_draw
from nexus_scale.train import Place, train
from tests.distributed import run_ranks

STEPS, BATCH, WORKERS, ACCUMULATION = 8, 12, 2, 3
RECIPE = "gan/tiny_acgan_fashion_mnist"
"""A generator with batch norms, a critic with spectral norms; groups of two samples, so that a micro-batch of two is the least."""
SMOOTH = {"lr": 1e-3, "betas": [0.0, 0.9], "eps": 1e-3}
"""Divided by less, moments of a bias before a norm turn the last digit of its gradient into whole updates."""


def trained(root: Path, workers: int, micro_batch: int, steps: int = STEPS) -> None:
    changed = {
        "networks": {"critic": {"optimizer": SMOOTH}}, "optimizer": SMOOTH, "steps": steps, "global_batch": BATCH,
        "callbacks": {"checkpoint": {"every": steps}, "validate": None, "samples": None, "metrics": None},
    }  # fmt: skip
    recipe = recipes.load_recipe(RECIPE, changed, tiny=True)
    settings = {"workers": workers, "threads_per_worker": 1, "micro_batch": micro_batch}
    train(recipe, recipes.cluster_from(settings, "test"), Place(RunFolder(root), root / "data", root.parent), make_draw)


def sharded(rank: int, world_size: int, root: str) -> None:
    with mock.patch("nexus_scale.train.EngineSettings", partial(EngineSettings, whole_numel=0)):
        trained(Path(root), world_size, BATCH // world_size // ACCUMULATION)


def state(root: Path) -> dict[str, torch.Tensor]:
    checkpoint = newest(RunFolder(root).checkpoints)
    assert checkpoint is not None and checkpoint.step == STEPS
    return {name: checkpoint.tensor(name) for name in checkpoint.names}


def test_two_zero3_workers_with_three_micro_batches_each_have_the_state_of_one_worker_with_one(tmp_path: Path) -> None:
    trained(tmp_path / "alone", 0, BATCH)
    run_ranks(WORKERS, sharded, str(tmp_path / "together"), timeout=600)
    alone, together = state(tmp_path / "alone"), state(tmp_path / "together")
    buffers = [name for name in alone if name.endswith(".buffer")]
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in buffers} == {
        "left",
        "right",
        "running_mean",
        "running_var",
    }
    for name in (*buffers, *(name for name in alone if name.endswith(".fp32"))):
        torch.testing.assert_close(together[name], alone[name], rtol=1e-5, atol=1e-5, msg=name)
    moved = alone["model/norm.running_var.buffer"]
    assert not torch.allclose(moved, torch.ones_like(moved), rtol=0.01), "it followed"
