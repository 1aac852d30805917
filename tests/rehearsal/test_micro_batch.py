"""`cluster.micro_batch: auto`: the largest that fits every rank, found without a trace and kept by the run."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nexus_scale import train as training
from nexus_scale.config import recipe as recipes
from nexus_scale.config.recipe import Cluster
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.engine import memory
from nexus_scale.engine.alone import alone
from nexus_scale.rehearsal import micro_batch as rehearsed
from nexus_scale.rehearsal.micro_batch import Size, largest_that_fits
from nexus_scale.run.files import frozen_choices
from nexus_scale.train import Place, train
from tests.distributed import run_ranks
from tests.training_ranks import QUIET, assert_same_end

BATCH, SMALL = 1024, 64
ROOM = 60 << 20
"""Bytes of memory for a micro-batch of half as many samples to fail and for one of some fewer to fit, by a wide margin each."""


def trained(root: Path, workers: int, steps: int, batch: int = SMALL, **cluster: Any) -> dict[str, Any]:
    """A run's choices after so many steps."""
    made = recipes.load_recipe(
        "mmdit/tiny_openmoji",
        {"global_batch": batch, "steps": steps, "callbacks": {**QUIET, "checkpoint": {"every": 1}}},
        tiny=True,
    )
    where = Cluster(**{"workers": workers, "threads_per_worker": 1, **cluster})
    place = Place(RunFolder(root), root / "data", root.parent)
    root.mkdir(parents=True, exist_ok=True)
    train(made, where, place, lambda *_: None)
    choices = frozen_choices(place.run)
    assert choices is not None
    return choices


def _rank(rank: int, world_size: int, root: str, micro: int | str, whole: bool, room: int) -> dict[str, Any]:
    """A rank of a training of a step; the second has only so much room. `whole`: the network stays gathered."""
    if not whole:
        training.EngineSettings = partial(training.EngineSettings, whole_numel=0)
    given = torch.ones(3)
    with alone():
        dist.all_reduce(given)
    assert given.isnan().all(), "nobody answers a rank that is alone"
    dist.all_reduce(given := torch.ones(3))
    assert given.tolist() == [2.0] * 3, "and afterwards all do"
    if room and rank == 1:
        fixed: list[int] = []

        def share_of_host(cluster: Cluster) -> int:
            fixed.append(memory.resident() + room)
            return fixed[0]

        memory.share_of_host = share_of_host
    return trained(Path(root), world_size, 1, BATCH, micro_batch=micro)


@pytest.mark.parametrize("whole", [True, False], ids=["gathered", "sharded"])
def test_one_rank_without_room_lowers_all_of_them_and_the_trial_leaves_no_trace(tmp_path: Path, whole: bool) -> None:
    found = run_ranks(2, _rank, str(tmp_path / "auto"), "auto", whole, ROOM)[0]
    micro = found["micro_batch"]
    assert 1 < micro < BATCH // 2 and (BATCH // 2) % micro == 0
    assert found["found"] == {"workers": 2, "recompute": False}
    assert run_ranks(2, _rank, str(tmp_path / "fixed"), micro, whole, 0)[0]["micro_batch"] == micro
    assert_same_end(tmp_path / "auto", tmp_path / "fixed")
    rows = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("auto", "fixed")]
    losses = [[json.loads(row)["loss"] for row in of] for of in rows]
    assert losses[0] == losses[1] and all(map(math.isfinite, losses[0]))


def test_a_run_keeps_what_it_found_until_the_number_of_workers_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Size] = []

    def fits(self: rehearsed.Trial, engine: Any, size: Size) -> bool:
        tried.append(size)
        return size.recompute and size.micro_batch <= 4

    monkeypatch.setattr(rehearsed.Trial, "fits", fits)
    auto: dict[str, Any] = {"engine": "local", "micro_batch": "auto"}
    found = trained(tmp_path / "auto", 0, 1, **auto)
    assert (found["micro_batch"], found["found"]) == (4, {"workers": 1, "recompute": True})
    assert tried == [Size(SMALL >> n) for n in range(7)] + [Size(SMALL >> n, True) for n in range(5)]
    tried.clear()
    assert trained(tmp_path / "auto", 0, 2, **auto) == found and not tried
    environment = tmp_path / "auto" / "environment.json"
    written = json.loads(environment.read_text())
    written["choices"]["found"]["workers"] = 4
    environment.write_text(json.dumps(written))
    assert trained(tmp_path / "auto", 0, 3, **auto) == found and tried == [Size(4, True)]
    plain = trained(tmp_path / "fixed", 0, 3, engine="local", micro_batch=4)
    assert "found" not in plain
    assert_same_end(tmp_path / "auto", tmp_path / "fixed")  # recomputed blocks have the same bits
    assert trained(tmp_path / "fixed", 0, 4, **auto) == plain and tried == [Size(4, True)], "a number stays, too"


def test_no_size_parts_what_batch_norms_take_together() -> None:
    recipe = recipes.load_recipe("gan/dcgan_lsun", {"networks": {"model": {"norm_group": 4}}}, tiny=True)
    objective = training.make_objective(recipe, None)
    sizes = rehearsed.every_size(recipe, Cluster(workers=0), objective, share=24, most=12)
    assert [size.micro_batch for size in sizes if not size.recompute] == [12, 8, 4], "of 4 and of the critic's 2"


def test_sizes_are_halved_and_then_recomputed() -> None:
    sizes = [Size(micro, recompute) for recompute in (False, True) for micro in (12, 6, 4, 3, 2, 1)]
    for wanted in (*sizes[:2], sizes[3], *sizes[5:8]):
        tried: list[Size] = []

        def fits(engine: Any, size: Size, wanted: Size = wanted, tried: list[Size] = tried) -> bool:
            tried.append(size)
            return size == wanted

        assert largest_that_fits(sizes, lambda size: size, fits) == (wanted, wanted)  # type: ignore[arg-type, return-value]
        assert tried[0] == sizes[0] and len(tried) <= 6
    with pytest.raises(UserError, match="even micro-batch 1 with recomputation of blocks does not fit") as caught:
        largest_that_fits(sizes, lambda size: size, lambda *_: False)  # type: ignore[arg-type, return-value]
    assert caught.value.code == 4
