"""The manifest and index of a data folder, which describe its plain tar shards.

`manifest.json` says what a sample consists of, which encoder made it, the latent statistics, and the sample count, size and hash of each
shard. `index.safetensors` holds the byte range of each sample, so that any rank can start anywhere at once. The manifest's hash covers
everything, through the hashes of the shards and of the index: one string names a whole data set.

Hashes are XXH3 (SHA-256 at about 1 GB/s would cost more than reading). They detect damage, not forgery.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from nexus_scale.data.errors import DataError
from nexus_scale.data.manifest_schema import LONGEST_JSON, check_columns, check_places, read_body
from nexus_scale.data.stores import Store, is_url, open_store
from nexus_scale.io.durable import atomic_write, fsync_folder
from nexus_scale.processes.latents import LatentStats

FORMAT = "nexus_scale-data-1"
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.safetensors"

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
EXTENSIONS = IMAGE_EXTENSIONS | {"txt", "json", "npy", "safetensors", "flac", "wav", "cls", "mp4"}
"""The extensions that a shard may hold. Reading them never runs code."""


@dataclass(frozen=True)
class Field:
    """One part of every sample, stored as the member `<key>.<extension>`.

    Attributes:
        name: what batches call it.
        extension: `moments.npy`, `png`, `txt`; its last part decides how it is read.
        dtype: numpy's name for arrays (`float16`); `uint8` for images, `int16` for sounds, `text` and `json` for text and JSON.
        shape: None (or -1) on axes that vary between samples; None as a whole if there is no array.
    """

    name: str
    extension: str
    dtype: str
    shape: tuple[int | None, ...] | None = None

    def __post_init__(self) -> None:
        if self.shape is not None:
            varying = tuple(None if axis is None or axis < 0 else int(axis) for axis in self.shape)
            object.__setattr__(self, "shape", varying)
        if self.kind not in EXTENSIONS or self.extension != self.extension.lower() or "/" in self.extension:
            raise DataError(
                f"field {self.name!r}: got extension {self.extension!r}, expected lower case ending in one of "
                f"{', '.join(sorted(EXTENSIONS))}"
            )

    @property
    def kind(self) -> str:
        """The last part of the extension: `npy` of `moments.npy`."""
        return self.extension.rsplit(".", 1)[-1]

    @property
    def is_image(self) -> bool:
        return self.kind in IMAGE_EXTENSIONS

    @property
    def is_number(self) -> bool:
        """Whether it is one whole number: a class, or a value under a key of JSON."""
        return self.kind in ("cls", "json")

    @property
    def is_sequence(self) -> bool:
        """Whether its first axis is a varying length, as for text tokens (L, D)."""
        return self.kind == "npy" and bool(self.shape) and self.shape is not None and self.shape[0] is None

    @property
    def is_sound(self) -> bool:
        """Whether it is a wave (C, T) of varying length."""
        return self.kind == "wav"

    @property
    def varies(self) -> bool:
        """Whether its length varies, so that batches cut or pad it and hold a mask."""
        return self.is_sequence or self.is_sound

    def to_json(self) -> dict[str, Any]:
        return {
            "extension": self.extension,
            "dtype": self.dtype,
            "shape": None if self.shape is None else list(self.shape),
        }

    @classmethod
    def from_json(cls, name: str, value: Mapping[str, Any]) -> Field:
        shape = value["shape"]
        return cls(name, value["extension"], value["dtype"], None if shape is None else tuple(shape))


@dataclass(frozen=True)
class Shard:
    """One tar file of a folder. `xxh3_128` is the hash of the whole file, in hexadecimal."""

    file: str
    samples: int
    bytes: int
    xxh3_128: str


SHARD_KEYS = ("file", "samples", "bytes", "xxh3_128")


@dataclass(frozen=True)
class Index:
    """The byte range of every sample. N samples in shard order, F fields sorted by name.

    Attributes:
        key_bytes: all keys one after the other, UTF-8; key n is key_bytes[key_ends[n-1]:key_ends[n]].
        key_ends: (N,) int64.
        start, size: byte range of a sample in its shard, all members with their headers, (N,) int64.
        offset, length: byte range of a field's payload in the shard, (N, F) int64.
        hash: xxh3_64 of the sample's byte range, (N,) uint64.
        bucket: number of the sample's bucket in `Manifest.buckets`, (N,) int32.
    """

    key_bytes: np.ndarray
    key_ends: np.ndarray
    start: np.ndarray
    size: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    hash: np.ndarray
    bucket: np.ndarray

    def __len__(self) -> int:
        return len(self.start)

    def key(self, sample: int) -> str:
        first = int(self.key_ends[sample - 1]) if sample else 0
        return self.key_bytes[first : int(self.key_ends[sample])].tobytes().decode()

    def to_bytes(self) -> bytes:
        return save_tensors({name: np.ascontiguousarray(value) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Manifest:
    """The contents of a data folder. `load` reads it, `shards.finish_folder` makes it.

    `store`: of a folder that is not on disk; `folder` is then meaningless, and `where` and `at` say where things are.
    `finite`: the writer checked every number, so readers need not.
    `rates`: frames or audio samples per second, by field; for latents and codes those of the decoded media. Older folders have none.
    """

    folder: Path
    fields: Mapping[str, Field]
    shards: tuple[Shard, ...]
    buckets: tuple[str, ...]
    index_hash: str
    encoder: Mapping[str, Any] | None = None
    latent: LatentStats | None = None
    source: str | None = None
    licence: str = ""
    attribution: str = ""
    finite: bool = False
    rates: Mapping[str, float] = field(default_factory=dict)
    store: Store | None = field(default=None, compare=False)

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @cached_property
    def columns(self) -> dict[str, int]:
        """The column of each field in the index."""
        return {name: column for column, name in enumerate(sorted(self.fields))}

    @cached_property
    def even(self) -> dict[str, int]:
        """The length of a field's payloads, by field, for fields whose payloads all have the same length."""
        first = self.index.length[0]
        alike = (self.index.length == first).all(axis=0)
        return {name: int(first[column]) for name, column in self.columns.items() if alike[column]}

    @property
    def image(self) -> Field:
        """Its one field of images; raises DataError where it has none, or several."""
        images = [field for field in self.fields.values() if field.is_image]
        if len(images) != 1:
            raise DataError(f"{self.where}: got fields {sorted(self.fields)}; expected one of images")
        return images[0]

    @property
    def fingerprint(self) -> str | None:
        """The hash of the encoder's weights and settings."""
        return None if self.encoder is None else str(self.encoder["fingerprint"])

    @cached_property
    def hash(self) -> str:
        return xxhash.xxh3_128_hexdigest(canonical_json(self._body()))

    def _body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "format": FORMAT,
            "fields": {name: field.to_json() for name, field in self.fields.items()},
            "shards": [vars(shard) for shard in self.shards],
            "buckets": list(self.buckets),
            "encoder": None if self.encoder is None else dict(self.encoder),
            "latent": None if self.latent is None else {"mean": list(self.latent.mean), "std": list(self.latent.std)},
            "source": self.source,
            "licence": self.licence,
            "attribution": self.attribution,
            "index": {"file": INDEX_FILE, "xxh3_128": self.index_hash},
        }
        # Keys unknown to older versions are left out while empty, so that their folders keep their hash.
        return body | ({"finite": True} if self.finite else {}) | ({"rates": dict(self.rates)} if self.rates else {})

    def save(self) -> None:
        """Writes `manifest.json`, whole or not at all. It is the last file of a folder, so its presence says: "
        "finished."""
        text = json.dumps({**self._body(), "hash": self.hash}, indent=1, ensure_ascii=False)
        atomic_write(self.folder / MANIFEST_FILE, text)

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """The manifest of a folder, with its hash checked.

        Raises:
            DataError: no folder, or one that is empty, unfinished, of another format, or edited by hand.
        """
        store = open_store(str(folder)) if is_url(folder) else None
        where, file = str(folder), f"{str(folder).rstrip('/')}/{MANIFEST_FILE}"
        text = _read_local(Path(folder)) if store is None else _read_remote(store)
        body = read_body(text, file, FORMAT)
        latent = body["latent"]
        try:
            manifest = cls(
                folder=Path(folder),
                fields={name: Field.from_json(name, value) for name, value in body["fields"].items()},
                shards=tuple(Shard(**{key: shard[key] for key in SHARD_KEYS}) for shard in body["shards"]),
                buckets=tuple(body["buckets"]),
                index_hash=body["index"]["xxh3_128"],
                encoder=body["encoder"],
                latent=None if latent is None else LatentStats(tuple(latent["mean"]), tuple(latent["std"])),
                source=body["source"],
                licence=body["licence"],
                attribution=body["attribution"],
                finite=bool(body.get("finite", False)),
                rates={name: float(rate) for name, rate in body.get("rates", {}).items()},
                store=store,
            )
        except (ValueError, DataError) as error:
            raise DataError(f"{file}: {error}; restore it or make the folder again") from error
        if manifest.hash != body["hash"]:
            raise DataError(
                f"{file}: got hash {body['hash']}, expected {manifest.hash} for its content; it was changed: "
                "restore it or make the folder again"
            )
        if not manifest.samples:
            raise DataError(f"{where}: got 0 samples; make the folder again from input that is not empty")
        return manifest

    @cached_property
    def index(self) -> Index:
        """The index, checked against its hash; read once.

        Raises:
            DataError: the file is missing, damaged, or of other samples.
        """
        file, data = self.at(INDEX_FILE), self._read_index()
        try:
            columns = load_tensors(data)
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"{file}: cannot be read ({error}); make the folder again") from error
        wrong = check_columns(columns, self.samples, len(self.fields)) or check_places(
            columns,
            self.first_samples,
            np.array([shard.bytes for shard in self.shards], np.int64),
            len(self.buckets),
            np.array([int(self.fields[name].kind != "txt") for name in sorted(self.fields)], np.int64),
        )
        if wrong:
            raise DataError(f"{file}: {wrong}; make the folder again (finished shards are kept)")
        return Index(**columns)

    def _read_index(self) -> bytes:
        """The bytes of the index. Raises DataError where the file is missing or has another hash than the manifest says."""
        file = self.at(INDEX_FILE)
        try:
            data = (self.folder / INDEX_FILE).read_bytes() if self.store is None else self.store.read(INDEX_FILE)
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read ({error.strerror or error}); make the folder again (finished shards are kept)"
            ) from error
        got = xxhash.xxh3_128_hexdigest(data)
        if got != self.index_hash:
            raise DataError(f"{file}: got hash {got}, expected {self.index_hash}; restore it or make the folder again")
        return data

    @property
    def where(self) -> str:
        """The folder's path or URL, for messages."""
        return str(self.folder) if self.store is None else self.store.url

    def at(self, file: str) -> str:
        """The path or URL of a file in this folder, for messages."""
        return str(self.folder / file) if self.store is None else self.store.at(file)

    def name(self, sample: int) -> str:
        """Key and number of a sample, for messages."""
        return f"sample {self.index.key(sample)!r} (number {sample})"

    def open(self, shard: int) -> int:
        """A file descriptor at the beginning of a shard, which the caller closes. Raises OSError and StoreError."""
        if self.store is not None:
            return self.store.open(self.shards[shard].file, self.shards[shard].bytes, self.shards[shard].xxh3_128)
        return os.open(self.folder / self.shards[shard].file, os.O_RDONLY | os.O_CLOEXEC)

    def discard(self, shard: int) -> None:
        """Removes the cached copy of a shard whose bytes are wrong. A folder on disk has no copies."""
        if self.store is not None:
            self.store.cache.discard(self.shards[shard].xxh3_128)

    @cached_property
    def first_samples(self) -> np.ndarray:
        """The number of the first sample of each shard, and at the end the number of samples, (shards + 1,) int64."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])]).astype(np.int64)

    def verify(self, deep: bool = False) -> None:
        """Compares the folder with the manifest: shards by presence and size, with `deep` also by hash; on a disk the index by hash.

        Raises:
            DataError: names the first file that differs.
        """
        files = [shard.file for shard in self.shards]
        sizes = [_size(self.folder / file) for file in files] if self.store is None else self.store.sizes(files)
        for number, (shard, size) in enumerate(zip(self.shards, sizes, strict=True)):
            path = self.at(shard.file)
            if size is None:
                raise DataError(
                    f"{path}: missing shard, expected {shard.bytes} bytes; restore it or run the job that makes the folder again"
                )
            if size != shard.bytes:
                raise DataError(
                    f"{path}: got {size} bytes, expected {shard.bytes}; the shard is cut or replaced: restore it "
                    "or make it again"
                )
            if deep:
                try:
                    got = hash_open(self.open(number))
                except OSError as error:
                    raise DataError(f"{path}: cannot be read ({error.strerror}); restore it") from error
                if got != shard.xxh3_128:
                    raise DataError(
                        f"{path}: got hash {got}, expected {shard.xxh3_128}; the shard is damaged: restore it or make it again"
                    )
        if deep:
            len(self.index)
        elif self.store is None:
            self._read_index()

    def check_encoder(self, fingerprint: str, name: str = "the encoder") -> None:
        """Raises DataError unless the encoder with this fingerprint made the data."""
        if self.fingerprint != fingerprint:
            raise DataError(
                f"{self.where}: got data of encoder {self.fingerprint}, expected {fingerprint} of {name}; "
                "run the precompute job with that encoder, or name in the recipe the encoder that made the data"
            )


def canonical_json(value: Any) -> bytes:
    """JSON with the same bytes for the same value: sorted keys, no spaces.

    Raises:
        DataError: numbers that are not finite, text that is not UTF-8, or values that JSON cannot hold.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(
            f"got {f'{value!r}'[:200]}, which is no JSON ({error}); expected finite numbers and text"
        ) from error


def _read_local(folder: Path) -> str:
    """The text of a folder's manifest. Raises DataError where there is no folder, or it is empty or unfinished."""
    if not folder.is_dir():
        raise DataError(
            f"{folder}: got no such data folder; run the job that makes it (recipe: prepare), or correct the path"
        )
    file = folder / MANIFEST_FILE
    if not file.is_file():
        has = (
            "no manifest.json beside its shards: the job that makes it did not finish"
            if any(folder.iterdir())
            else "an empty folder"
        )
        raise DataError(f"{folder}: got {has}; run that job again (finished shards are kept), or correct the path")
    try:
        if file.stat().st_size > LONGEST_JSON:
            raise ValueError(f"{file.stat().st_size} bytes")
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}); correct its permissions") from error
    except ValueError as error:
        raise DataError(f"{file}: got a damaged manifest ({error!r}); restore it or make the folder again") from error


def _read_remote(store: Store) -> str:
    try:
        return store.read(MANIFEST_FILE).decode()
    except (OSError, ValueError) as error:
        raise DataError(
            f"{store.at(MANIFEST_FILE)}: cannot be read ({error!r}); correct the URL, or copy the folder there again, its manifest last"
        ) from error


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def hash_file(path: Path) -> str:
    """The XXH3-128 of a file in hexadecimal."""
    return hash_open(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def hash_open(file: int) -> str:
    """The XXH3-128 of the rest of an open file, in hexadecimal; closes the file."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(1 << 22))
    with open(file, "rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def temporary_name(path: Path) -> Path:
    """A hidden path beside `path` for this attempt alone, so that two attempts at one file do not collide."""
    return path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")


def commit_file(temporary: Path, path: Path) -> None:
    """Renames a closed and fsynced file, and makes the name durable."""
    os.replace(temporary, path)
    fsync_folder(path.parent)
