"""The digest of a step: the same for the same bits, another one for any other bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nexus_scale.callbacks.digest import FOLDER, digests
from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import RunFolder, Shard
from nexus_scale.generate.trained import make_draw
from nexus_scale.train import Place, train

OF_THE_PROCESS = {"process", "at"}


def trained(root: Path) -> list[dict[str, Any]]:
    """Three steps in this process, or what is left of them; all rows so far."""
    callbacks = {"checkpoint": {"every": 1, "keep": 10}, "validate": None, "samples": None, "digest": {}}
    learned = {"times": {"name": "importance", "shares": 4, "warm_up": 1}}  # what the objective keeps
    recipe = recipes.load_recipe("mmdit/tiny_openmoji", {"callbacks": callbacks, "objective": learned}, tiny=True)
    cluster = recipes.cluster_from({"workers": 0}, "test")
    train(recipe, cluster, Place(RunFolder(root), root / "data", root.parent), make_draw)
    lines = "".join(path.read_text() for path in sorted((root / FOLDER).glob("*-rank0.jsonl"))).split("\n")
    return [json.loads(line) for line in lines if line]


def test_a_step_that_is_done_again_has_the_same_digest(tmp_path: Path) -> None:
    before = trained(tmp_path / "run")
    assert [row["step"] for row in before] == [1, 2, 3]
    assert len({row["masters"] for row in before}) == 3, "every step changes the weights"
    assert len({row["objective"] for row in before}) == 3, "and what the objective has learned of its losses"
    assert [row["positions"] for row in before] == [[0, 1, 2, 3]] * 3
    assert len({sample for row in before for sample in row["samples"]}) == 12, "no sample twice within an epoch"
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000003")
    *_, again = trained(tmp_path / "run")
    assert again["step"] == 3
    assert {"draws", "samples", "losses", "masters", "moments", "ema", "optimizer_steps", "rng", "objective"} < set(
        again
    )
    assert {key for key in again if again[key] != before[-1][key]} <= OF_THE_PROCESS


@pytest.mark.parametrize(
    ("name", "kind"),
    [("model/a.fp32", "masters"), ("model/a.exp_avg", "moments"), ("model/a.exp_avg_sq", "moments"), ("ema/a.ema", "ema"),
     ("model/a.square_avg", "moments"), ("model/b.buffer", "buffers"), ("model.optimizer_steps", "optimizer_steps")],
)  # fmt: skip
def test_one_flipped_bit_changes_the_digest_of_its_kind_alone(name: str, kind: str) -> None:
    names = [
        "model/a.fp32",
        "model/a.exp_avg",
        "model/a.exp_avg_sq",
        "model/a.square_avg",
        "ema/a.ema",
        "model/b.buffer",
    ]
    shards = {each: Shard(torch.arange(6.0), 6, (2, 6)) for each in names}
    shards["model.optimizer_steps"] = Shard(torch.tensor([7]), 0, (1,))
    before = digests(shards)
    shards[name].local.view(torch.uint8)[3] ^= 1
    after = digests(shards)
    assert [key for key in before if before[key] != after[key]] == [kind]


def test_where_a_piece_lies_is_part_of_its_digest() -> None:
    a, b = (digests({"model/a.fp32": Shard(torch.zeros(3), start, (6,))}) for start in (0, 3))
    assert a != b
