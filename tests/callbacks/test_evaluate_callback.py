"""What a run draws is evaluated while it trains: by several ranks as by one; copies of training data, and a run that overfits, are told."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipelines.class_images import LabelledImages, write_splits
from nexus_scale.callbacks.evaluate import Evaluate
from nexus_scale.callbacks.made import check_callbacks
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import Batch, Progress, RunFolder, UserError
from nexus_scale.io import incidents
from nexus_scale.io.rows import read_rows
from nexus_scale.metrics.nearness import memory_of
from nexus_scale.report.page import write_report
from nexus_scale.run.resume import measured
from nexus_scale.train import make_objective
from tests.callbacks.test_monitor import Ranks, at
from tests.distributed import run_ranks

COUNT = 26


def pictures(count: int, seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3))
    return coarse.repeat(4, axis=1).repeat(4, axis=2).astype(np.uint8)


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluated") / "data"
    splits = {
        name: LabelledImages(pictures(n, seed), np.zeros(n, np.int64))
        for name, n, seed in (("train", 60, 0), ("heldout", 40, 1))
    }
    write_splits(root / "blobs", splits, ("blob",), licence="none", attribution="made up")
    return root


class Draws:
    """In place of what draws: pictures that a test sets, the same for any number of ranks."""

    def __init__(self, shown: np.ndarray):
        self.shown = torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 127.5 - 1

    def own(self, engine: Any, count: int, anew: bool = False) -> Iterator[tuple[Batch, Tensor]]:
        for begin in range(0, count, 5):
            whole = min(5, count - begin)
            each = -(-whole // engine.world_size)
            own = begin + torch.arange(engine.rank * each, (engine.rank + 1) * each).clamp(max=whole - 1)
            yield Batch({"image": self.shown[own]}, own, own), self.shown[own]

    def decoded(self, samples: Tensor) -> Tensor:
        return samples


def callback(run: Path, root: Path, shown: np.ndarray, **given: Any) -> Evaluate:
    arguments: dict[str, Any] = {
        "real": "blobs/heldout/images",
        "train": "blobs/train/images",
        "every": 10,
        "samples": COUNT,
        **given,
    }
    return Evaluate(
        draw=Draws(shown), data_root=root, run=RunFolder(run), stage=lambda name: None, context={}, **arguments
    )


def row_of(rank: int, world_size: int, run: Path, root: Path) -> dict[str, Any]:
    engine: Any = Ranks(rank, world_size)
    own = callback(run, root, pictures(COUNT, 2))
    own.before_run(engine, Progress())
    own.after_step(at(10, engine))
    own.close()
    rows = list(read_rows(run / "evaluation.jsonl"))
    return {key: value for key, value in rows[-1].items() if key != "evaluate_s"} if rank == 0 else {}


def test_several_ranks_evaluate_what_one_does(data_root: Path, tmp_path: Path) -> None:
    alone = row_of(0, 1, tmp_path / "one", data_root)
    assert {"frechet", "kernel", "precision", "recall", "density", "coverage", "nearer_train", "copied"} < set(alone)
    assert alone["samples"] == COUNT and abs(alone["nearer_train"] - 0.5) < 0.3 and alone["copied"] < 0.1
    for ranks in (2, 4):
        together = run_ranks(ranks, row_of, tmp_path / str(ranks), data_root)[0]
        assert together == alone, f"each sample once, in one order, though {ranks} do not divide five"
    assert not incidents.read(tmp_path / "one")


def test_copies_of_training_data_are_told_once_and_shown_beside_them(
    data_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine: Any = Ranks()
    copies = pictures(60, 0)[:COUNT]
    own = callback(tmp_path, data_root, copies)
    own.before_run(engine, Progress())
    with caplog.at_level(logging.WARNING):
        own.after_step(at(10, engine))
        own.after_step(at(11, engine))
        own.after_step(at(20, engine))
    own.close()
    rows = list(read_rows(tmp_path / "evaluation.jsonl"))
    assert [row["step"] for row in rows] == [10, 20] and rows[0]["copied"] == 1 and rows[0]["nearer_train"] > 0.7
    assert [row["kind"] for row in incidents.read(tmp_path)] == ["overfitting", "memorisation"], "once each"
    told = json.loads((tmp_path / "samples" / "nearest_00000010.json").read_text())
    assert set(told["samples"]) <= set(range(COUNT)) and told["distances"][0] == 0
    assert (tmp_path / "samples" / "nearest_00000010.png").stat().st_size > 100
    assert "the run memorises" in caplog.text and "nearest_00000010.png" in caplog.text
    page = write_report(RunFolder(tmp_path)).read_text()
    assert all(
        words in page
        for words in ("Nearest training samples", "training sample", "at 0", "Nearness to training samples")
    )
    resumed = callback(tmp_path, data_root, copies)
    resumed.before_run(engine, Progress(step=20))
    resumed.after_step(at(30, engine))
    resumed.close()
    assert len(list(incidents.read(tmp_path))) == 2, "a resumed run has said it already"
    figures = measured(RunFolder(tmp_path), "evaluation/frechet")
    assert list(figures) == [10, 20, 30], "by which checkpoints are kept"


def test_memory_is_that_of_what_was_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    train, heldout, fresh = (torch.randn(300, 6, generator=generator) for _ in range(3))
    same = memory_of(fresh, train, heldout)
    assert abs(same.nearer_train - 0.5) < 0.1 and same.copied < 0.04
    near = memory_of(train[:100] + 0.01, train, heldout)
    assert near.nearer_train > 0.95 and near.copied > 0.9 and near.places.tolist() == list(range(100))


def test_what_cannot_be_evaluated_is_refused_before_a_worker_starts(data_root: Path, tmp_path: Path) -> None:
    for given, words in (
        ({"samples": 3}, "got 3; expected 12"),
        ({"overfits": 1.5}, "overfits: got 1.5; expected a share"),
    ):
        with pytest.raises(UserError, match=words):
            callback(tmp_path, data_root, pictures(COUNT, 2), **given)
    for arguments, words in (
        ({"real": "nowhere"}, "nowhere"),
        ({"real": "blobs/heldout/images", "train": "nowhere"}, "nowhere"),
        ({"real": "blobs/heldout/images", "classifier": "nowhere"}, "make it with the job train_classifier"),
    ):
        with pytest.raises(Exception, match=words):
            Evaluate.check_files(arguments, data_root)
    recipe = recipes.load_recipe("mmdit/tiny_openmoji", tiny=True)
    changed = {**recipes.dump(recipe), "callbacks": {"checkpoint": {"keep_best": {"metric": "evaluation/frechet"}}}}
    with pytest.raises(UserError, match=r"keep_best: needs the figures of callbacks\.evaluate"):
        check_callbacks(recipes.recipe_from(changed, "test"), make_objective(recipe, None))
    changed["callbacks"]["evaluate"] = {"real": "blobs/heldout/images"}
    check_callbacks(recipes.recipe_from(changed, "test"), make_objective(recipe, None))
    wide = callback(tmp_path, data_root, pictures(COUNT, 2)[:, :4, :4])
    wide.before_run(Ranks(), Progress())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="name a folder of samples of their size"):
        wide.after_step(at(10, Ranks()))
    wide.close()
