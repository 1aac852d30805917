"""Checkpoints: whole or not there, verified before they are read, any range of any tensor, damage found and stepped
over."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nexus_scale.contracts import Shard, UserError
from nexus_scale.engine.base import part_of
from nexus_scale.engine.checkpoint import (
    Best,
    CheckpointError,
    CheckpointStore,
    committed_steps,
    load_network,
    manifest,
    newest,
    undo,
)
from nexus_scale.engine.checkpoint import (
    folder as in_folder,
)
from tests.distributed import script, until
from tests.engine_networks import OddNetwork, batch, build, copies, train

TENSORS = {
    "model/w.fp32": torch.arange(35, dtype=torch.float32).view(5, 7),
    "model/h.buffer": torch.linspace(0, 1, 9).bfloat16(),
    "model/one.fp32": torch.tensor([4.5]),
    "model.optimizer_steps": torch.tensor([17]),
    "model/mask.buffer": torch.tensor([True, False, True]),
}


def shards_of(rank: int, world_size: int, add: float = 0) -> dict[str, Shard]:
    found = {}
    for name, tensor in TENSORS.items():
        start, stop = part_of(tensor.numel(), rank, world_size)
        if stop > start:
            values = tensor + add if tensor.is_floating_point() else tensor.clone()
            found[name] = Shard(values.reshape(-1)[start:stop].to(tensor.dtype), start, tuple(tensor.shape))
    return found


def write(root: Path, step: int, world_size: int = 3, **options: object) -> None:
    """All ranks' parts, by a store each, in one process."""
    stores = [CheckpointStore(root, rank=r, world_size=world_size, attempt="one", **options) for r in range(world_size)]  # type: ignore[arg-type]
    for rank, store in enumerate(stores):
        store.save(step, shards_of(rank, world_size, add=step), {"progress": {"step": step}})
    for store in stores:
        store.wait()


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_any_range_of_any_tensor_comes_back(tmp_path: Path, world_size: int) -> None:
    write(tmp_path, 0, world_size)
    found = newest(tmp_path)
    assert found is not None
    assert found.names == sorted(TENSORS)
    assert (found.step, found.state) == (0, {"progress": {"step": 0}})
    for name, tensor in TENSORS.items():
        assert torch.equal(found.tensor(name), tensor)
        assert found.tensor(name).dtype == tensor.dtype
        for start in range(tensor.numel() + 1):
            for stop in range(start, tensor.numel() + 1):
                assert torch.equal(found.read(name, start, stop), tensor.reshape(-1)[start:stop])
    with pytest.raises(CheckpointError, match=r"model/w.fp32 has 35 values; \[30, 36\)"):
        found.read("model/w.fp32", 30, 36)
    with pytest.raises(CheckpointError, match=r"no tensor 'model/v.fp32'"):
        found.read("model/v.fp32", 0, 1)


def test_any_safetensors_reader_opens_a_ranks_file(tmp_path: Path) -> None:
    write(tmp_path, 0, 2)
    parts = [load_file(tmp_path / "step_00000000" / f"rank0000{r}-of-00002.safetensors") for r in range(2)]
    assert torch.equal(torch.cat([part["model/w.fp32"] for part in parts]), TENSORS["model/w.fp32"].reshape(-1))
    assert torch.equal(torch.cat([part["model/h.buffer"] for part in parts]), TENSORS["model/h.buffer"])


def flip(path: Path, at: float = 0.7) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 0x10
    path.write_bytes(data)


def swap(folder: Path) -> None:
    one, two = folder / "rank00000-of-00003.safetensors", folder / "rank00001-of-00003.safetensors"
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def truncate(path: Path, by: int = 1) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - by)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda f: truncate(f / "rank00001-of-00003.safetensors"),
    "a bit of the data flipped": lambda f: flip(f / "rank00002-of-00003.safetensors", 0.99),
    "a bit of the header flipped": lambda f: flip(f / "rank00000-of-00003.safetensors", 0.02),
    "a bit of the manifest flipped": lambda f: flip(f / "MANIFEST.json"),
    "manifest truncated": lambda f: truncate(f / "MANIFEST.json", 40),
    "manifest empty": lambda f: (f / "MANIFEST.json").write_text(""),
    "manifest missing": lambda f: (f / "MANIFEST.json").unlink(),
    "file missing": lambda f: (f / "rank00001-of-00003.safetensors").unlink(),
    "file too many": lambda f: (f / "rank00003-of-00003.safetensors").write_bytes(b"x"),
    "two ranks' files swapped": swap,
    "an older manifest": lambda f: shutil.copy(f.parent / "step_00000001" / "MANIFEST.json", f / "MANIFEST.json"),
    "an older file": lambda f: shutil.copy(f.parent / "step_00000001" / "rank00000-of-00003.safetensors", f),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_next_newest_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    DAMAGE[damage](tmp_path / "step_00000002")
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert torch.equal(found.tensor("model/w.fp32"), TENSORS["model/w.fp32"] + 1)
    assert (tmp_path / "step_00000002.corrupt-0").is_dir()
    assert "step_00000002 does not verify" in caplog.text
    assert newest(tmp_path / "nowhere") is None


def test_parts_that_do_not_tile_a_tensor_are_refused_by_name(tmp_path: Path) -> None:
    for number, (broken, message) in enumerate(
        [
            (Shard(torch.zeros(3), 30, (5, 7)), r"model/w.fp32: values \[18, 30\) are missing"),
            (Shard(torch.zeros(20), 15, (5, 7)), r"model/w.fp32: values \[18, 15\) are there twice"),
            (Shard(torch.zeros(16), 18, (5, 7)), r"model/w.fp32: has 35 values, the ranks wrote 34"),
            (Shard(torch.zeros(17), 18, (7, 5)), "model/w.fp32: .* another rank F32"),
        ]
    ):
        root = tmp_path / str(number)
        stores = [CheckpointStore(root, rank=r, world_size=2, attempt="a") for r in range(2)]
        stores[0].save(1, shards_of(0, 2), {})
        stores[1].save(1, {**shards_of(1, 2), "model/w.fp32": broken}, {})
        stores[1].wait()
        with pytest.raises(CheckpointError, match=message):
            stores[0].wait()
        assert committed_steps(root) == []
        assert list(root.glob("step_*")) == []


def test_retention_keeps_the_newest_and_every_nth(tmp_path: Path) -> None:
    for step in range(1, 8):
        write(tmp_path, step, 1, keep=2, keep_every=3)
    assert committed_steps(tmp_path) == [3, 6, 7]
    assert (tmp_path / "LATEST").read_text() == "step_00000007\n"


def test_saving_a_step_again_replaces_it_and_a_torn_replacement_comes_back(tmp_path: Path) -> None:
    write(tmp_path, 3, 1)
    store = CheckpointStore(tmp_path, rank=0, world_size=1, attempt="two")
    store.save(3, shards_of(0, 1, add=100), {})
    store.wait()
    found = newest(tmp_path)
    assert found is not None
    assert torch.equal(found.tensor("model/one.fp32"), TENSORS["model/one.fp32"] + 100)
    (tmp_path / "step_00000003").rename(tmp_path / "step_00000003.replaced-two")  # a crash between the two renames
    assert newest(tmp_path) is None
    CheckpointStore(tmp_path, rank=0, world_size=1, attempt="three")
    found = newest(tmp_path)
    assert found is not None
    assert found.step == 3


def test_save_copies_at_once_and_the_buffer_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    plain = in_folder.write_file

    def slow(*arguments: object) -> tuple[int, str]:
        assert go.wait(20)
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(in_folder, "write_file", slow)
    store = CheckpointStore(tmp_path, rank=0, world_size=1, attempt="a", busy="skip")
    values = torch.ones(8)
    assert store.save(1, {"x": Shard(values, 0, (8,))}, {})
    values.zero_()
    assert not store.save(2, {"x": Shard(values, 0, (8,))}, {})  # still writing: left out
    buffer = store._snapshot
    go.set()
    store.wait()
    found = newest(tmp_path)
    assert found is not None
    assert torch.equal(found.tensor("x"), torch.ones(8))
    assert store.save(3, {"x": Shard(values, 0, (8,))}, {})
    store.wait()
    assert store._snapshot is buffer
    assert committed_steps(tmp_path) == [1, 3]


# A format, whether this version reads it, and what it says where it does not. A release that changes the format adds a line.
FORMATS = [(None, False), (0, False), (1, True), (2, False), (99, False), ("1", False)]


@pytest.mark.parametrize(("number", "read"), FORMATS)
def test_formats_are_read_or_refused_by_name(tmp_path: Path, number: object, read: bool) -> None:
    write(tmp_path, 1, 1)
    path = tmp_path / "step_00000001" / "MANIFEST.json"
    written = json.loads(path.read_text())["manifest"]
    assert set(written["versions"]) == {"nexus_scale", "torch"}
    path.write_text(manifest.sealed({**written, "format": number, "versions": {"nexus_scale": "7.1"}}))
    if read:
        assert newest(tmp_path) is not None
        return
    with pytest.raises(UserError, match=rf"format {number}, this nexus_scale .* reads format 1; .* \(7.1\)") as caught:
        newest(tmp_path)
    assert caught.value.code == 5
    assert (tmp_path / "step_00000001").is_dir()  # set aside would be wrong: it is not damaged


def test_the_best_by_a_figure_stay(tmp_path: Path) -> None:
    figures = {1: 0.5, 2: 0.1, 3: 0.3, 5: 0.2, 9: 0.0}

    def saved(root: Path, **best: object) -> list[int]:
        for step in range(1, 8):
            write(root, step, 1, keep=1, best=Best(lambda: figures, **best))  # type: ignore[arg-type]
        return committed_steps(root)

    assert saved(tmp_path / "min") == [2, 7]
    assert saved(tmp_path / "two", count=2) == [2, 5, 7]
    assert saved(tmp_path / "max", mode="max") == [1, 7]


def test_going_back_takes_back_what_came_later(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        write(tmp_path, step, 1, keep=9)
    flip(tmp_path / "step_00000006" / "rank00000-of-00001.safetensors", 0.99)
    found = newest(tmp_path, before=7)
    assert found is not None
    assert found.step == 4
    assert newest(tmp_path, before=1) is None
    assert committed_steps(tmp_path) == [2, 4, 8]
    undo(tmp_path, 4)
    assert committed_steps(tmp_path) == [2, 4]
    write(tmp_path, 6, 1, keep=9)
    assert committed_steps(tmp_path) == [2, 4, 6]
    assert not list(tmp_path.glob("*.pruned-*"))


def test_a_load_asks_for_all_there_is(tmp_path: Path) -> None:
    write(tmp_path, 1)
    found = newest(tmp_path)
    assert found is not None
    with found.claimed() as read:
        kept = [read(name, 0, tensor.numel()).clone() for name, tensor in TENSORS.items()]
    for tensor, values in zip(TENSORS.values(), kept, strict=True):
        expected = tensor + 1 if tensor.is_floating_point() else tensor
        assert torch.equal(values.view(tensor.shape), expected.to(tensor.dtype))

    def ask_for(*names: str) -> None:
        with found.claimed() as read:
            for name in names:
                read(name, 0, 1)

    with pytest.raises(UserError, match=r"does not use: model/h.buffer, model/mask.buffer;"):
        ask_for("model/w.fp32", "model/one.fp32", "model.optimizer_steps")
    with pytest.raises(CheckpointError, match=r"no tensor 'model/v.fp32'"):
        ask_for(*TENSORS, "model/v.fp32")


def test_an_engine_asks_for_all_that_it_wrote(tmp_path: Path) -> None:
    engine = build("local")
    train(engine, 0, 2)
    store = CheckpointStore(tmp_path, rank=0, world_size=1, attempt="a")
    store.save(2, engine.shards(), {})
    store.wait()
    found = newest(tmp_path)
    assert found is not None
    other = build("local")
    with found.claimed() as read:
        other.load_shards(read)
    assert all(torch.equal(value, copies(other)[name]) for name, value in copies(engine).items())


def test_a_bare_network_is_filled_without_an_engine(tmp_path: Path) -> None:
    engine = build("local")
    train(engine, 0, 3)
    store = CheckpointStore(tmp_path, rank=0, world_size=1, attempt="a")
    store.save(3, engine.shards(), {})
    store.wait()
    found = newest(tmp_path)
    assert found is not None
    x, _ = batch(9)
    for role in ("model", "ema"):
        bare = OddNetwork()
        load_network(found, role, bare)
        with engine.weights(role), torch.no_grad():
            assert torch.equal(engine.nets["model"](x), bare.eval()(x))
    assert torch.equal(copies(engine)["model/seen.buffer"], bare.seen)
    with pytest.raises(CheckpointError, match="no tensor 'critic/"):
        load_network(found, "critic", OddNetwork())
    wrong = OddNetwork()
    wrong.b = torch.nn.Linear(7, 4)
    with pytest.raises(UserError, match=r"model/b.weight.fp32 has shape \(3, 7\), the network expects \(4, 7\)"):
        load_network(found, "model", wrong)


def test_what_another_process_left_under_the_same_name_is_not_taken_for_a_draft(tmp_path: Path) -> None:
    left = tmp_path / "step_00000003.tmp-a-1"
    left.mkdir()
    (left / ".MANIFEST.json.1-2.partial").write_text("{")
    store = CheckpointStore(tmp_path, rank=0, world_size=1, attempt="a")
    store.save(3, {"x": Shard(torch.zeros(4), 0, (4,))}, {})
    store.wait()
    found = newest(tmp_path)
    assert found is not None and found.step == 3
    assert not list(tmp_path.glob("*.corrupt-*"))


KILLED = """
import sys, torch
from pathlib import Path
from nexus_scale.contracts import Shard
from nexus_scale.engine.checkpoint import CheckpointStore
store = CheckpointStore(Path(sys.argv[1]), rank=0, world_size=1, attempt="doomed", keep=3)
step = 10
while True:
    step += 1
    store.save(step, {"x": Shard(torch.full((2_000_000,), float(step)), 0, (2_000_000,))}, {})
    store.wait()
    print(step, flush=True)
"""


def test_kill_during_a_save_leaves_what_was_committed(tmp_path: Path) -> None:
    for delay in (0.0, 0.004, 0.011):
        log, root = tmp_path / f"log after {delay} s", tmp_path / "checkpoints"
        process = script(KILLED, str(root), log=log)
        until(lambda log=log: log.exists() and "\n" in log.read_text())
        time.sleep(delay)
        process.kill()
        process.join()
        committed = int(log.read_text().split("\n")[-2])
        found = newest(root)
        assert found is not None
        assert found.step >= committed
        assert torch.equal(found.tensor("x"), torch.full((2_000_000,), float(found.step)))
        assert not list(root.glob("*.corrupt-*"))
    CheckpointStore(root, rank=0, world_size=1, attempt="next")
    assert not list(root.glob("*.tmp-*"))
