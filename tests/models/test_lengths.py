"""Sequences of several fields and sounds in batches: caps of their own, length buckets in step across ranks, PCM to the bit."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import Batch, Progress, UserError
from nexus_scale.data.buckets import LengthBucket, assign_length, check_bounds
from nexus_scale.data.errors import DataError
from nexus_scale.data.loader import BadData, Dataset, Loader, Source
from nexus_scale.data.manifest import Field, Manifest
from nexus_scale.data.shards import ShardWriter, decode, finish_folder
from nexus_scale.data.sounds import decode_wav, encode_wav
from nexus_scale.data.synthetic import SyntheticDataset
from tests.distributed import run_ranks

torch.set_num_threads(1)
SAMPLES, PER_SHARD, BOUNDS, BOOKS = 60, 8, (4, 8, 12), 3


def frames(number: int) -> int:
    """Length of a sample's codes, 1..12."""
    return 1 + number * 7 % 12


def write(folder: Path, fields: list[Field], value: Any, **manifest: Any) -> Manifest:
    for first in range(0, SAMPLES, PER_SHARD):
        with ShardWriter(folder / f"{first // PER_SHARD:05d}.tar", fields) as writer:
            for number in range(first, min(first + PER_SHARD, SAMPLES)):
                bucket, sample = value(number)
                writer.write(f"{number:03d}", sample, bucket)
    return finish_folder(folder, **manifest)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Codes in length buckets, phonemes without, and clips: all of their sample's number."""
    root = tmp_path_factory.mktemp("speech")
    codes = [Field("codes", "codes.npy", "int16", (None, BOOKS)), Field("label", "cls", "int64", ())]
    phonemes = [Field("phonemes", "phonemes.npy", "int16", (None,))]
    clips = [Field("audio", "wav", "int16", (1, None)), Field("caption", "txt", "text")]
    write(
        root / "codes",
        codes,
        lambda n: (
            assign_length("codes", frames(n), BOUNDS).name,
            {"codes": np.full((frames(n), BOOKS), n, np.int16), "label": n % 5},
        ),
        encoder={"fingerprint": "codec"},
    )
    write(root / "phonemes", phonemes, lambda n: ("", {"phonemes": np.full(2 + n % 5, n, np.int16)}))
    write(
        root / "clips",
        clips,
        lambda n: ("", {"audio": encode_wav(np.full((1, 10 + n), n, np.int16), 16000), "caption": f"line {n}"}),
    )
    return root


def joined(root: Path, **changes: Any) -> Dataset:
    return Dataset.open([Source([root / "codes", root / "phonemes"])], tokens={"phonemes": 5}, window=3, **changes)


def check(batch: Batch) -> None:
    """Every field holds what its sample's number says, padded to the bucket's bound and no further."""
    bucket = LengthBucket.of(batch.bucket)
    assert bucket is not None and bucket.field == "codes"
    assert batch["codes"].shape == (len(batch), bucket.bound, BOOKS) and batch["codes"].dtype == torch.int16
    assert batch["phonemes"].shape == (len(batch), 5) and batch["phonemes"].dtype == torch.int16
    for row, number in enumerate(batch.samples.tolist()):
        length = frames(number)
        below = max((bound for bound in BOUNDS if bound < bucket.bound), default=0)
        assert below < length <= bucket.bound, "the least bound that holds it"
        assert batch["codes_mask"][row].tolist() == [True] * length + [False] * (bucket.bound - length)
        assert (batch["codes"][row, :length] == number).all() and (batch["codes"][row, length:] == 0).all()
        length = min(2 + number % 5, 5)
        assert batch["phonemes_mask"][row].tolist() == [True] * length + [False] * (5 - length)
        assert (batch["phonemes"][row, :length] == number).all() and (batch["phonemes"][row, length:] == 0).all()
        assert batch["label"][row] == number % 5


def loader(dataset: Any, world_size: int = 1, rank: int = 0, draws: int = 0, micro: int = 2) -> Loader:
    progress = Progress(draws, draws)
    return Loader(
        dataset, seed=3, global_batch=8, micro_batch=micro, rank=rank, world_size=world_size, progress=progress
    )


def ledger(dataset: Any, count: int, world_size: int = 1, rank: int = 0, draws: int = 0) -> list[list[Any]]:
    """Bucket, positions and samples of each micro-batch, its values checked."""
    reading = loader(dataset, world_size, rank, draws)
    found = []
    for _ in range(count):
        for batch in reading.next_batches():
            if "codes" in batch and "phonemes" in batch:
                check(batch)
            found.append([batch.draw, batch.bucket, batch.positions.tolist(), batch.samples.tolist()])
    reading.close()
    return found


def flat(parts: list[list[Any]]) -> dict[tuple[int, int], tuple[str, int]]:
    return {
        (draw, position): (bucket, sample)
        for draw, bucket, positions, samples in parts
        for position, sample in zip(positions, samples, strict=True)
    }


def test_batches_share_a_bucket_and_are_padded_to_its_bound(speech: Path) -> None:
    dataset = joined(speech)
    assert dataset.buckets == ("codes<=12", "codes<=4", "codes<=8")
    assert dataset.fields == {
        "codes": (None, BOOKS), "codes_mask": (None,), "label": (), "phonemes": (5,), "phonemes_mask": (5,),
    }  # fmt: skip
    seen = ledger(dataset, 15)
    assert {bucket for _, bucket, _, _ in seen} == set(dataset.buckets)
    drawn: dict[str, list[int]] = {}
    for (_, _), (bucket, sample) in sorted(flat(seen).items()):
        drawn.setdefault(bucket, []).append(sample)
    for bucket, samples in drawn.items():
        have = sum(
            LengthBucket("codes", b).name == bucket
            for n in range(SAMPLES)
            for b in [min(b for b in BOUNDS if frames(n) <= b)]
        )
        assert len(set(samples[:have])) == min(have, len(samples)), "nothing comes twice within an epoch of a bucket"


def test_a_resume_goes_on_where_the_run_would_have(speech: Path) -> None:
    whole = ledger(joined(speech), 12)
    for draws in (1, 5, 11):
        assert ledger(joined(speech), 12 - draws, draws=draws) == [part for part in whole if part[0] >= draws]


def rank_of(rank: int, world_size: int, root: str) -> list[list[Any]]:
    return ledger(joined(Path(root)), 10, world_size, rank)


def test_two_ranks_are_in_one_bucket_at_every_step_and_see_what_one_sees(speech: Path) -> None:
    first, second = run_ranks(2, rank_of, str(speech))
    for mine, its in zip(first, second, strict=True):
        assert mine[:2] == its[:2], "the same global batch, the same bucket"
        assert not set(mine[2]) & set(its[2])
    assert flat(first) | flat(second) == flat(ledger(joined(speech), 10))


def test_validation_keeps_buckets_apart(speech: Path) -> None:
    batches = list(joined(speech).fixed(24, batch=4))
    assert sum(map(len, batches)) == 24 and len({batch.bucket for batch in batches}) > 1
    for batch in batches:
        check(batch)


def test_a_cap_below_the_bound_cuts(speech: Path) -> None:
    dataset = Dataset.open([Source([speech / "codes"])], tokens={"codes": 6})
    batch = next(iter(dataset.fixed(60, batch=60)))
    assert {b.bucket: b["codes"].shape[1] for b in dataset.fixed(60, batch=60)} == {
        "codes<=12": 6, "codes<=4": 4, "codes<=8": 6,
    }  # fmt: skip
    assert batch["codes_mask"].shape == batch["codes"].shape[:2]
    assert dataset.hash != Dataset.open([Source([speech / "codes"])]).hash


def test_bad_samples_are_replaced_by_others_of_their_bucket(speech: Path, tmp_path: Path) -> None:
    fields = [Field("codes", "codes.npy", "int16", (None, BOOKS))]
    write(
        tmp_path / "codes",
        fields,
        lambda n: (assign_length("codes", frames(n), BOUNDS).name, {"codes": np.full((frames(n), BOOKS), n, np.int16)}),
    )
    manifest = Manifest.load(tmp_path / "codes")
    path = tmp_path / "codes" / manifest.shards[0].file
    data = bytearray(path.read_bytes())
    data[int(manifest.index.offset[3, 0]) + 130] ^= 1
    path.write_bytes(data)
    dataset = Dataset.open([Source([tmp_path / "codes"])], bad=BadData("replace", 0.1))
    for _, bucket, _, samples in ledger(dataset, 12):
        bound = LengthBucket.of(bucket)
        assert bound is not None and 3 not in samples and all(frames(n) <= bound.bound for n in samples)


def test_mistakes_in_lengths_are_named(speech: Path) -> None:
    folders = [Source([speech / "codes", speech / "phonemes"])]
    with pytest.raises(DataError, match=r"\['phonemes'\] have varying lengths; set data.text_tokens, or data.tokens"):
        Dataset.open(folders)
    with pytest.raises(
        DataError, match=r"data.tokens: got \['phonems'\], fields of varying length are \['codes', 'phonemes'\]"
    ):
        Dataset.open(folders, tokens={"phonems": 5})
    assert Dataset.open(folders, text_tokens=3).fields["phonemes"] == (3,)
    with pytest.raises(DataError, match=r"codes of length 13, the largest bound is 12"):
        assign_length("codes", 13, BOUNDS)
    for bounds in ([], [0, 4], [4, 4], [8, 4], [1.5], [True]):
        with pytest.raises(DataError, match="ascending whole numbers"):
            check_bounds(bounds)  # type: ignore[arg-type]
    assert [LengthBucket.of(name) for name in ("codes<=8", "16x16", "")] == [LengthBucket("codes", 8), None, None]


def test_a_recipe_names_a_length_for_each_field() -> None:
    values: dict[str, Any] = {
        "name": "x", "steps": 1, "global_batch": 1, "networks": {"model": {"name": "vae"}}, "objective": {"name": "elbo"},
        "data": {"train": {"sources": [{"folders": ["codes", "phonemes"]}]}, "tokens": {"codes": 300, "phonemes": 96}},
    }  # fmt: skip
    assert recipes.recipe_from(values, "test").data.tokens == {"codes": 300, "phonemes": 96}
    values["data"]["tokens"]["codes"] = 0
    with pytest.raises(UserError, match=r"data\.tokens\.codes"):
        recipes.recipe_from(values, "test")


# ------------------------------------------------------------------------------------------------- made-up lengths

MADE_UP = {
    "codes": {"shape": [12, BOOKS], "dtype": "int64", "high": 9, "lengths": True, "bounds": list(BOUNDS)},
    "phonemes": {"shape": [5], "dtype": "int64", "high": 9, "lengths": True},
}


def test_made_up_samples_have_length_buckets_too() -> None:
    dataset, plain = SyntheticDataset(40, MADE_UP), dict(MADE_UP)
    plain["codes"] = {key: value for key, value in MADE_UP["codes"].items() if key != "bounds"}  # type: ignore[attr-defined]
    same = SyntheticDataset(40, plain)
    assert dataset.fields["codes"] == (None, BOOKS) and same.fields["codes"] == (12, BOOKS)
    whole = next(iter(same.fixed(40, batch=40)))
    by_sample = {int(n): whole["codes"][row] for row, n in enumerate(whole.samples)}
    buckets = set()
    for batch in dataset.fixed(40, batch=40):
        bucket = LengthBucket.of(batch.bucket)
        assert bucket is not None and batch["codes"].shape[1] == bucket.bound == batch["codes_mask"].shape[1]
        lengths = batch["codes_mask"].sum(dim=1)
        assert (lengths <= bucket.bound).all() and (
            lengths > max((b for b in BOUNDS if b < bucket.bound), default=0)
        ).all()
        for row, number in enumerate(batch.samples.tolist()):
            assert torch.equal(batch["codes"][row], by_sample[number][: bucket.bound]), (
                "the values are those without buckets"
            )
        buckets.add(batch.bucket)
    assert len(buckets) == 3
    for changes in ({"bounds": [4, 8]}, {"lengths": False}):
        with pytest.raises(UserError, match="expected `lengths: true` and bounds up to 12"):
            SyntheticDataset(4, {"codes": {**MADE_UP["codes"], **changes}})
    with pytest.raises(UserError, match="one field at most"):
        SyntheticDataset(4, {"a": MADE_UP["codes"], "b": MADE_UP["codes"]})


# ------------------------------------------------------------------------------------------------- sounds


def pcm(values: np.ndarray, channels: int = 1, rate: int = 16000, width: int = 2) -> bytes:
    """The same by Python's own writer."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(values.tobytes())
    return buffer.getvalue()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 50), st.integers(0, 1 << 30))
def test_sixteen_bits_survive_to_the_bit(channels: int, length: int, seed: int) -> None:
    values = np.random.default_rng(seed).integers(-32768, 32768, (channels, length)).astype(np.int16)
    data = encode_wav(values, 22050)
    assert data == pcm(np.ascontiguousarray(values.T), channels, 22050), "as Python's wave writes it"
    sound = decode_wav(data)
    assert sound.sample_rate_hz == 22050 and sound.wave.dtype == np.float32 and sound.wave.shape == (channels, length)
    assert np.array_equal(sound.wave, values.astype(np.float32) / 32768)
    assert encode_wav(sound.wave, 22050) == data


def test_loud_floats_are_clipped_and_other_arrays_refused() -> None:
    loud = decode_wav(encode_wav(np.array([[-2.0, -1.0, 1.0, 2.0]]), 8000)).wave[0]
    assert loud.tolist() == [-1.0, -1.0, 32767 / 32768, 32767 / 32768]
    for wrong in (np.zeros(4, np.float32), np.zeros((1, 0), np.float32), np.zeros((1, 4), np.int32)):
        with pytest.raises(DataError, match="expected int16 or floats"):
            encode_wav(wrong, 8000)


def test_what_is_no_sound_is_refused_by_its_fault() -> None:
    whole = encode_wav(np.arange(8, dtype=np.int16)[None], 16000)
    faults = {
        "begins with": b"RIFX" + whole[4:],
        "it is cut": whole[:-4],
        "without samples": whole[:36],
        "expected PCM": pcm(np.zeros(8, np.uint8), width=1),
        "whole samples": whole[:40] + (15).to_bytes(4, "little") + whole[44:],
    }
    for said, data in faults.items():
        with pytest.raises(DataError, match=said):
            decode("wav", data)
    padded = whole[:12] + b"LIST\x03\0\0\0abc\0" + whole[12:]  # chunks that say other things, at even places
    assert np.array_equal(decode("wav", padded), decode("wav", whole))


def test_clips_of_many_lengths_come_as_one_batch_where_they_are_asked_for(speech: Path) -> None:
    plain = Dataset.open([Source([speech / "codes", speech / "clips"])])
    assert "audio" not in plain.fields, "sounds are long: a cap asks for them"
    dataset = Dataset.open([Source([speech / "clips"])], tokens={"audio": 40})
    assert dataset.fields == {"audio": (1, 40), "audio_mask": (40,)}
    reading = loader(dataset, micro=8)
    (batch,) = reading.next_batches()
    reading.close()
    assert batch["audio"].shape == (8, 1, 40) and batch["audio"].dtype == torch.float32
    for row, number in enumerate(batch.samples.tolist()):
        length = min(10 + number, 40)
        assert batch["audio_mask"][row].tolist() == [True] * length + [False] * (40 - length)
        assert (batch["audio"][row, 0, :length] == number / 32768).all() and (
            batch["audio"][row, 0, length:] == 0
        ).all()
    with pytest.raises(DataError, match=r"set data\.text_tokens, or data\.tokens"):
        Dataset.open([Source([speech / "clips"])], fields=["audio"], text_tokens=8)
