"""Mutated manifests, indices and shards: a data folder opens and reads, or is refused with a message that says what is wrong."""

from __future__ import annotations

import functools
import json
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from nexus_scale.contracts import UserError
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.data.manifest import DataError, Field, Manifest, hash_file
from nexus_scale.data.shards import ShardWriter, finish_folder, read_samples
from nexus_scale.processes.latents import LatentStats
from tests.fuzz import fuzz

FIELDS = (
    Field("image", "png", "uint8", (8, 8, 3)),
    Field("moments", "moments.npy", "float16", (4, 2, 2)),
    Field("text", "text.npy", "float16", (None, 3)),
    Field("codes", "codes.npy", "int16", (None, 2)),
    Field("caption", "txt", "text"),
    Field("json", "json", "json"),
    Field("label", "cls", "int64", ()),
)
SAMPLES = 8


@functools.cache
def whole() -> dict[str, bytes]:
    """The files of a small folder with a field of each kind: two shards, two length buckets."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(2):
            with ShardWriter(folder / f"{number:05d}.tar", FIELDS) as writer:
                for sample in range(SAMPLES // 2):
                    length = 1 + (sample + number) % 4
                    values = {
                        "image": rng.integers(0, 256, (8, 8, 3), dtype=np.uint8),
                        "moments": rng.normal(size=(4, 2, 2)).astype(np.float16),
                        "text": rng.normal(size=(1 + sample, 3)).astype(np.float16),
                        "codes": np.ones((length, 2), np.int16),
                        "caption": f"caption {number} {sample}",
                        "json": {"group": sample},
                        "label": sample,
                    }
                    writer.write(f"{number}-{sample}", values, "codes<=2" if length <= 2 else "codes<=4")
        finish_folder(
            folder,
            encoder={"kind": "vae", "fingerprint": "f" * 32, "more": [1, {"a": None}]},
            latent=LatentStats((0.0, 0.5), (1.0, 2.0)),
            source="a" * 32,
        )
        return {
            path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.endswith(".tar.json")
        }


def read_all(folder: str) -> int:
    """Everything that training and sampling read of a folder."""
    try:
        manifest = Manifest.load(folder)
        dataset = Dataset.open([Source([folder], balance=random.Random(folder).choice((0.0, 0.5)))], text_tokens=3)
        for batch in dataset.fixed(SAMPLES, batch=4):
            assert len(batch.samples)
        reader = dataset.reader()
        draw = dataset.order(0, 2).batch(0)
        reader.read(draw, np.arange(len(draw.samples)))
        reader.close()
        dataset.texts("caption", range(dataset.samples))
        dataset.keys(range(dataset.samples))
        for shard in manifest.shards:
            list(read_samples(Path(folder) / shard.file))
        manifest.verify(deep=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    return 0


def write(folder: Path, files: dict[str, bytes]) -> list[str]:
    place = folder / "set"
    place.mkdir()
    for name, data in files.items():
        (place / name).write_bytes(data)
    return [str(place)]


def seal(body: Any) -> bytes:
    """A manifest whose hash is right again, as far as it can be."""
    if isinstance(body, dict):
        rest = {key: value for key, value in body.items() if key != "hash"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        body = {**body, "hash": xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))}
    return json.dumps(body, ensure_ascii=True).encode()


# ------------------------------------------------------------------------------------------------- manifests

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 5, 99, 2**31, 2**63, 10**12, 10**30, -(10**12), 0.5, 1e300, float("nan"), float("inf"), "", "a", "0",
    "..", "../x", "a/b", "/etc/passwd", "a\0b", "\ud800", "x" * 300, "codes<=3", "codes<=" + "9" * 12, "codes<=" + "9" * 100, "8x8",
    "<=", "float16", "float99", "object", "png", "pkl", "npy", "moments.npy", "00001.tar", "f" * 32, [], [1], [[]], {}, {"a": 1}, ["a"],
    [None], [-1], [10**12, 10**12], {"file": 1}, [0.0], [1e308, 1e308],
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


def mutated(rng: random.Random, body: Any) -> Any:
    path = rng.choice(places(body))
    if not path:
        return rng.choice((*ODD, body, body, body))
    parent = body
    for key in path[:-1]:
        parent = parent[key]
    key = path[-1]
    kind = rng.randrange(6)
    if kind <= 2:
        parent[key] = rng.choice(ODD)
    elif kind == 3:
        del parent[key]
    elif kind == 4 and isinstance(parent, dict):
        parent[rng.choice([odd for odd in ODD if isinstance(odd, str)])] = parent.pop(key)
    elif isinstance(parent, list):
        parent += [parent[key]] * rng.choice((1, 1, 50))
    else:
        number = parent[key]
        parent[key] = number + rng.choice((-1, 1, 512, -512)) if type(number) in (int, float) else [number]
    return body


def mutated_manifest(rng: random.Random, folder: Path) -> Sequence[Any]:
    files = dict(whole())
    body: Any = json.loads(files["manifest.json"])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if isinstance(body, dict | list) and body:
            body = mutated(rng, body)
    data = seal(body) if rng.random() < 0.9 else json.dumps(body).encode()
    if rng.random() < 0.1:
        data = damaged(rng, data)
    if rng.random() < 0.03:
        data = b'{"format":' + b"[" * 100_000
    files["manifest.json"] = data
    return write(folder, files)


def damaged(rng: random.Random, data: bytes) -> bytes:
    kind = rng.randrange(4)
    place = rng.randrange(len(data))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + bytes([rng.randrange(256)]) + data[place + 1 :]
    if kind == 2:
        return data + data[place:]
    return data[:place] + rng.randbytes(rng.randrange(1, 600)) + data[place:]


# ------------------------------------------------------------------------------------------------- indices and shards


def mutated_column(rng: random.Random, columns: dict[str, np.ndarray]) -> None:
    name = rng.choice(list(columns))
    column = columns[name].copy()
    kind = rng.randrange(8)
    if kind <= 3 and column.size:
        flat = column.reshape(-1)
        limits = np.iinfo(column.dtype)
        place = rng.randrange(flat.size)
        odd = rng.choice(
            (-1, 0, 1, 99, 512, 10**12, limits.max, limits.min, int(flat[place]) + rng.choice((1, -1, 512, -512, 1024)))
        )
        flat[place] = max(limits.min, min(limits.max, odd))
    elif kind == 4:
        column = column.astype(rng.choice((np.float32, np.int64, np.int32, np.uint8, np.bool_)))
    elif kind == 5:
        column = column[: rng.randrange(len(column) + 1)]
    elif kind == 6:
        column = rng.choice((column.reshape(-1, 1), column.reshape(-1), np.concatenate([column, column]), np.array(5)))
    else:
        other = rng.choice((name + "x", "size", "offset"))
        columns.pop(name)
        name = other
    columns[name] = column


def mutated_index(rng: random.Random, folder: Path) -> Sequence[Any]:
    files = dict(whole())
    body = json.loads(files["manifest.json"])
    kind = rng.randrange(10)
    if kind <= 5:
        columns = dict(load_tensors(files["index.safetensors"]))
        for _ in range(rng.choice((1, 1, 2))):
            mutated_column(rng, columns)
        files["index.safetensors"] = save_tensors(
            {name: np.ascontiguousarray(value) for name, value in columns.items()}
        )
    elif kind <= 7:
        files["index.safetensors"] = damaged(rng, files["index.safetensors"])
    else:
        shard = rng.choice(body["shards"])
        files[shard["file"]] = damaged(rng, files[shard["file"]])
        if rng.random() < 0.7:
            shard["bytes"] = len(files[shard["file"]])
            shard["xxh3_128"] = xxhash.xxh3_128_hexdigest(files[shard["file"]])
    if rng.random() < 0.9:
        body["index"]["xxh3_128"] = xxhash.xxh3_128_hexdigest(files["index.safetensors"])
    files["manifest.json"] = seal(body)
    return write(folder, files)


# ------------------------------------------------------------------------------------------------- tests


def test_the_whole_folder_reads(tmp_path: Path) -> None:
    (place,) = write(tmp_path, whole())
    assert read_all(place) == 0
    body = json.loads(whole()["manifest.json"])
    assert json.loads(seal(body)) == body, "a sealed manifest is the writer's own"


def test_mutated_manifests(tmp_path: Path) -> None:
    fuzz("manifest", mutated_manifest, tmp_path, read_all)


def test_mutated_indices_and_shards(tmp_path: Path) -> None:
    fuzz("index", mutated_index, tmp_path, read_all)


Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], object]


def put(*path: Any) -> Callable[[Any], Edit]:
    def of(value: Any) -> Edit:
        def edit(body: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
            inner: Any = body
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = value

        return edit

    return of


def column(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    def edit(body: dict[str, Any], columns: dict[str, np.ndarray]) -> None:
        columns[name] = change(columns[name].copy())

    return edit


def at(place: Any, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[place] = value
        return array

    return change


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (put("shards", 0, "file")(7), r"shards\.0\.file: .*string; got 7"),
        (put("shards", 0, "file")("a\0b"), r"shards\.0\.file: expected a file name"),
        (put("shards", 0, "file")("00001.tar"), "'00001.tar' twice"),
        (put("shards", 0, "samples")("4"), r"shards\.0\.samples: .*integer; got '4'"),
        (put("shards", 0, "bytes")(-512), r"shards\.0\.bytes: .*greater than or equal to 0; got -512"),
        (put("shards", 0, "bytes")(512 * 10**9), "expected 512000000000"),
        (put("shards", 0, "bytes")(1000), "multiple of 512; got 1000"),
        (put("buckets")([]), "buckets: .*at least 1 item"),
        (put("buckets", 1)("codes<=" + "9" * 20), "expected a length from 1 to"),
        (put("fields", "moments", "dtype")("object"), r"fields\.moments\.dtype: expected one of"),
        (put("encoder")({}), "encoder.fingerprint: got None"),
        (put("latent", "mean")([0.0]), r"latent\.mean: got 1 channels, expected 2"),
        (put("latent")({"mean": [0.0] * 3, "std": [1.0] * 3}), "got 3 channels, expected 2"),
        (put("latent", "mean")([0.0, float("nan")]), "got NaN, expected a finite number"),
        (put("source")(5), "source: .*string; got 5"),
        (column("offset", at((1, 2), -512)), "offset: got -512 for sample 1"),
        (column("offset", at((1, 2), 1 << 40)), f"offset: got {1 << 40} for sample 1"),
        (column("offset", lambda a: a.astype(np.float64)), "offset: got float64"),
        (column("start", at(3, 100)), "start: got 100 for sample 3, expected a multiple of 512"),
        (column("size", at(3, -1)), "size: got -1 for sample 3"),
        (column("size", at(3, (1 << 63) - 512)), "size: got 9223372036854775296 for sample 3"),
        (column("length", at((0, 1), 10**12)), "length: got 1000000000000 for sample 0"),
        (column("hash", lambda a: a[:3]), r"hash: got shape \(3,\), expected \(8,\)"),
        (column("bucket", at(0, 99)), "bucket: got 99 for sample 0, expected 0 to 1"),
        (column("key_ends", at(2, 0)), "key_ends"),
        (column("key_ends", at(-1, 10**9)), "key_ends"),
        (column("key_bytes", at(0, 255)), "expected UTF-8"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_was_got_and_expected(tmp_path: Path, edit: Edit, says: str) -> None:
    files = dict(whole())
    body, columns = json.loads(files["manifest.json"]), dict(load_tensors(files["index.safetensors"]))
    edit(body, columns)
    files["index.safetensors"] = save_tensors(columns)
    body["index"]["xxh3_128"] = xxhash.xxh3_128_hexdigest(files["index.safetensors"])
    files["manifest.json"] = seal(body)
    (place,) = write(tmp_path, files)
    with pytest.raises(DataError, match=says) as raised:
        Dataset.open([Source([place])], text_tokens=3)
    assert raised.value.code == 3 and place in str(raised.value) and len(str(raised.value)) < 2000
    assert hash_file(Path(place) / "manifest.json")
