"""A folder that is not what its manifest says is refused by name, before anything trains on it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import Field, Manifest
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.processes.latents import LatentStats

FIELDS = [Field("moments", "moments.npy", "float16", (4, None, None)), Field("caption", "txt", "text")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "latents"
    for shard in range(2):
        with ShardWriter(path / f"{shard:05d}.tar", FIELDS) as writer:
            for i in range(5):
                value = np.full((4, 8, 8 + 8 * (i % 2)), i, np.float16)
                writer.write(f"{shard}_{i}", {"moments": value, "caption": "rød"})
    finish_folder(
        path,
        encoder={"kind": "vae", "fingerprint": "abc"},
        latent=LatentStats((0.5,) * 2, (2.0,) * 2),
        source="parent",
        licence="CC0",
        attribution="nobody",
    )
    return path


def test_a_manifest_comes_back_as_it_was(folder: Path) -> None:
    manifest = Manifest.load(folder)
    manifest.verify(deep=True)
    assert manifest.samples == 10 and manifest.buckets == ("8x16", "8x8")
    assert manifest.fields["moments"] == FIELDS[0] and list(manifest.fields) == ["moments", "caption"]
    assert manifest.latent == LatentStats((0.5, 0.5), (2.0, 2.0)) and manifest.source == "parent"
    assert (manifest.licence, manifest.attribution) == ("CC0", "nobody")
    assert [manifest.index.key(n) for n in (0, 4, 5, 9)] == ["0_0", "0_4", "1_0", "1_4"]
    assert manifest.index.bucket.tolist() == [1, 0, 1, 0, 1] * 2
    manifest.check_encoder("abc")


def test_the_index_finds_every_payload(folder: Path) -> None:
    manifest = Manifest.load(folder)
    column = manifest.columns["caption"]
    data = (folder / "00001.tar").read_bytes()
    for sample in range(5, 10):
        offset, length = manifest.index.offset[sample, column], manifest.index.length[sample, column]
        assert data[offset : offset + length].decode() == "rød"


def test_the_hash_follows_the_data(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    for shard in range(2):
        with ShardWriter(other / f"{shard:05d}.tar", FIELDS) as writer:
            for i in range(5):
                value = np.full((4, 8, 8 + 8 * (i % 2)), i, np.float16)
                writer.write(f"{shard}_{i}", {"moments": value, "caption": "rød" if shard + i else "red"})
    same: dict[str, Any] = {
        "encoder": {"kind": "vae", "fingerprint": "abc"},
        "latent": LatentStats((0.5,) * 2, (2.0,) * 2),
        "source": "parent",
    }
    one = finish_folder(folder, **same)
    two = finish_folder(other, **same)
    assert one.hash != two.hash and one.hash == finish_folder(folder, **same).hash


def edit(folder: Path, **changes: object) -> None:
    file = folder / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, "no such data folder"),
        (lambda f: [file.unlink() for file in f.iterdir()], "an empty folder"),
        (lambda f: (f / "manifest.json").unlink(), "did not finish"),
        (lambda f: truncate(f / "manifest.json", 100), "damaged manifest"),
        (lambda f: (f / "manifest.json").write_text("[]"), "damaged manifest"),
        (lambda f: edit(f, format="other-9"), "'other-9'"),
        (lambda f: edit(f, licence="mine"), "it was changed"),
        (lambda f: (f / "00001.tar").unlink(), "00001.tar: missing shard"),
        (lambda f: truncate(f / "00000.tar", 1024), "00000.tar: got 1024 bytes"),
        (lambda f: flip(f / "00001.tar", 700), "00001.tar: got hash"),
        (lambda f: (f / "index.safetensors").unlink(), "index.safetensors: cannot be read"),
        (lambda f: flip(f / "index.safetensors", 900), "index.safetensors: got hash"),
    ],
)
def test_damage_is_named(folder: Path, damage, says: str) -> None:  # type: ignore[no-untyped-def]
    damage(folder)
    with pytest.raises(UserError, match=says) as raised:
        Manifest.load(folder).verify(deep=True)
    assert raised.value.code == 3 and str(folder) in str(raised.value)


def test_shallow_verification_does_not_read(folder: Path) -> None:
    flip(folder / "00001.tar", 700)
    Manifest.load(folder).verify()


def test_another_encoder_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="got data of encoder abc, expected xyz") as raised:
        Manifest.load(folder).check_encoder("xyz")
    assert raised.value.code == 3


def test_latent_statistics_must_be_usable() -> None:
    for mean, std, says in (
        ((0.0,), (0.0,), "positive"),
        ((float("nan"),), (1.0,), "finite"),
        ((0.0, 0.0), (1.0,), "2 channels and std 1"),
    ):
        with pytest.raises(ValueError, match=says):
            LatentStats(mean, std)


def test_fields_of_other_kinds_are_refused() -> None:
    for extension in ("pkl", "a.pyd", "NPY", "a/b.npy", "pth"):
        with pytest.raises(UserError, match="extension"):
            Field("x", extension, "float32")
    assert Field("x", "x.npy", "float32", (-1, 3)).shape == (None, 3)
