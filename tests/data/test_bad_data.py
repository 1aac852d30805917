"""Bad data: never trained on, replaced alike by every rank of any number of ranks, counted, and refused above the limit."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nexus_scale.contracts import Batch, Progress, UserError
from nexus_scale.data import shards
from nexus_scale.data.bad import CANDIDATES
from nexus_scale.data.images import MAX_PIXELS
from nexus_scale.data.loader import BadData, DataError, Dataset, Loader, Source
from nexus_scale.data.manifest import Field, Manifest
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.io import incidents

torch.set_num_threads(1)
SAMPLES, PER_SHARD, BATCH = 64, 8, 16
EPOCH = SAMPLES // BATCH
LENIENT = BadData(limit=0.3)
FIELDS = [Field("x", "x.npy", "float16", (3,)), Field("label", "cls", "int64", ())]


def write(folder: Path, fields: list[Field], value: Callable[[int], dict[str, Any]], bucket: Any = None) -> Manifest:
    for first in range(0, SAMPLES, PER_SHARD):
        with ShardWriter(folder / f"{first // PER_SHARD:05d}.tar", fields) as writer:
            for number in range(first, first + PER_SHARD):
                writer.write(f"{number:06d}", value(number), bucket and bucket(number))
    return finish_folder(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data", FIELDS, lambda n: {"x": np.full(3, n, np.float16), "label": n % 4}, lambda n: f"b{n % 2}")
    return tmp_path / "data"


def loader(dataset: Dataset, rank: int = 0, world_size: int = 1, micro: int = 4, **settings: Any) -> Loader:
    settings = {"progress": Progress(), "prefetch": 0, **settings}
    return Loader(dataset, seed=3, global_batch=BATCH, micro_batch=micro, rank=rank, world_size=world_size, **settings)


def check(batch: Batch) -> None:
    assert torch.equal(batch["x"], batch.samples.float()[:, None].expand(-1, 3))
    assert torch.equal(batch["label"], batch.samples % 4)
    assert {f"b{n % 2}" for n in batch.samples.tolist()} == {batch.bucket}


def epochs(dataset: Dataset, draws: int = 2 * EPOCH, world_size: int = 1, **settings: Any) -> tuple[np.ndarray, int]:
    """Samples of all draws by position, (draws, B), values checked, and how many were replaced."""
    ranks = [loader(dataset, rank, world_size, BATCH // world_size // 2, **settings) for rank in range(world_size)]
    seen = np.full((draws, BATCH), -1)
    for draw in range(draws):
        for one in ranks:
            for batch in one.next_batches():
                check(batch)
                seen[draw, batch.positions.numpy()] = batch.samples.numpy()
    for one in ranks:
        one.close()
    assert (seen >= 0).all()
    return seen, sum(one.replaced for one in ranks)


def exhaust(training: Loader, into: list[np.ndarray] | None = None) -> None:
    """Takes batches until one cannot be made, as some few times the data must come to."""
    for _ in range(20 * EPOCH):
        batches = training.next_batches()
        if into is not None:
            into.append(np.concatenate([batch.samples.numpy() for batch in batches]))


def flip(path: Path, *places: int) -> None:
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 0x10
    path.write_bytes(data)


def alien(path: Path) -> None:
    """Another good shard of the same size under this name."""
    with ShardWriter(path, FIELDS) as writer:
        for number in range(PER_SHARD):
            writer.write(f"{number:06d}", {"x": np.full(3, -1 - number, np.float16), "label": 0})


def fewer(path: Path) -> None:
    """The shard without its last sample, and a valid tar again."""
    data = path.read_bytes()
    path.write_bytes(data[: (PER_SHARD - 1) * 2048] + bytes(1024))


def twice(path: Path) -> None:
    """The first sample in the place of the second: a key twice, and one missing."""
    data = path.read_bytes()
    path.write_bytes(data[:2048] * 2 + data[4096:])


SAMPLE = 2048  # header and payload of both fields
DAMAGES: dict[str, tuple[Callable[[Path], object], set[int]]] = {
    "a payload bit": (lambda p: flip(p, SAMPLE + 512 + 130), {1}),
    "a bit of a header's name": (lambda p: flip(p, 2 * SAMPLE + 3), {2}),
    "bits of two samples": (lambda p: flip(p, 700, 5 * SAMPLE + 700), {0, 5}),
    "cut in a header": (lambda p: os.truncate(p, 3 * SAMPLE + 100), set(range(3, 8))),
    "cut at a boundary": (lambda p: os.truncate(p, 6 * SAMPLE), {6, 7}),
    "cut in a payload": (lambda p: os.truncate(p, 6 * SAMPLE + 600), {6, 7}),
    "zeroed": (lambda p: p.write_bytes(bytes(p.stat().st_size)), set(range(8))),
    "empty": (lambda p: p.write_bytes(b""), set(range(8))),
    "a header of garbage": (lambda p: flip(p, *range(4 * SAMPLE, 4 * SAMPLE + 512)), {4}),
    "missing": (Path.unlink, set(range(8))),
    "a folder in its place": (lambda p: (p.unlink(), p.mkdir()), set(range(8))),
    "alien": (alien, set(range(8))),
    "one sample fewer": (fewer, {7}),
    "a key twice": (twice, {1}),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + bytes(512)), set()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_replaced_alike_by_all(folder: Path, damage: str) -> None:
    whole, _ = epochs(Dataset.open([Source([folder])]))
    dataset = Dataset.open([Source([folder])], bad=LENIENT)
    act, places = DAMAGES[damage]
    act(folder / "00002.tar")
    bad = {2 * PER_SHARD + place for place in places}
    told: list[tuple[str, str, dict[str, Any]]] = []

    seen, replaced = epochs(dataset, note=lambda kind, message, **facts: told.append((kind, message, facts)))
    stood_in = seen != whole
    assert np.array_equal(stood_in, np.isin(whole, sorted(bad))) and replaced == stood_in.sum() == 2 * len(bad)
    assert not np.isin(seen, sorted(bad)).any()
    assert [kind for kind, _, _ in told] == ["bad_data"] and "00002.tar" in told[0][1] and told[0][2]["bad"] == len(bad)

    for settings in ({"world_size": 2}, {"world_size": 8}, {"prefetch": 2}):
        again, count = epochs(dataset, **settings)
        assert np.array_equal(again, seen) and count == replaced
    ranged, _ = epochs(Dataset.open([Source([folder])], bad=LENIENT, memory_bytes=64, verify="none"))
    assert np.array_equal(ranged, seen)  # samples read one by one
    late = loader(dataset, progress=Progress(draws=5))
    assert np.array_equal(np.concatenate([b.samples.numpy() for b in late.next_batches()]), seen[5])  # and a resume

    strict = Dataset.open([Source([folder])], bad=BadData("stop"), verify="none")
    with pytest.raises(DataError, match=r"00002\.tar") as raised:
        epochs(strict)
    assert raised.value.code == 3


@pytest.mark.parametrize("memory_bytes", [64, 1 << 20])
def test_batches_made_together_are_those_made_one_by_one(tmp_path: Path, memory_bytes: int) -> None:
    write(tmp_path, FIELDS, lambda n: {"x": np.full(3, n, np.float16), "label": n % 4})
    dataset = Dataset.open([Source([tmp_path])], bad=LENIENT, memory_bytes=memory_bytes, window=2)
    for shard in (1, 4, 6):
        flip(tmp_path / f"{shard:05d}.tar", 700, 5 * SAMPLE + 700)
    for world_size in (1, 2):
        ranks = [loader(dataset, rank, world_size, 4) for rank in range(world_size)]
        for training in ranks:
            together, alone = training.make(2, 7), [training.make(draw)[0] for draw in range(2, 9)]
            assert [made.replaced for made in together] == [made.replaced for made in alone]
            for one, other in zip(together, alone, strict=True):
                for batch, same in zip(one.batches, other.batches, strict=True):
                    assert (batch.draw, batch.bucket) == (same.draw, same.bucket)
                    assert torch.equal(batch.samples, same.samples) and torch.equal(batch.positions, same.positions)
                    assert batch.fields.keys() == same.fields.keys()
                    assert all(torch.equal(value, same[name]) for name, value in batch.fields.items())
            training.close()
        assert sum(made.replaced for made in together) > 0


def test_above_the_limit_the_run_ends_with_a_list(folder: Path) -> None:
    dataset = Dataset.open([Source([folder])], bad=BadData(limit=3 / SAMPLES))
    flip(folder / "00001.tar", 700)
    flip(folder / "00004.tar", 700, SAMPLE + 700)
    seen, replaced = epochs(dataset)  # three are no more than the limit
    assert replaced == 6 and not np.isin(seen, [8, 32, 33]).any()
    flip(folder / "00006.tar", 700)
    failing = loader(dataset)
    for _ in range(2):
        with pytest.raises(UserError, match=r"4 of 64 samples are bad.*data\.bad\.limit") as raised:
            exhaust(failing)
        assert all(f"{shard:05d}.tar" in str(raised.value) for shard in (1, 4, 6)) and raised.value.code == 3
    with pytest.raises(DataError, match=r"1 of 64 samples.*\n.*sample '0000(08|32|48)'|2 of 64"):  # 0.1 % of 64 is none
        epochs(Dataset.open([Source([folder])]))


def test_a_shard_that_goes_bad_while_it_trains(folder: Path, tmp_path: Path) -> None:
    whole, _ = epochs(Dataset.open([Source([folder])], window=2))
    note = lambda kind, message, **facts: incidents.note(tmp_path, kind, message, **facts)  # noqa: E731
    training = loader(Dataset.open([Source([folder])], bad=LENIENT, window=2), note=note)
    first = [np.concatenate([b.samples.numpy() for b in training.next_batches()]) for _ in range(EPOCH)]
    assert np.array_equal(first, whole[:EPOCH]) and training.replaced == 0 and incidents.read(tmp_path) == []
    flip(folder / "00005.tar", 700)
    second = [np.concatenate([b.samples.numpy() for b in training.next_batches()]) for _ in range(EPOCH)]
    assert training.replaced == 1 and np.array_equal(np.stack(second) != whole[EPOCH:], whole[EPOCH:] == 40)
    (row,) = incidents.read(tmp_path)
    assert row["kind"] == "bad_data" and row["bad"] == 1 and "'000040'" in row["message"]


def test_a_missing_shard_is_refused_before_the_start(folder: Path) -> None:
    (folder / "00003.tar").unlink()
    with pytest.raises(DataError, match=r"00003\.tar: missing shard"):
        Dataset.open([Source([folder])], bad=LENIENT)


def test_files_whose_handles_were_lost_are_opened_anew(folder: Path) -> None:
    reading = loader(Dataset.open([Source([folder])], memory_bytes=64))
    reading.next_batches()
    for reader in reading._reader._shards[0].values():  # type: ignore[attr-defined]
        assert reader._files
        for file in reader._files.values():
            os.close(file)
    for _ in range(EPOCH):
        for batch in reading.next_batches():
            check(batch)
    assert reading.replaced == 0
    reading.close()


def test_a_thread_that_fails_or_vanishes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = epochs(Dataset.open([Source([folder])]))
    training = loader(Dataset.open([Source([folder])]), prefetch=2)
    got: list[np.ndarray] = []
    make, left = training.make, [1]

    def once(draw: int, count: int) -> Any:
        if draw <= 6 < draw + count and left:  # with others of its lot, and then alone
            if count == 1:
                left.pop()
            raise MemoryError("no more")
        return make(draw, count)

    monkeypatch.setattr(training, "make", once)  # before the thread starts, which may read further ahead than that
    with pytest.raises(RuntimeError, match="the loader failed at global batch 6") as raised:
        exhaust(training, got)
    assert isinstance(raised.value.__cause__, MemoryError) and len(got) == 6
    got.append(np.concatenate([b.samples.numpy() for b in training.next_batches()]))
    assert training._ahead is not None
    training._ahead.close()  # it ends, and says nothing
    while len(got) < 2 * EPOCH:
        got.append(np.concatenate([b.samples.numpy() for b in training.next_batches()]))
    training.close()
    assert np.array_equal(got, whole)


# ------------------------------------------------------------------------------------- what bytes cannot tell


def test_values_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def value(number: int) -> dict[str, Any]:
        x = np.full(3, number, np.float16)
        x[1] = {11: np.nan, 30: np.inf}.get(number, x[1])
        return {"x": x, "label": number % 4}

    with pytest.raises(DataError, match=r"sample '000011', field 'x': got 1 values that are not finite"):
        write(tmp_path / "refused", FIELDS, value, lambda n: f"b{n % 2}")

    # A folder by a writer that did not look, and does not say that it did.
    monkeypatch.setattr(shards.np, "isfinite", lambda array: np.ones(array.shape, bool))
    side_car = ShardWriter._side_car
    monkeypatch.setattr(ShardWriter, "_side_car", lambda self: {**side_car(self), "finite": False})
    manifest = write(tmp_path / "data", FIELDS, value, lambda n: f"b{n % 2}")
    monkeypatch.undo()
    assert not manifest.finite and not Manifest.load(tmp_path / "data").finite
    seen, replaced = epochs(Dataset.open([Source([tmp_path / "data"])], bad=LENIENT))
    assert replaced == 4 and not np.isin(seen, [11, 30]).any()
    again, _ = epochs(Dataset.open([Source([tmp_path / "data"])], bad=LENIENT), world_size=4)
    assert np.array_equal(again, seen)


def test_large_values_are_finite(tmp_path: Path) -> None:
    big = np.float32(3e38)
    write(tmp_path, [Field("x", "x.npy", "float32", (3,))], lambda n: {"x": np.full(3, big)})
    (tmp_path / "manifest.json").write_text((tmp_path / "manifest.json").read_text())
    dataset = Dataset.open([Source([tmp_path])])
    object.__setattr__(dataset.sources[0][0], "finite", False)
    (batch,) = loader(dataset, micro=BATCH).next_batches()
    assert (batch["x"] == big).all()


def test_samples_that_cannot_be_decoded(tmp_path: Path) -> None:
    """A cut image, a bomb, one of another size, and a text of no tokens: their bytes are what the writer wrote."""
    from PIL import Image

    def png(number: int) -> Any:
        pixels = np.full((4, 6, 3), number, np.uint8)
        if number == 9:
            return shards.encode_png(pixels)[:45]
        if number == 21:
            path = tmp_path / "bomb.png"
            Image.new("1", (1 << 14, (MAX_PIXELS >> 14) + 1)).save(path)
            return path.read_bytes()
        return np.zeros((5, 6, 3), np.uint8) if number == 33 else pixels

    def value(number: int) -> dict[str, Any]:
        return {"image": png(number), "text": np.full((0 if number == 50 else 2, 2), number, np.float16)}

    fields = [Field("image", "png", "uint8", None), Field("text", "text.npy", "float16", (None, 2))]
    size = shards.image_size
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shards, "image_size", lambda data: (4, 6) if len(data) > 1000 else size(data))
        write(tmp_path / "data", fields, value, lambda n: "4x6")
    dataset = Dataset.open([Source([tmp_path / "data"])], text_tokens=2, bad=LENIENT)
    for part in dataset.parts:
        if part.field.is_image:
            object.__setattr__(part.field, "shape", (4, 6, 3))
    told: list[str] = []
    reading = loader(dataset, note=lambda kind, message, **facts: told.append(message))
    seen = []
    for _ in range(EPOCH):
        for batch in reading.next_batches():
            assert torch.equal(batch["text"][:, 0, 0], batch.samples.float())
            assert torch.allclose(batch["image"][:, 0, 0, 0], batch.samples.float() / 127.5 - 1)
            seen += batch.samples.tolist()
    assert reading.replaced == 4 and not set(seen) & {9, 21, 33, 50} and len(told) == 4
    assert all(
        any(word in message for message in told) for word in ("decoded", "pixels", "(5, 6, 3)", "without tokens")
    )


def test_samples_that_lack_a_key_of_their_json(tmp_path: Path) -> None:
    described = {5: {"other": 1}, 40: {"group": "two"}}
    fields = [Field("x", "x.npy", "float32", (1,)), Field("meta", "json", "json")]
    write(tmp_path, fields, lambda n: {"x": np.full(1, n, np.float32), "meta": described.get(n, {"group": n % 3})})
    reading = loader(Dataset.open([Source([tmp_path])], ["x", "group"], bad=LENIENT), prefetch=1)
    seen = []
    for _ in range(EPOCH):
        for batch in reading.next_batches():
            assert torch.equal(batch["group"], batch.samples % 3) and torch.equal(
                batch["x"][:, 0], batch.samples.float()
            )
            seen += batch.samples.tolist()
    reading.close()
    assert reading.replaced == 2 and not set(seen) & set(described)


def test_a_bucket_with_nothing_good_left(folder: Path) -> None:
    dataset = Dataset.open([Source([folder])], bad=BadData(limit=1.0))
    for shard in folder.glob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match=rf"none of {CANDIDATES} samples tried"):
        epochs(dataset)


def test_balanced_classes_are_replaced_within_their_class(folder: Path) -> None:
    dataset = Dataset.open([Source([folder], balance=1.0)], bad=LENIENT)
    whole, _ = epochs(dataset)
    flip(folder / "00003.tar", 700)
    seen, replaced = epochs(dataset)
    assert replaced and np.array_equal(seen % 4, whole % 4)


def test_two_folders_of_one_source(tmp_path: Path) -> None:
    write(tmp_path / "x", FIELDS[:1], lambda n: {"x": np.full(3, n, np.float16)})
    write(tmp_path / "y", FIELDS[1:], lambda n: {"label": n % 4})
    dataset = Dataset.open([Source([tmp_path / "x", tmp_path / "y"])], bad=LENIENT)
    flip(tmp_path / "x" / "00000.tar", 700)
    (tmp_path / "y" / "00007.tar").unlink()
    seen, bad = set(), set(range(56, 64)) | {0}
    reading = loader(dataset)
    for _ in range(EPOCH):
        for batch in reading.next_batches():
            assert torch.equal(batch["label"], batch.samples % 4) and (batch["x"][:, 0] == batch.samples).all()
            seen |= set(batch.samples.tolist())
    assert seen == set(range(SAMPLES)) - bad and reading.replaced == len(bad)


def test_the_shards_of_these_tests_are_tars(folder: Path) -> None:
    for act in (fewer, twice):
        act(folder / "00002.tar")
        with tarfile.open(folder / "00002.tar") as tar:
            assert tar.getnames()
