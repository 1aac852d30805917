"""Power loss: of what a save did, only what was fsynced is sure to be on disk. After every single fsync the lights go out."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from nexus_scale.contracts import Shard
from nexus_scale.engine.checkpoint import CheckpointStore, newest

REAL_FSYNC = os.fsync


@dataclass
class Disk:
    """What a disk holds for sure: contents of files as of their last fsync, names in folders as of theirs, by inode.

    A name says whether it is a folder's: the file system gives the inode of a removed folder to a file.
    """

    contents: dict[int, bytes] = field(default_factory=dict)
    names: dict[int, dict[str, tuple[int, bool]]] = field(default_factory=dict)

    def synced(self, handle: int) -> None:
        number = os.fstat(handle).st_ino
        path = os.readlink(f"/proc/self/fd/{handle}")
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            self.names[number] = {entry.name: (entry.inode(), entry.is_dir()) for entry in os.scandir(path)}
        else:
            self.contents[number] = Path(path).read_bytes()

    def restore(self, number: int, to: Path) -> None:
        """The folder of that inode as it would be found after the power came back; a file that was not synced is empty."""
        to.mkdir(parents=True)
        for name, (inode, is_folder) in self.names.get(number, {}).items():
            if is_folder:
                self.restore(inode, to / name)
            else:
                (to / name).write_bytes(self.contents.get(inode, b""))

    def restore_with_all_names(self, root: Path, to: Path) -> None:
        """As above, where the file system has put all names on disk ahead of the contents."""
        for path in [root, *sorted(root.rglob("*"))]:
            copy = to / path.relative_to(root)
            if path.is_dir():
                copy.mkdir(parents=True)
            else:
                copy.write_bytes(self.contents.get(path.stat().st_ino, b""))


def test_power_loss_after_any_fsync_leaves_the_newest_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, disk, images = tmp_path / "checkpoints", Disk(), []
    committed = 0

    def fsync(handle: int) -> None:
        REAL_FSYNC(handle)
        disk.synced(handle)
        for kind in ("names as synced", "names ahead"):
            image = tmp_path / f"{len(images):03d}"
            if kind == "names as synced":
                disk.restore(root.stat().st_ino, image)
            else:
                disk.restore_with_all_names(root, image)
            images.append((image, kind, committed))

    root.mkdir()
    monkeypatch.setattr(os, "fsync", fsync)
    store = CheckpointStore(root, rank=0, world_size=1, attempt="a", keep=2)
    for step in (1, 2, 3, 4):
        store.save(step, {"x": Shard(torch.full((5000,), float(step)), 0, (5000,))}, {})
        store.wait()
        committed = step
    store.save(4, {"x": Shard(torch.full((5000,), 4.0), 0, (5000,))}, {})  # again, as after a rollback
    store.wait()
    monkeypatch.undo()

    assert len(images) > 30, "the watch on fsync is broken"
    newest_steps = set()
    for image, kind, known in images:
        CheckpointStore(image, rank=0, world_size=1, attempt="next")  # the next start clears up
        found = newest(image)
        assert (found.step if found else 0) >= known, (
            f"{image.name} ({kind}): step {known} was committed, found {found}"
        )
        assert not list(image.glob("*.corrupt-*")), f"{image.name} ({kind}): something torn had a checkpoint's name"
        if found is not None:
            newest_steps.add(found.step)
            assert torch.equal(found.tensor("x"), torch.full((5000,), float(found.step)))
    assert newest_steps == {1, 2, 3, 4}


def test_a_write_that_is_not_synced_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: without the fsync of the data, the images above must show it."""
    from nexus_scale.engine.checkpoint import folder as in_folder

    def lazy(path: Path, header: bytes, data: memoryview, halfway: object) -> tuple[int, str]:
        import xxhash

        path.write_bytes(header + bytes(data))
        return len(header) + len(data), xxhash.xxh3_128_hexdigest(header + bytes(data))

    monkeypatch.setattr(in_folder, "write_file", lazy)
    with pytest.raises(AssertionError, match=r"was committed|had a checkpoint's name"):
        test_power_loss_after_any_fsync_leaves_the_newest_committed(tmp_path, monkeypatch)
