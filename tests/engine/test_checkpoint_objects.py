"""Checkpoints in an object store: the manifest is the commit, requests are tried again, what arrives is hashed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from nexus_scale.contracts import Shard, UserError
from nexus_scale.engine.checkpoint import (
    Checkpoint,
    CheckpointStore,
    Fenced,
    committed_steps,
    newest,
    objects,
    send_elsewhere,
)
from nexus_scale.engine.checkpoint import (
    folder as in_folder,
)
from nexus_scale.engine.checkpoint.objects import ObjectStore
from tests.distributed import free_port, run_ranks
from tests.engine.test_checkpoint import TENSORS, shards_of


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "FIRST_PAUSE_S", 0.001)


def write(root: str | Path, step: int, world_size: int = 3, attempt: str = "one", **options: Any) -> None:
    stores = [
        CheckpointStore(root, rank=r, world_size=world_size, attempt=attempt, **options) for r in range(world_size)
    ]
    for rank, store in enumerate(stores):
        store.save(step, shards_of(rank, world_size, add=step), {"step": step})
    for store in stores:
        store.wait()


def holds(found: Checkpoint | None, step: int) -> bool:
    assert found is not None
    assert found.step == step
    for name, tensor in TENSORS.items():
        expected = (tensor + step).to(tensor.dtype) if tensor.is_floating_point() else tensor
        assert torch.equal(found.tensor(name), expected), name
    return True


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A bucket of moto's server, in a process of its own."""
    pytest.importorskip("s3fs", reason="s3fs is not installed (pip install nexus-scale[dev])")
    pytest.importorskip("moto.server", reason="moto is not installed (pip install nexus-scale[dev])")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()  # of another module's server, whose address they keep
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    before = dict(os.environ)
    os.environ.update(
        AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1", AWS_ENDPOINT_URL=endpoint
    )  # fmt: skip
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
                break
            except Exception:
                assert time.monotonic() < deadline and server.poll() is None, "moto's server does not answer"
                time.sleep(0.2)
        yield "s3://bucket/runs"
    finally:
        server.kill()
        server.wait()
        s3fs.S3FileSystem.clear_instance_cache()
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(params=["file", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A prefix of its own, on a file system behind fsspec and in S3."""
    if request.param == "file":
        return f"file://{tmp_path}/prefix"
    return f"{request.getfixturevalue('s3')}/{tmp_path.name}"


def test_a_store_holds_checkpoints_as_a_folder_does(url: str) -> None:
    assert newest(url) is None
    for step in (1, 2, 3):
        write(url, step, attempt=f"a{step}", keep=2)
    assert committed_steps(url) == [2, 3]
    assert holds(newest(url), 3)
    assert holds(newest(url, before=2), 2)
    names = ObjectStore(url).listing()
    assert sum("00003-a3-1/" in name for name in names) == 4, "three files and a manifest"
    assert not any(name.startswith("step_00000001") or ".notes" in name for name in names)


def test_damage_is_found_set_aside_and_stepped_over(url: str) -> None:
    write(url, 1, attempt="a")
    write(url, 2, attempt="b")
    store = ObjectStore(url)
    (name,) = (n for n in store.listing() if n.startswith("step_00000002") and "rank00001" in n)
    data = bytearray(store.get(name))
    data[-1] ^= 4
    store.put(name, bytes(data))
    assert holds(newest(url), 1)
    assert committed_steps(url) == [1]
    assert store.damaged()
    write(url, 2, attempt="c")
    assert holds(newest(url), 2)
    store.put(f"{store.commits()[-1].name}/alien", b"")
    assert holds(newest(url), 1)


def test_a_save_without_its_manifest_is_none_and_is_cleared_away(url: str) -> None:
    write(url, 1, attempt="a")
    store = ObjectStore(url)
    store.put("step_00000002/00001-a-7/rank00000-of-00001.safetensors", b"torn")
    assert holds(newest(url), 1)
    write(url, 3, attempt="b")
    assert not any("step_00000002" in name for name in store.listing())
    assert committed_steps(url) == [1, 3]


def test_what_a_dead_attempt_commits_late_does_not_count(url: str) -> None:
    old = CheckpointStore(url, rank=0, world_size=1, attempt="old")
    draft = old.place.draft(5, "old", 1)
    size, digest = draft.write("rank00000-of-00001.safetensors", b"", memoryview(b"x"), lambda: None)
    assert (size, len(digest)) == (1, 32)
    write(url, 5, attempt="new")
    with pytest.raises(Fenced, match="attempt new has taken the run over"):
        draft.commit("{}", lambda: old.place.check("old") and None)
    draft.commit("{}", lambda: None)  # had it passed the check just before the new one claimed the store
    assert holds(newest(url), 5)
    with pytest.raises(Fenced):
        old.save(6, shards_of(0, 1), {})


def test_a_runs_folder_points_to_its_store(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    send_elsewhere(folder, url)
    send_elsewhere(folder, url)
    write(folder, 4)
    assert holds(newest(folder), 4)
    assert holds(newest(url), 4)
    write(tmp_path / "other", 1)
    with pytest.raises(UserError, match="already contains checkpoints"):
        send_elsewhere(tmp_path / "other", url)


def test_a_driver_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match=r"callbacks.checkpoint.to: nowhere://x"):
        ObjectStore("nowhere://x")


class Unreliable(DirFileSystem):
    """Every nth request fails, in one of the ways in which stores do."""

    def __init__(self, path: str, every: int):
        super().__init__(path=path, fs=LocalFileSystem(auto_mkdir=True))
        self.every, self.count = every, 0

    def _maybe(self) -> None:
        self.count += 1
        if self.count % self.every == 0:
            raise [ConnectionResetError("reset"), TimeoutError("slow"), RuntimeError("503 Slow Down")][self.count % 3]

    def pipe_file(self, *arguments: Any, **options: Any) -> Any:
        self._maybe()
        return super().pipe_file(*arguments, **options)

    def cat_file(self, *arguments: Any, **options: Any) -> Any:
        self._maybe()
        return super().cat_file(*arguments, **options)

    def find(self, *arguments: Any, **options: Any) -> Any:
        self._maybe()
        return super().find(*arguments, **options)

    def rm_file(self, *arguments: Any, **options: Any) -> Any:
        self._maybe()
        return super().rm_file(*arguments, **options)

    def open(self, *arguments: Any, **options: Any) -> Any:
        self._maybe()
        return super().open(*arguments, **options)


@pytest.mark.parametrize("every", [2, 3, 7])
def test_a_store_that_fails_now_and_then_costs_tries_and_nothing_else(
    tmp_path: Path, every: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    system = Unreliable(str(tmp_path), every)
    monkeypatch.setattr(objects, "_open_filesystem", lambda url: (system, "prefix"))
    for step in (1, 2, 3):
        write("file:///any", step, world_size=1, deadline_s=30)
    assert holds(newest("file:///any"), 3)
    assert committed_steps("file:///any") == [2, 3]
    assert "retrying in" in caplog.text
    assert system.count > 10


def test_a_store_that_is_down_fails_the_save_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = Unreliable(str(tmp_path), 10**9)
    monkeypatch.setattr(objects, "_open_filesystem", lambda url: (system, "prefix"))
    store = CheckpointStore("file:///any", rank=0, world_size=1, attempt="a")
    store.save(1, shards_of(0, 1, add=1), {})
    store.wait()
    plain = ObjectStore.upload
    monkeypatch.setattr(ObjectStore, "upload", lambda *_: (_ for _ in ()).throw(OSError("down")))
    store.save(2, shards_of(0, 1, add=2), {})
    store._writing.thread.join()  # type: ignore[union-attr]
    monkeypatch.setattr(ObjectStore, "upload", plain)
    store.save(3, shards_of(0, 1, add=3), {})
    assert store._failed == 1
    store.wait()
    assert committed_steps("file:///any") == [1, 3]
    system.every = 1
    with pytest.raises(OSError, match=r"listing failed 5 times"):
        newest("file:///any")
    system.every = 10**9
    assert committed_steps("file:///any") == [1, 3], "a store that does not answer says nothing of its checkpoints"


def test_a_read_that_is_cut_short_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}/prefix"
    write(url, 1)
    store = ObjectStore(url)
    short = iter([True, False])
    plain = store.fs.open

    def cut(path: str, mode: str = "rb", **options: Any) -> Any:
        import io

        file = plain(path, mode, **options)
        return io.BytesIO(file.read()[:-3]) if mode == "rb" and next(short, False) else file

    monkeypatch.setattr(store.fs, "open", cut)
    (commit,) = store.commits()
    name = "rank00000-of-00003.safetensors"
    digest = in_folder.hash_file(tmp_path / "prefix" / commit.name / name)[1]
    assert store.path_of(commit, name, digest).read_bytes() == (tmp_path / "prefix" / commit.name / name).read_bytes()


def _save_and_load(rank: int, world_size: int, url: str) -> list[float]:
    store = CheckpointStore(url, rank=rank, world_size=world_size, attempt="a")
    assert newest(url) is None  # as a run does; and rank 0 has claimed the store when this returns
    store.save(1, {"x": Shard(torch.full((8,), float(rank)), 8 * rank, (16,))}, {})
    store.wait()
    found = newest(url)
    assert found is not None
    with found.claimed() as read:
        return [float(value) for value in read("x", 0, 16)]


def test_two_ranks_save_to_and_load_from_a_store(url: str) -> None:
    assert run_ranks(2, _save_and_load, url) == [[0.0] * 8 + [1.0] * 8] * 2
