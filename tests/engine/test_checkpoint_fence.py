"""A worker of a dead attempt can no longer write."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from nexus_scale.contracts import Shard
from nexus_scale.engine.checkpoint import CheckpointStore, Fenced, committed_steps, newest
from tests.distributed import script, until

SLOW_WRITER = """
import os, sys, torch
from pathlib import Path
os.environ["NEXUS_FAULT"] = f"step:2,phase:{sys.argv[2]},action:SIGSTOP"
from nexus_scale.contracts import Shard
from nexus_scale.engine.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), rank=0, world_size=1, attempt="old")
for step in (1, 2):
    store.save(step, {"x": Shard(torch.full((1000,), float(step)), 0, (1000,))}, {})
    store.wait()
"""


def shard(value: float) -> dict[str, Shard]:
    return {"x": Shard(torch.full((1000,), value), 0, (1000,))}


@pytest.mark.parametrize("phase", ["save_begin", "save_mid", "save_between", "save_commit"])
def test_a_worker_of_a_dead_attempt_cannot_commit(tmp_path: Path, phase: str) -> None:
    """The old process is stopped within its save and wakes up after a new one has taken the run over and written."""
    log, tmp_path = tmp_path / "log", tmp_path / "checkpoints"
    old = script(SLOW_WRITER, str(tmp_path), phase, log=log)
    try:
        until(lambda: psutil.Process(old.pid).status() == psutil.STATUS_STOPPED)
        assert committed_steps(tmp_path) == [1]
        new = CheckpointStore(tmp_path, rank=0, world_size=1, attempt="new")
        for step in (2, 3):
            new.save(step, shard(10.0 * step), {})
            new.wait()
        before = sorted(path.name for path in tmp_path.rglob("*"))
        psutil.Process(old.pid).resume()
        old.join(60)
    finally:
        code = old.exitcode
        old.kill()
        old.join()
    said = log.read_text()
    assert code == 1
    assert "Fenced" in said
    assert "attempt old may not write here any more: attempt new has taken the run over" in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    found = newest(tmp_path)
    assert found is not None
    assert (found.step, float(found.tensor("x")[0])) == (3, 30.0)


def test_the_older_of_two_stores_is_told_at_its_next_save(tmp_path: Path) -> None:
    old = CheckpointStore(tmp_path, rank=0, world_size=1, attempt="old")
    old.save(1, shard(1), {})
    old.wait()
    CheckpointStore(tmp_path, rank=0, world_size=1, attempt="new")
    old.save(2, shard(2), {})
    with pytest.raises(Fenced, match="start number 2"):
        old.wait()
    assert committed_steps(tmp_path) == [1]
