"""Batches: the right values at the right positions for every number of ranks, and never a damaged byte among them."""

from __future__ import annotations

import mmap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nexus_scale.contracts import Batch, Progress, UserError
from nexus_scale.data import loader as loaders
from nexus_scale.data import windows
from nexus_scale.data.loader import BadData, DataError, Dataset, Loader, Source, next_draw
from nexus_scale.data.manifest import Field, Manifest
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.data.synthetic import SyntheticDataset
from nexus_scale.processes.latents import LatentStats

torch.set_num_threads(1)
SAMPLES, PER_SHARD = 50, 8


def make(folder: Path, fields: list[Field], value: Any, samples: int = SAMPLES, **manifest: Any) -> Manifest:
    for first in range(0, samples, PER_SHARD):
        with ShardWriter(folder / f"{first // PER_SHARD:05d}.tar", fields) as writer:
            for number in range(first, min(first + PER_SHARD, samples)):
                writer.write(f"{number:06d}", value(number))
    return finish_folder(folder, **manifest)


def latents(folder: Path, samples: int = SAMPLES, base: int = 0, **manifest: Any) -> Manifest:
    fields = [Field("moments", "moments.npy", "float16", (4, 2, None)), Field("caption", "txt", "text")]
    settings = {"encoder": {"fingerprint": "vae"}, "latent": LatentStats((0.0, 1.0), (1.0, 2.0)), **manifest}

    def value(number: int) -> dict[str, Any]:
        return {"moments": np.full((4, 2, 3), base + number, np.float16), "caption": f"caption {base + number}"}

    return make(folder, fields, value, samples, **settings)


def texts(folder: Path, samples: int = SAMPLES, **manifest: Any) -> Manifest:
    fields = [Field("text", "text.npy", "float16", (None, 2)), Field("pooled", "pooled.npy", "float32", (3,))]

    def value(number: int) -> dict[str, Any]:
        return {"text": np.full((1 + number % 7, 2), number, np.float16), "pooled": np.full(3, number, np.float32)}

    return make(folder, fields, value, samples, **{"encoder": {"fingerprint": "t5"}, **manifest})


def images(folder: Path, sizes: tuple[tuple[int, int], ...] = ((4, 6),), samples: int = SAMPLES) -> Manifest:
    shape = (*sizes[0], 3) if len(sizes) == 1 else (None, None, 3)
    fields = [Field("image", "png", "uint8", shape), Field("label", "cls", "int64", ()), Field("meta", "json", "json")]

    def value(number: int) -> dict[str, Any]:
        height, width = sizes[number % len(sizes)]
        return {
            "image": np.full((height, width, 3), number, np.uint8),
            "label": number % 5,
            "meta": {"group": number % 3},
        }

    return make(folder, fields, value, samples)


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    latents(tmp_path / "latents")
    texts(tmp_path / "text")
    return tmp_path


def open_joined(root: Path, **settings: Any) -> Dataset:
    return Dataset.open([Source([root / "latents", root / "text"])], text_tokens=4, window=3, **settings)


def check(batch: Batch) -> None:
    """Every field holds the values that its sample's number says."""
    for row, number in enumerate(batch.samples.tolist()):
        assert (batch["moments"][row] == number).all() and (batch["pooled"][row] == number).all()
        length = min(1 + number % 7, 4)
        assert batch["text_mask"][row].tolist() == [True] * length + [False] * (4 - length)
        assert (batch["text"][row, :length] == number).all() and (batch["text"][row, length:] == 0).all()


def draws(
    dataset: Any, count: int, world_size: int = 1, micro: int = 4, batch: int = 24, **settings: Any
) -> list[np.ndarray]:
    """Samples of each global batch by position, put together from all ranks, values checked."""
    loaders = [
        Loader(dataset, seed=1, global_batch=batch, micro_batch=micro, rank=rank, world_size=world_size, progress=Progress(), **settings)
        for rank in range(world_size)
    ]  # fmt: skip
    found = []
    for draw in range(count):
        seen = np.full(batch, -1)
        for loader in loaders:
            batches = loader.next_batches()
            assert len(batches) == batch // (world_size * micro) and loader.progress.draws == draw + 1
            for part in batches:
                assert len(part) == micro and part.draw == draw
                if "moments" in part and "pooled" in part:
                    check(part)
                assert (seen[part.positions.numpy()] == -1).all()
                seen[part.positions.numpy()] = part.samples.numpy()
        assert (seen >= 0).all()
        found.append(seen)
    for loader in loaders:
        loader.close()
    return found


def test_types_and_shapes(joined: Path) -> None:
    dataset = open_joined(joined)
    assert dataset.samples == SAMPLES and dataset.buckets == ("2x3",)
    assert dataset.fields == {"moments": (4, 2, None), "pooled": (3,), "text": (4, 2), "text_mask": (4,)}
    assert dataset.latent_stats == LatentStats((0.0, 1.0), (1.0, 2.0))
    assert {name: encoder["fingerprint"] for name, encoder in dataset.encoders.items()} == {
        "moments": "vae",
        "text": "t5",
        "pooled": "t5",
    }
    loader = Loader(
        dataset, seed=0, global_batch=8, micro_batch=8, rank=0, world_size=1, progress=Progress(), prefetch=0
    )
    (batch,) = loader.next_batches()
    assert {name: (value.dtype, tuple(value.shape)) for name, value in batch.fields.items()} == {
        "moments": (torch.float16, (8, 4, 2, 3)),
        "pooled": (torch.float32, (8, 3)),
        "text": (torch.float16, (8, 4, 2)),
        "text_mask": (torch.bool, (8, 4)),
    }
    computed = batch.on("cpu")
    assert {name: value.dtype for name, value in computed.fields.items()} == {
        "moments": torch.float32, "pooled": torch.float32, "text": torch.float32, "text_mask": torch.bool,
    }  # fmt: skip
    assert all(torch.equal(computed[name], value.to(computed[name].dtype)) for name, value in batch.fields.items())
    assert {value.device.type for value in batch.on("meta").fields.values()} == {"meta"}
    assert batch.bucket == "2x3" and batch.positions.dtype == batch.samples.dtype == torch.int64
    assert dataset.keys(batch.samples.tolist()) == [f"{n:06d}" for n in batch.samples.tolist()]
    assert dataset.texts("caption", batch.samples.tolist()) == [f"caption {n}" for n in batch.samples.tolist()]


def made_ahead(loader: Loader, taken: int) -> list[int]:
    """Draws that were made while so many batches were taken, once the thread has come to rest."""
    made: list[int] = []
    make = loader.make

    def counted(draw: int, count: int) -> list[loaders.Made]:
        made.extend(range(draw, draw + count))
        return make(draw, count)

    loader.make = counted  # type: ignore[method-assign]
    for _ in range(taken):
        loader.next_batches()
    before = -1
    while before != len(made):
        before = len(made)
        time.sleep(0.3)
    loader.close()
    return made


def test_small_batches_are_made_in_lots_and_large_ones_one_by_one(
    joined: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loader() -> Loader:
        return Loader(
            open_joined(joined), seed=1, global_batch=8, micro_batch=4, rank=0, world_size=1, progress=Progress(), prefetch=2
        )  # fmt: skip

    # The first alone, then lots of eight: two that wait, a third as soon as the first batch of the first is taken.
    assert made_ahead(loader(), 1) == list(range(1 + 2 * 8))
    assert made_ahead(loader(), 2) == made_ahead(loader(), 9) == list(range(1 + 3 * 8))
    assert made_ahead(loader(), 10) == list(range(1 + 4 * 8))
    monkeypatch.setattr(loaders, "_LOT_BYTES", 1)
    assert made_ahead(loader(), 1) == list(range(1 + 2 + 1))
    assert made_ahead(loader(), 7) == list(range(7 + 2 + 1))


@pytest.mark.parametrize("prefetch", [0, 2])
def test_one_sequence_for_every_number_of_ranks(joined: Path, prefetch: int) -> None:
    dataset = open_joined(joined)
    whole = draws(dataset, 7, prefetch=prefetch)
    for world_size, micro in ((2, 12), (2, 3), (3, 2), (8, 1)):
        again = draws(dataset, 7, world_size, micro, prefetch=prefetch)
        assert all(np.array_equal(a, b) for a, b in zip(whole, again, strict=True))
    for epoch in range(3):
        ids = np.concatenate(whole)[epoch * SAMPLES : (epoch + 1) * SAMPLES]
        assert sorted(ids) == list(range(SAMPLES))


def test_whole_windows_and_ranges_give_the_same(joined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []
    for name in ("_read_whole", "_read_ranges"):
        original = getattr(windows.ShardReader, name)
        monkeypatch.setattr(
            windows.ShardReader, name, lambda *a, _o=original, _n=name: (ways.append(_n), _o(*a))[1]
        )  # fmt: skip
    whole = draws(open_joined(joined), 5, prefetch=0)  # a thread ahead would read more, or less, by its luck
    assert set(ways) == {"_read_whole"} and len(ways) <= 2 * 3 * 3  # each window once an epoch, in both folders
    ways.clear()
    small = draws(open_joined(joined, memory_bytes=1024), 5)
    assert set(ways) == {"_read_ranges"}
    ways.clear()
    many = draws(open_joined(joined), 5, world_size=8, micro=3)
    assert set(ways) == {"_read_ranges"}
    assert all(np.array_equal(a, b) and np.array_equal(a, c) for a, b, c in zip(whole, small, many, strict=True))


def test_windows_begin_with_a_page(joined: Path) -> None:
    training = Loader(
        open_joined(joined), seed=0, global_batch=8, micro_batch=8, rank=0, world_size=1, progress=Progress(), prefetch=0
    )  # fmt: skip
    training.next_batches()
    readers = training._reader._shards[0].values()  # type: ignore[attr-defined]
    held = [window for reader in readers for stream in reader._windows.values() for window in stream.values()]
    assert held and all(window.buffer.data_ptr() % mmap.PAGESIZE == 0 for window in held)
    training.close()


def test_progress_decides_what_comes_next(joined: Path) -> None:
    dataset = open_joined(joined)
    whole = draws(dataset, 12)
    progress = Progress(draws=5)
    loader = Loader(dataset, seed=1, global_batch=24, micro_batch=24, rank=0, world_size=1, progress=progress)

    def take() -> tuple[int, np.ndarray]:
        (batch,) = loader.next_batches()
        return batch.draw, batch.samples.numpy()

    for expected in (5, 6):  # a resume
        draw, samples = take()
        assert draw == expected and np.array_equal(samples, whole[expected])
    progress.draws, progress.skipped = 2, [(3, 4), (5, 5)]  # a rollback that passes over batches
    for expected in (2, 6, 7):
        draw, samples = take()
        assert draw == expected and np.array_equal(samples, whole[expected])
    progress.draws = 11
    assert take()[0] == 11 and progress.draws == 12
    loader.close()
    assert not [t for t in threading.enumerate() if t.name == "loader"]
    assert next_draw(0, [(5, 9), (0, 4)]) == 10 and next_draw(3, []) == 3


def test_the_stage_is_told_and_waiting_is_counted(joined: Path) -> None:
    told: list[str] = []
    loader = Loader(
        open_joined(joined), seed=0, global_batch=8, micro_batch=8, rank=0, world_size=1, progress=Progress(), stage=told.append
    )  # fmt: skip
    loader.next_batches()
    assert told == ["data"] and loader.wait_seconds > 0
    loader.close()


def test_for_a_gpu_the_thread_pins_what_is_copied_there(joined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[tuple[str, list[str], str]] = []

    def pin(values: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
        pinned.append((str(device), sorted(values), threading.current_thread().name))
        return values

    monkeypatch.setattr("nexus_scale.data.loader.pinned", pin)
    dataset = open_joined(joined)
    loader = Loader(
        dataset, seed=0, global_batch=8, micro_batch=4, rank=0, world_size=1, progress=Progress(), device="cuda:1"
    )  # fmt: skip
    first, *_ = loader.next_batches()
    loader.close()
    assert pinned[0][:2] == ("cuda:1", ["places"]), "and positions, once"
    assert pinned[1] == ("cuda:1", sorted(first.fields), "loader")


@pytest.mark.gpu
def test_batches_for_a_gpu_are_pinned_and_the_same(joined: Path) -> None:
    def batches(device: str) -> list[Batch]:
        loader = Loader(
            open_joined(joined), seed=0, global_batch=8, micro_batch=4, rank=0, world_size=1, progress=Progress(), device=device
        )  # fmt: skip
        taken = [batch for _ in range(4) for batch in loader.next_batches()]
        loader.close()
        return taken

    for there, here in zip(batches("cuda"), batches("cpu"), strict=True):
        assert all(value.is_pinned() for value in (*there.fields.values(), there.positions))
        placed, expected = there.on("cuda"), here.on("cpu")
        assert all(torch.equal(placed[name].cpu(), expected[name]) for name in expected.fields)


def test_sources_mix_and_are_told_apart(tmp_path: Path) -> None:
    latents(tmp_path / "a", 40)
    latents(tmp_path / "b", 24, base=100)
    dataset = Dataset.open([Source([tmp_path / "a"], 1.0), Source([tmp_path / "b"], 3.0)], window=2)
    loader = Loader(dataset, seed=0, global_batch=16, micro_batch=16, rank=0, world_size=1, progress=Progress())
    seen: list[int] = []
    for _ in range(6):
        (batch,) = loader.next_batches()
        value = batch["moments"][:, 0, 0, 0].long()
        assert torch.equal(value, torch.where(batch.samples < 40, batch.samples, batch.samples + 60))
        assert int((batch.samples >= 40).sum()) == 12
        seen += batch.samples.tolist()
    loader.close()
    from_b = [s for s in seen if s >= 40]
    assert sorted(from_b[:24]) == list(range(40, 64)) == sorted(from_b[24:48])
    assert dataset.texts("caption", [3, 40]) == ["caption 3", "caption 100"]


def test_images_labels_and_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nexus_scale.data import fields

    decoded: list[int] = []
    original = fields.decode_image
    monkeypatch.setattr(fields, "decode_image", lambda data: (decoded.append(1), original(data))[1])
    images(tmp_path / "images", ((4, 6), (6, 4), (5, 5)))
    dataset = Dataset.open([Source([tmp_path / "images"])], ["image", "label", "group"], window=2)
    assert dataset.fields == {"image": (3, None, None), "label": (), "group": ()}
    loader = Loader(dataset, seed=0, global_batch=6, micro_batch=3, rank=0, world_size=1, progress=Progress())
    seen = set()
    for _ in range(40):
        for batch in loader.next_batches():
            height, width = map(int, batch.bucket.split("x"))
            assert batch["image"].shape == (3, 3, height, width) and batch["image"].is_contiguous()
            numbers = batch.samples.float()
            assert torch.allclose(batch["image"], (numbers / 127.5 - 1)[:, None, None, None].expand_as(batch["image"]))
            assert torch.equal(batch["label"], batch.samples % 5) and torch.equal(batch["group"], batch.samples % 3)
            seen.update(batch.samples.tolist())
    loader.close()
    assert seen == set(range(SAMPLES)) and len(decoded) == SAMPLES  # each image was decoded once


@pytest.mark.parametrize(
    ("count", "world_size", "batch", "expected"), [(48, 1, 16, 48), (48, 2, 16, 48), (47, 2, 8, 46), (99, 4, 3, 48)]
)
def test_fixed_samples(
    joined: Path, count: int, world_size: int, batch: int, expected: int, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = open_joined(joined)
    reference = {int(p): int(s) for b in dataset.fixed(50) for p, s in zip(b.positions, b.samples, strict=True)}
    ranks = [list(open_joined(joined).fixed(count, rank, world_size, batch)) for rank in range(world_size)]
    assert len({tuple(len(b) for b in batches) for batches in ranks}) == 1
    found = {}
    for part in (part for batches in ranks for part in batches):
        check(part)
        assert len(part) <= batch
        found.update(zip(part.positions.tolist(), part.samples.tolist(), strict=True))
    assert len(found) == expected and set(found) <= set(range(min(count, SAMPLES)))
    assert all(reference[position] == number for position, number in found.items())
    assert ("leaving out" in caplog.text) == (expected < min(count, SAMPLES)) and ("taking all" in caplog.text) == (
        count > SAMPLES
    )


# --------------------------------------------------------------------------------------------- damage


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def damages(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    header_of_third = 2 * 3 * 512  # each sample of `latents`: two headers and two payloads, in 1024 + 512 ... bytes
    return {
        "a payload bit": lambda: flip(path, 700),
        "a header": lambda: path.write_bytes(data[:header_of_third] + b"\xff" * 512 + data[header_of_third + 512 :]),
        "cut in a payload": lambda: path.write_bytes(data[:700]),
        "cut between members": lambda: path.write_bytes(data[:header_of_third]),
        "no bytes": lambda: path.write_bytes(b""),
        "longer": lambda: path.write_bytes(data + bytes(512)),
        "missing": path.unlink,
    }


@pytest.mark.parametrize("memory_bytes", [1 << 20, 1024])
@pytest.mark.parametrize(
    "damage", ["a payload bit", "a header", "cut in a payload", "cut between members", "no bytes", "missing"]
)
def test_damage_never_trains(joined: Path, damage: str, memory_bytes: int) -> None:
    dataset = open_joined(joined, memory_bytes=memory_bytes)
    shard = joined / "latents" / "00003.tar"
    damages(shard)[damage]()
    loader = Loader(dataset, seed=1, global_batch=10, micro_batch=10, rank=0, world_size=1, progress=Progress())

    def epoch() -> None:
        for _ in range(5):
            for batch in loader.next_batches():
                assert memory_bytes == 1024 or not set(batch.samples.tolist()) & set(range(24, 32))
                check(batch)

    with pytest.raises(DataError, match=r"latents/00003\.tar") as raised:
        epoch()
    assert raised.value.code == 3
    before = loader.progress.draws
    with pytest.raises(DataError, match=r"latents/00003\.tar"):  # and it does not go on behind the damage
        loader.next_batches()
    assert loader.progress.draws == before
    loader.close()
    if damage != "a payload bit":
        with (
            pytest.raises(DataError, match="00003") if damage != "a header" else pytest.raises(DataError, match="hash")
        ):
            open_joined(joined, verify="hashes")


def test_the_damaged_sample_is_named(joined: Path) -> None:
    dataset = open_joined(joined)
    index = dataset.sources[0][0].index
    flip(joined / "latents" / "00003.tar", int(index.start[27]) + 600)
    loader = Loader(
        dataset, seed=1, global_batch=50, micro_batch=50, rank=0, world_size=1, progress=Progress(), prefetch=0
    )
    with pytest.raises(DataError, match=r"sample '000027' \(number 27\)"):
        loader.next_batches()


def test_a_shard_that_grew_is_refused(joined: Path) -> None:
    damages(joined / "latents" / "00003.tar")["longer"]()
    with pytest.raises(DataError, match="00003"):
        open_joined(joined)
    with pytest.raises(DataError, match=r"00003.*more than"):
        draws(open_joined(joined, verify="none", bad=BadData("stop")), 3)
    draws(open_joined(joined, verify="none"), 3)  # each of its samples has its hash, and `draws` checks their values


def test_an_undecodable_image_is_named(tmp_path: Path) -> None:
    fields = [Field("image", "png", "uint8", None)]
    with ShardWriter(tmp_path / "d" / "0.tar", fields) as writer:
        for number in range(4):
            writer.write(f"s{number}", {"image": np.zeros((8, 8, 3), np.uint8)}, bucket="x")
    data = (tmp_path / "d" / "0.tar").read_bytes()
    end = data.index(b"IEND") - 20
    with ShardWriter(tmp_path / "d" / "0.tar", fields) as writer:
        for number in range(4):
            png = data[512:end] if number == 2 else data[512 : data.index(b"IEND") + 8]
            writer.write(f"s{number}", {"image": png}, bucket="x")
    finish_folder(tmp_path / "d")
    dataset = Dataset.open([Source([tmp_path / "d"])])
    with pytest.raises(DataError, match=r"0\.tar: .*sample 's2'.*decoded"):
        draws(dataset, 1, batch=4)


def test_shapes_of_one_batch_must_agree(tmp_path: Path) -> None:
    fields = [Field("codes", "codes.npy", "int32", (2, None))]
    with ShardWriter(tmp_path / "0.tar", fields) as writer:
        for number in range(4):
            writer.write(f"{number}", {"codes": np.full((2, 3 + number // 3), number, np.int32)})
    finish_folder(tmp_path)
    with pytest.raises(DataError, match=r"shapes \[\(2, 3\), \(2, 4\)\] in one batch"):
        draws(Dataset.open([Source([tmp_path])]), 1, batch=4)


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "bool", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64"]
)
def test_every_dtype(tmp_path: Path, dtype: str) -> None:
    high = 1 if dtype == "bool" else min(60000, np.iinfo(dtype).max) if "int" in dtype else 1000
    values = np.array([[0, 1, high, 3 % (high + 1)]] * 5).astype(dtype)
    fields = [Field("x", "x.npy", dtype, (4,)), Field("n", "n.npy", dtype, ()), Field("s", "s.npy", dtype, (None,))]
    with ShardWriter(tmp_path / "0.tar", fields) as writer:
        for number in range(5):
            writer.write(f"{number}", {"x": values[number], "n": values[number, 2], "s": values[number, :3]})
    finish_folder(tmp_path)
    dataset = Dataset.open([Source([tmp_path])], text_tokens=2)
    loader = Loader(
        dataset, seed=0, global_batch=4, micro_batch=4, rank=0, world_size=1, progress=Progress(), prefetch=0
    )
    (stored,) = loader.next_batches()
    assert stored["x"].dtype == stored["n"].dtype == stored["s"].dtype == getattr(torch, dtype)
    want = torch.bool if dtype == "bool" else torch.int64 if "int" in dtype else torch.float32
    assert {value.dtype for name, value in stored.on("cpu").fields.items() if name != "s_mask"} == {want}
    for batch in (stored, stored.on("cpu")):
        assert batch["x"].tolist() == values[:4].tolist() and batch["n"].tolist() == values[:4, 2].tolist()
        assert batch["s"].tolist() == values[:4, :2].tolist()


def test_numbers_of_every_writing(tmp_path: Path) -> None:
    numbers = [0, 7, 123, 99999, -5, 10**17, 10**18 + 3]
    for chosen in (numbers[:4], numbers):  # read at once, and one by one
        with ShardWriter(tmp_path / "0.tar", [Field("label", "cls", "int64", ())]) as writer:
            for row, number in enumerate(chosen):
                writer.write(f"{row}", {"label": number})
        finish_folder(tmp_path)
        (batch,) = Dataset.open([Source([tmp_path])]).fixed(len(chosen))
        assert batch["label"].tolist() == [chosen[n] for n in batch.samples.tolist()]


# --------------------------------------------------------------------------------------- refused at once


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    latents(tmp_path / "a")
    latents(tmp_path / "vae2", encoder={"fingerprint": "other"})
    latents(tmp_path / "stats2", latent=LatentStats((0.0, 0.0), (1.0, 2.0)))
    texts(tmp_path / "short", 40)
    texts(tmp_path / "text")
    with ShardWriter(tmp_path / "keys" / "00000.tar", [Field("caption", "txt", "text")]) as writer:
        for number in range(50):
            writer.write(f"{number:06d}" if number != 7 else "seven", {"caption": ""})
    finish_folder(tmp_path / "keys")
    both = Source([tmp_path / "a", tmp_path / "text"])
    for sources, settings, says in (
        ([Source([tmp_path / "none"])], {}, "no such data folder"),
        ([Source([tmp_path / "a", tmp_path / "short"])], {}, "different samples"),
        ([Source([tmp_path / "a", tmp_path / "keys"])], {}, "sample 7 is '000007' here and 'seven' there"),
        ([Source([tmp_path / "a"]), Source([tmp_path / "vae2"])], {}, "got data of encoder other, expected vae"),
        ([Source([tmp_path / "a"]), Source([tmp_path / "stats2"])], {}, "got latent statistics"),
        ([both, Source([tmp_path / "a"])], {"text_tokens": 3}, "a source of 1 folders, expected 2"),
        ([both], {}, "set data.text_tokens"),
        ([both], {"fields": ["moments", "imagine"]}, "no field 'imagine'"),
        ([both], {"fields": ["caption"]}, "no field 'caption' that becomes a tensor"),
        ([Source([])], {}, "with folders"),
        ([], {}, "at least one"),
    ):
        with pytest.raises(UserError, match=says) as raised:
            Dataset.open(sources, **settings)  # type: ignore[arg-type]
        assert raised.value.code == 3
    chosen = Dataset.open([both], ["moments", "text_mask"], text_tokens=3)
    assert set(chosen.fields) == {"moments", "text", "text_mask"}
    chosen.check_encoders({"moments": "vae", "text": "t5", "other": "x"})
    with pytest.raises(UserError, match="encoder t5, expected clip"):
        chosen.check_encoders({"text": "clip"})


def test_the_hash_names_data_and_reading(joined: Path) -> None:
    one = open_joined(joined)
    assert one.hash == open_joined(joined).hash
    assert one.hash != Dataset.open([Source([joined / "latents", joined / "text"])], text_tokens=5, window=3).hash
    latents(joined / "latents", base=1)
    assert open_joined(joined).hash != one.hash


def test_batches_that_do_not_divide(joined: Path) -> None:
    common: dict[str, Any] = {"seed": 0, "rank": 0, "progress": Progress()}
    with pytest.raises(UserError, match=r"micro_batch can be \[1, 2, 3, 4, 6, 12\]"):
        Loader(open_joined(joined), global_batch=24, micro_batch=5, world_size=2, **common)
    with pytest.raises(UserError, match="number of workers that divides"):
        Loader(open_joined(joined), global_batch=24, micro_batch=1, world_size=5, **common)


def test_an_unexpected_error_in_the_thread_surfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = SyntheticDataset(8, {"x": {"shape": [2]}})
    loader = Loader(dataset, seed=0, global_batch=4, micro_batch=4, rank=0, world_size=1, progress=Progress())
    monkeypatch.setattr(loader._reader, "read", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="failed at global batch 0") as raised:
        loader.next_batches()
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    loader.close()


# ------------------------------------------------------------------------------------------ synthetic


def test_synthetic_samples() -> None:
    spec = {
        "moments": {"shape": [4, 8, 8]},
        "text": {"shape": [6, 3], "lengths": True},
        "label": {"shape": [], "dtype": "int64", "high": 5},
        "flag": {"shape": [2], "dtype": "bool"},
    }
    dataset = SyntheticDataset(64, spec)
    assert dataset.samples == 64 and dataset.fields["text_mask"] == (6,)
    whole = draws(dataset, 6, 2)
    assert sorted(np.concatenate(whole)[:64]) == list(range(64))
    values: dict[int, torch.Tensor] = {}
    for batch in dataset.fixed(64, batch=16):
        for row, number in enumerate(batch.samples.tolist()):
            values[number] = batch["moments"][row]
        lengths = batch["text_mask"].sum(1)
        assert lengths.min() >= 1 and (batch["text"][~batch["text_mask"]] == 0).all()
        assert batch["label"].shape == (16,) and batch["label"].min() >= 0 and batch["label"].max() < 5
        assert batch["flag"].dtype == torch.bool
    for batch in SyntheticDataset(64, spec).fixed(10, batch=3):  # however it is asked for
        assert all(torch.equal(batch["moments"][row], values[n]) for row, n in enumerate(batch.samples.tolist()))
    all_values = torch.stack(list(values.values()))
    assert abs(all_values.mean()) < 0.03 and abs(all_values.std() - 1) < 0.03
    other = next(SyntheticDataset(64, spec, seed=1).fixed(1))
    assert not torch.equal(other["moments"][0], values[int(other.samples[0])])
    for bad in (
        {"shape": [2], "dtype": "int8"},
        {"shape": [2], "dtype": "int64"},
        {"size": [2]},
        {"shape": [], "lengths": True},
    ):
        with pytest.raises(UserError, match=r"data\.synthetic\.fields\.x"):
            SyntheticDataset(4, {"x": bad})
