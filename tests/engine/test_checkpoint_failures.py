"""Saves that fail: the run goes on, ranks agree, room is made, and what is committed stays."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nexus_scale.contracts import Shard, UserError
from nexus_scale.engine.checkpoint import CheckpointError, CheckpointStore, committed_steps, newest
from nexus_scale.engine.checkpoint import folder as in_folder
from nexus_scale.engine.checkpoint import store as store_module
from nexus_scale.io import incidents
from tests.distributed import run_ranks

Write = Callable[..., tuple[int, str]]
PLAIN: Write = in_folder.write_file


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_FIRST_PAUSE_S", 0.01)


def shard(value: float, numel: int = 64) -> dict[str, Shard]:
    return {"x": Shard(torch.full((numel,), value), 0, (numel,))}


def failing(error: int, times: int) -> tuple[Write, list[int]]:
    """A write that fails so many times, and the list of what it was asked for."""
    calls: list[int] = []

    def write(path: Path, header: bytes, data: memoryview, halfway: Callable[[], None]) -> tuple[int, str]:
        calls.append(len(data))
        if len(calls) <= times:
            path.write_bytes(header)
            raise OSError(error, os.strerror(error))
        return PLAIN(path, header, data, halfway)

    return write, calls


def test_a_failed_save_is_noted_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, _ = failing(errno.EIO, times=2)
    monkeypatch.setattr(in_folder, "write_file", write)
    store = CheckpointStore(tmp_path / "c", rank=0, world_size=1, attempt="a", run=tmp_path)
    for step in (1, 2, 3):
        assert store.save(step, shard(step), {})
    store.wait()
    assert committed_steps(tmp_path / "c") == [3]
    noted = incidents.read(tmp_path)
    assert [(row["kind"], row["step"], row["failures"], row["limit"]) for row in noted] == [
        ("save_failed", 1, 1, 3),
        ("save_failed", 2, 2, 3),
    ]
    assert "Input/output error" in noted[0]["message"]
    assert not list((tmp_path / "c").glob("*.tmp-*"))


def test_so_many_failures_in_a_row_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, _ = failing(errno.ENOSPC, times=99)
    monkeypatch.setattr(in_folder, "write_file", write)
    store = CheckpointStore(tmp_path, rank=0, world_size=1, attempt="a", failures=2)
    store.save(1, shard(1), {})
    store.save(2, shard(2), {})
    with pytest.raises(UserError, match=r"the disk is full: the checkpoint of step 2 needs [\d,]+ bytes") as caught:
        store.save(3, shard(3), {})
    assert caught.value.code == 6
    assert committed_steps(tmp_path) == []


def test_a_save_that_is_waited_for_is_tried_again_from_its_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = failing(errno.EIO, times=2)
    monkeypatch.setattr(in_folder, "write_file", write)
    store = CheckpointStore(tmp_path, rank=0, world_size=1, attempt="a")
    values = torch.ones(64)
    store.save(7, {"x": Shard(values, 0, (64,))}, {})
    values.zero_()  # training went on
    store.wait()
    found = newest(tmp_path)
    assert found is not None
    assert torch.equal(found.tensor("x"), torch.ones(64))
    assert len(calls) == 3


def test_one_success_forgives_what_failed_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, rank=0, world_size=1, attempt="a", failures=2)
    for step in range(1, 7):
        write, _ = failing(errno.EIO, times=step % 2)
        store.wait() if step % 2 == 0 else None
        monkeypatch.setattr(in_folder, "write_file", write)
        store.save(step, shard(step), {})
    store.wait()
    assert committed_steps(tmp_path) == [5, 6]


def test_a_full_disk_gets_room_by_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, rank=0, world_size=1, attempt="a", keep=3, keep_every=5)
    for step in (5, 6, 7, 8):
        store.save(step, shard(step), {})
        store.wait()
    assert committed_steps(tmp_path) == [5, 6, 7, 8]

    def room(_: object) -> int:  # for three checkpoints in all
        return 0 if len(committed_steps(tmp_path)) >= 3 else 10**9

    monkeypatch.setattr(in_folder.Folder, "room", room)
    store.save(9, shard(9), {})
    store.wait()
    assert committed_steps(tmp_path) == [5, 8, 9]


def test_no_room_is_made_while_the_newest_does_not_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, rank=0, world_size=1, attempt="a", keep=2, failures=2)
    for step in (1, 2):
        store.save(step, shard(step), {})
        store.wait()
    file = tmp_path / "step_00000002" / "rank00000-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    monkeypatch.setattr(in_folder.Folder, "room", lambda _: 0)
    store.save(3, shard(3), {})
    with pytest.raises(UserError, match="the disk is full"):
        store.wait()
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 1


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the kernel itself refuses the write."""
    import subprocess
    import sys

    script = """
import resource, sys, torch
from pathlib import Path
from nexus_scale.contracts import Shard
from nexus_scale.engine.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), rank=0, world_size=1, attempt="a")
small, large = ({"x": Shard(torch.ones(n), 0, (n,))} for n in (1000, 1_000_000))
store.save(1, small, {})
store.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
store.save(2, large, {})
store.save(3, small, {})
store.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stderr
    assert committed_steps(tmp_path) == [1, 3]


SAY = in_folder.FolderDraft.say


def _say_no_failure(self: in_folder.FolderDraft, rank: int, text: str) -> None:
    if "error" in text:
        raise OSError(errno.ENOSPC, "no room for a note")
    SAY(self, rank, text)


def _rank_with_a_bad_disk(rank: int, world_size: int, folder: str, bad: int, silent: bool) -> list[int]:
    """Failures in a row before each of four saves, of which one rank's second and third fail; `silent`: without a note."""
    store_module._FIRST_PAUSE_S = 0.01
    store = CheckpointStore(Path(folder), rank=rank, world_size=world_size, attempt="a", run=Path(folder).parent)
    counts = []
    for step in range(1, 5):
        if step == 2:
            store.wait()
        if step == 2 and rank == bad:
            in_folder.write_file, _ = failing(errno.EIO, times=2)
            if silent:
                in_folder.FolderDraft.say = _say_no_failure  # type: ignore[method-assign]
        store.save(step, {"x": Shard(torch.full((8,), float(step)), 8 * rank, (16,))}, {})
        counts.append(store._failed)
    store.wait()
    return counts


@pytest.mark.parametrize(("bad", "silent"), [(0, False), (1, False), (1, True)])
def test_a_save_that_fails_on_one_rank_fails_on_all(tmp_path: Path, bad: int, silent: bool) -> None:
    said = run_ranks(2, _rank_with_a_bad_disk, str(tmp_path / "c"), bad, silent)
    assert said[0] == said[1] == [0, 0, 1, 2]
    assert committed_steps(tmp_path / "c") == [1, 4]
    assert [row["step"] for row in incidents.read(tmp_path)] == [2, 3]
    found = newest(tmp_path / "c")
    assert found is not None
    assert torch.equal(found.tensor("x"), torch.full((16,), 4.0))


def _rank_whose_claim_is_slow(rank: int, world_size: int, folder: str) -> int:
    claim = in_folder.Folder.claim

    def slow(self: in_folder.Folder, attempt: str) -> None:
        time.sleep(0.5)
        claim(self, attempt)

    in_folder.Folder.claim = slow  # type: ignore[method-assign]
    store = CheckpointStore(Path(folder), rank=rank, world_size=world_size, attempt=f"{world_size}-ranks")
    store.save(1, {"x": Shard(torch.ones(8), 8 * rank, (8 * world_size,))}, {})
    store.wait()
    return store._tries


def test_no_rank_saves_before_the_place_is_claimed(tmp_path: Path) -> None:
    """Neither into a folder that is not there yet, nor under the claim of the attempt before."""
    assert run_ranks(2, _rank_whose_claim_is_slow, str(tmp_path / "new")) == [1, 1]
    in_folder.Folder(tmp_path / "old").claim("before")
    assert run_ranks(2, _rank_whose_claim_is_slow, str(tmp_path / "old")) == [1, 1]


def test_a_silent_rank_has_a_deadline_and_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, rank=0, world_size=2, attempt="a", deadline_s=0.2, failures=1)
    store.save(1, {"x": Shard(torch.ones(8), 0, (16,))}, {})
    with pytest.raises(CheckpointError, match=r"ranks \[1\] did not write their parts"):
        store.wait()
    assert committed_steps(tmp_path) == []


def test_the_programs_own_mistake_is_not_tried_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, rank=0, world_size=1, attempt="a")
    store.save(1, {"x": Shard(torch.ones(8), 0, (16,))}, {})
    with pytest.raises(CheckpointError, match="x: has 16 values, the ranks wrote 8"):
        store.wait()
    assert store._tries == 1
