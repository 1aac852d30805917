"""F4: damage to a checkpoint is found before a byte of a tensor is read, and the newest whole one is used.

NEXUS_MUTATIONS=500 runs so many; 100 unless it says otherwise.
"""

from __future__ import annotations

import builtins
import os
import shutil
from pathlib import Path

import pytest
import torch

from nexus_scale.engine.checkpoint import CheckpointStore, newest
from nexus_scale.engine.tensor_file import TensorFile
from tests.checkpoint_mutations import MUTATIONS, mutate
from tests.engine.test_checkpoint import TENSORS, shards_of

COUNT = int(os.environ.get("NEXUS_MUTATIONS", "100"))


def filled(root: Path) -> Path:
    stores = [CheckpointStore(root, rank=rank, world_size=3, attempt="a") for rank in range(3)]
    for step in (1, 2):
        for rank, store in enumerate(stores):
            # 3.0e-05: a float that JSON writes in more than one way
            store.save(step, shards_of(rank, 3, add=step), {"progress": {"step": step}, "lr": 3.0e-05})
        for store in stores:
            store.wait()
    return root


def test_mutations_are_found_before_anything_is_deserialized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    template = filled(tmp_path / "template")
    read: list[str] = []
    plain_open, plain_read = TensorFile.open.__func__, TensorFile.read_into  # type: ignore[attr-defined]

    def opened(cls: type[TensorFile], path: Path) -> TensorFile:
        read.append(f"header of {path}")
        file: TensorFile = plain_open(cls, path)
        return file

    def taken(self: TensorFile, name: str, start: int, out: torch.Tensor) -> None:
        read.append(f"{name} of {self.path}")
        plain_read(self, name, start, out)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("nothing that is read back may run as code")

    monkeypatch.setattr(TensorFile, "open", classmethod(opened))
    monkeypatch.setattr(TensorFile, "read_into", taken)
    monkeypatch.setattr(torch, "load", refused)
    monkeypatch.setattr(builtins, "eval", refused)
    monkeypatch.setattr(builtins, "exec", refused)
    for number in range(COUNT):
        root = tmp_path / "mutated"
        shutil.copytree(template, root, symlinks=True)
        what = mutate(number, root / "step_00000002", root / "step_00000001")
        found = newest(root)
        assert read == [], f"mutation {number} ({what}): read before it was verified"
        assert found is not None, f"mutation {number} ({what})"
        assert found.step == 1, f"mutation {number} ({what}) was not found"
        assert (root / "step_00000002.corrupt-0").exists(), what
        for name, tensor in TENSORS.items():
            expected = (tensor + 1).to(tensor.dtype) if tensor.is_floating_point() else tensor
            assert torch.equal(found.tensor(name), expected), f"mutation {number} ({what}): {name}"
        assert read, "the watch on reads is broken"
        read.clear()
        shutil.rmtree(root)
    assert caplog.text.count("does not verify") == COUNT


def test_every_kind_of_damage_is_among_the_sample(tmp_path: Path) -> None:
    template = filled(tmp_path / "template")
    seen: set[str] = set()
    for number in range(100):
        root = tmp_path / "mutated"
        shutil.copytree(template, root)
        seen |= set(mutate(number, root / "step_00000002", root / "step_00000001").split(" + "))
        shutil.rmtree(root)
    assert seen == {mutation.__name__ for mutation in MUTATIONS}


def test_undamaged_it_is_the_newest(tmp_path: Path) -> None:
    found = newest(filled(tmp_path))
    assert found is not None
    assert found.step == 2
