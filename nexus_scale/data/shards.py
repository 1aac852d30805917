"""Reading and writing of shards: plain ustar files for any WebDataset client, written whole or not at all, with the same bits each time.

The writer leaves `<shard>.json` beside each finished shard. A rerun sees by it which shards are finished, and `finish_folder` makes index
and manifest from these files. The reader takes any WebDataset tar (`tar_members` walks it) and refuses extensions that are not on the
list, by name.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
import xxhash
from safetensors.numpy import load as load_tensors

from nexus_scale.data.images import decode_image, encode_png, image_size
from nexus_scale.data.manifest import (
    EXTENSIONS,
    IMAGE_EXTENSIONS,
    INDEX_FILE,
    DataError,
    Field,
    Index,
    Manifest,
    Shard,
    canonical_json,
    commit_file,
    hash_file,
    temporary_name,
)
from nexus_scale.data.npy import decode_npy, encode_npy
from nexus_scale.data.sounds import decode_wav
from nexus_scale.data.tar_members import BLOCK, Limits, read_members
from nexus_scale.io.durable import atomic_write
from nexus_scale.processes.latents import LatentStats

SIDECAR_FORMAT = "nexus_scale-shard-1"
_MAX_KEY = 64
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")


def sanitise_key(key: str) -> str:
    """A key that is safe in the name of a member. A changed key gets a hash of the original, so that keys stay different.

    Dots are replaced, too, because WebDataset splits key and extension at the first one.
    """
    clean = _UNSAFE.sub("_", key)[:_MAX_KEY]
    return (
        clean
        if clean == key and clean
        else f"{clean[: _MAX_KEY - 17]}-{xxhash.xxh3_64_hexdigest(key.encode('utf-8', 'surrogatepass'))}"
    )


# ---------------------------------------------------------------------------------------------- writing


def _tar_header(name: str, size: int) -> bytes:
    """A ustar header (POSIX.1-1988) of a regular file with mode 644, owner 0 and time 0."""
    encoded = name.encode()
    if len(encoded) > 100:
        raise DataError(
            f"member name {name!r}: got {len(encoded)} bytes, expected at most 100; shorten the field's extension"
        )
    if size >= 8**11:
        raise DataError(f"member {name!r}: got {size} bytes, expected less than 8 GiB")
    header = bytearray(BLOCK)
    header[0 : len(encoded)] = encoded
    header[100:148] = b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (0o644, 0, 0, size, 0)  # mode, uid, gid, size, mtime
    header[148:156] = b" " * 8  # the checksum field itself counts as spaces
    header[156:157] = b"0"
    header[257:265] = b"ustar\x0000"
    header[329:345] = b"%07o\0%07o\0" % (0, 0)  # device numbers
    header[148:156] = b"%06o\0 " % sum(header)
    assert len(header) == BLOCK, len(header)
    return bytes(header)


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


class ShardWriter:
    """Writes a shard sample by sample. The file gets its name when the `with` block ends without an error.

    Args:
        path: the tar file to make. Its side-car `<path>.json` appears after it.
        fields: of every sample, in the order of writing.
        origin: what the shard is made from and how (hash of the input, encoder, settings), see `is_finished`.

    Attributes:
        counts: further facts about its samples with their numbers, kept in the side-car (`counts_of`).
    """

    def __init__(self, path: str | Path, fields: Sequence[Field], origin: str = ""):
        names = [field.name for field in fields]
        if not fields or len(set(names)) < len(names) or len({field.extension for field in fields}) < len(fields):
            raise DataError(f"{path}: got fields {names}, expected at least one, and no name or extension twice")
        self.path = Path(path)
        self.fields = tuple(fields)
        self.origin = origin
        self.samples = 0
        self.counts: Mapping[str, int] = {}
        self._columns = {name: column for column, name in enumerate(sorted(names))}
        self._keys: dict[str, None] = {}
        self._rows: list[dict[str, Any]] = []
        self._position = 0
        self._digest = xxhash.xxh3_128()
        self._temporary = temporary_name(self.path)
        self._file: IO[bytes] | None = None

    def __enter__(self) -> ShardWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._temporary.open("wb", buffering=1 << 20)
        return self

    def write(self, key: str, sample: Mapping[str, Any], bucket: str | None = None) -> None:
        """Adds a sample.

        Args:
            key: any text; `sanitise_key` makes it safe.
            sample: a value for each field. Arrays (numpy or torch on the CPU) for npy; encoded bytes, or for png uint8
                (H, W, 3); str for txt; any JSON value for json; an int for cls; bytes for the rest.
            bucket: name of the resolution or length bucket. By default height x width of the image, or the axes after the first of the
                first array with at least three: 8x8 for latents (C, 8, 8), 5x8x8 for those of clips (C, 5, 8, 8).
        """
        assert self._file is not None, "call of `write` outside of the with block"
        key = sanitise_key(key)
        if key in self._keys:
            raise DataError(f"{self.path}: got key {key!r} twice; keys are unique within a folder")
        if missing := {field.name for field in self.fields} ^ set(sample):
            raise DataError(
                f"{self.path}: sample {key!r} has fields {sorted(sample)}, expected "
                f"{[f.name for f in self.fields]}; they differ in {sorted(missing)}"
            )
        parts: list[bytes] = []
        offset, length = [0] * len(self.fields), [0] * len(self.fields)
        position, found = self._position, ""
        for field in self.fields:
            try:
                payload, size = _encode(field, sample[field.name])
            except DataError as error:
                raise DataError(f"{self.path}: sample {key!r}, field {field.name!r}: {error}") from error
            found = found or size
            parts += (_tar_header(f"{key}.{field.extension}", len(payload)), payload, _padding(len(payload)))
            column = self._columns[field.name]
            offset[column], length[column] = position + BLOCK, len(payload)
            position += BLOCK + len(payload) + len(parts[-1])
        data = b"".join(parts)
        self._file.write(data)
        self._digest.update(data)
        self._rows.append(
            {
                "start": self._position,
                "size": len(data),
                "offset": offset,
                "length": length,
                "hash": xxhash.xxh3_64_intdigest(data),
                "bucket": found if bucket is None else bucket,
            }
        )
        self._keys[key] = None
        self._position = position
        self.samples += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            if kind is None:
                end = bytes(2 * BLOCK)
                self._file.write(end)
                self._digest.update(end)
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
            if kind is None:
                # The side-car of an earlier attempt must not vouch for the new file.
                side_car(self.path).unlink(missing_ok=True)
                commit_file(self._temporary, self.path)
                atomic_write(side_car(self.path), canonical_json(self._side_car()))
        finally:
            try:
                self._file.close()  # fails, too, on a full disk
            finally:
                self._temporary.unlink(missing_ok=True)

    def _side_car(self) -> dict[str, Any]:
        columns = {
            name: [row[name] for row in self._rows] for name in ("start", "size", "offset", "length", "hash", "bucket")
        }
        return {
            "format": SIDECAR_FORMAT,
            "origin": self.origin,
            "fields": [{"name": field.name, **field.to_json()} for field in self.fields],
            "bytes": self._position + 2 * BLOCK,
            "xxh3_128": self._digest.hexdigest(),
            "finite": True,  # `_encode` refuses other numbers
            "keys": list(self._keys),
            **({"counts": dict(self.counts)} if self.counts else {}),
            **columns,
        }


def _encode(field: Field, value: Any) -> tuple[bytes, str]:
    """The bytes of a member, and `height x width` if the value has them."""
    kind = field.kind
    if kind == "npy":
        array = np.asarray(value)
        fits = field.shape is None or (
            len(field.shape) == array.ndim
            and all(want in (None, got) for want, got in zip(field.shape, array.shape, strict=True))
        )
        if array.dtype.name != field.dtype or not fits:
            raise DataError(f"got {array.dtype.name} {array.shape}, expected {field.dtype} {field.shape}")
        if array.dtype.kind == "f" and not (right := np.isfinite(array)).all():
            raise DataError(f"got {array.size - int(right.sum())} values that are not finite, of {array.size}")
        return encode_npy(array), "x".join(map(str, array.shape[1:])) if array.ndim >= 3 else ""
    if kind == "png" and isinstance(value, np.ndarray):
        return encode_png(value), f"{value.shape[0]}x{value.shape[1]}"
    if kind == "txt" and isinstance(value, str):
        return value.encode(), ""
    if kind == "json" and not isinstance(value, bytes):
        return canonical_json(value), ""
    if kind == "cls" and isinstance(value, int | np.integer):
        return str(int(value)).encode(), ""
    if isinstance(value, bytes | bytearray | memoryview) and kind != "cls":
        data = bytes(value)
        return data, "{}x{}".format(*image_size(data)) if kind in IMAGE_EXTENSIONS else ""
    raise DataError(f"got {type(value).__name__}, which is not written as .{kind}")


def side_car(path: Path) -> Path:
    """`<shard>.json` of a shard."""
    return path.with_name(path.name + ".json")


def _read_side_car(path: Path) -> dict[str, Any] | None:
    """The side-car of a finished shard that still has its size; None if the shard must be made (again)."""
    try:
        body = json.loads(side_car(path).read_text(encoding="utf-8"))
        rows = len(body["keys"])
        columns = [body[name] for name in ("start", "size", "offset", "length", "hash", "bucket")]
        whole = (
            body["format"] == SIDECAR_FORMAT
            and body["bytes"] == path.stat().st_size
            and all(isinstance(column, list) and len(column) == rows for column in columns)
            and all(isinstance(body[name], str) for name in ("origin", "xxh3_128"))
            and isinstance(body["fields"], list)
            and isinstance(body.get("counts", {}), dict)
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return body if whole else None


def is_finished(path: str | Path, origin: str = "", deep: bool = False) -> bool:
    """Whether the shard was written from this origin and still has its size (with `deep` also its hash)."""
    body = _read_side_car(Path(path))
    return body is not None and body["origin"] == origin and (not deep or hash_file(Path(path)) == body["xxh3_128"])


def counts_of(paths: Iterable[Path]) -> Counter[str]:
    """The sum of the counts in the side-cars of finished shards."""
    counts = Counter[str]()
    for path in paths:
        counts.update((_read_side_car(path) or {}).get("counts", {}))
    return counts


def remove_others(folder: Path, names: Collection[str]) -> None:
    """Removes surplus shards of an earlier attempt and the files beside them. A tar that our writer did not make stays."""
    for car in folder.glob("*.tar.json"):
        shard = car.name.removesuffix(".json")
        if shard in names:
            continue
        try:
            ours = json.loads(car.read_text(encoding="utf-8"))["format"] == SIDECAR_FORMAT
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        for name in (shard, f"{shard}.sums.json", f"{shard}.note.json", car.name) if ours else ():
            (folder / name).unlink(missing_ok=True)
    for note in folder.glob("*.tar.note.json"):  # of works without samples, and so without shards
        shard = note.name.removesuffix(".note.json")
        if shard not in names and not (folder / shard).exists():
            note.unlink()


def finish_folder(
    folder: str | Path,
    *,
    files: Sequence[str] | None = None,
    encoder: Mapping[str, Any] | None = None,
    latent: LatentStats | None = None,
    source: str | None = None,
    licence: str = "",
    attribution: str = "",
    rates: Mapping[str, float] | None = None,
) -> Manifest:
    """Makes index and manifest from finished shards.

    Args:
        files: names of the shards that must be there, in order; by default all `*.tar` in the folder, by name.
        encoder: `{"kind": ..., "fingerprint": ..., ...}` of what made the data.
        source: hash of the manifest of the data's input.
        rates: frames or audio samples per second, by field.

    Raises:
        DataError: a shard is missing or not finished, fields differ between shards, or a key occurs twice.
    """
    folder = Path(folder)
    names = sorted(path.name for path in folder.glob("*.tar")) if files is None else list(files)
    if not names:
        raise DataError(f"{folder}: got no shards, expected at least one .tar; check the input of the job")
    if encoder is not None and "fingerprint" not in encoder:
        raise DataError(f"{folder}: got encoder {dict(encoder)}, expected a `fingerprint` in it")
    bodies = _side_cars(folder, names)
    buckets = tuple(sorted({name for body in bodies for name in body["bucket"]}))
    index = _index(bodies, buckets).to_bytes()
    manifest = Manifest(
        folder=folder,
        fields={field["name"]: Field.from_json(field["name"], field) for field in bodies[0]["fields"]},
        shards=tuple(Shard(n, len(b["keys"]), b["bytes"], b["xxh3_128"]) for n, b in zip(names, bodies, strict=True)),
        buckets=buckets,
        index_hash=xxhash.xxh3_128_hexdigest(index),
        encoder=encoder,
        latent=latent,
        source=source,
        licence=licence,
        attribution=attribution,
        finite=all(body.get("finite", False) for body in bodies),
        rates=dict(rates or {}),
    )
    atomic_write(folder / INDEX_FILE, index)
    manifest.save()
    for left_over in (*folder.glob(".*.tmp"), *folder.glob(".*.partial")):  # left by killed attempts
        left_over.unlink(missing_ok=True)
    return manifest


def _side_cars(folder: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """The side-cars of the shards, checked: all are there, with the same fields, and no key is repeated."""
    bodies: list[dict[str, Any]] = []
    for name in names:
        body = _read_side_car(folder / name)
        if body is None:
            raise DataError(
                f"{folder / name}: got no finished shard (its side-car or the shard is missing or of another "
                "size); make it again"
            )
        if bodies and body["fields"] != bodies[0]["fields"]:
            raise DataError(
                f"{folder / name}: got fields {body['fields']}, expected {bodies[0]['fields']} as in {names[0]}; "
                "make both with one setting"
            )
        bodies.append(body)
    keys = Counter(key for body in bodies for key in body["keys"])
    if not keys:
        raise DataError(f"{folder}: got 0 samples in {len(names)} shards; check the input of the job")
    twice = next((key for key, count in keys.items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{folder}: got key {twice!r} twice; keys are unique within a folder")
    return bodies


def _index(bodies: Sequence[Mapping[str, Any]], buckets: Sequence[str]) -> Index:
    """The index over all samples of all shards, in order."""
    keys = [key.encode() for body in bodies for key in body["keys"]]
    number = {name: i for i, name in enumerate(buckets)}
    width = len(bodies[0]["fields"])

    def column(name: str, dtype: Any, *shape: int) -> np.ndarray:
        return np.array([value for body in bodies for value in body[name]], dtype=dtype).reshape(len(keys), *shape)

    return Index(
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        start=column("start", np.int64),
        size=column("size", np.int64),
        offset=column("offset", np.int64, width),
        length=column("length", np.int64, width),
        hash=column("hash", np.uint64),
        bucket=np.array([number[name] for body in bodies for name in body["bucket"]], np.int32),
    )


# ---------------------------------------------------------------------------------------------- reading


class RawSample(NamedTuple):
    """A sample of any WebDataset tar: bytes by extension, lower case (`moments.npy`, `jpg`)."""

    key: str
    members: dict[str, bytes]


def decode(extension: str, data: bytes) -> Any:
    """The value of a member: an array for npy and images (H, W, 3), float32 (C, T) in [-1, 1] for wav, str for txt, a JSON value, int for
    cls, a dict of arrays for safetensors; flac and mp4 stay bytes.

    Raises:
        DataError: damaged, or an extension that is not on the list.
    """
    kind = extension.rsplit(".", 1)[-1].lower()
    try:
        if kind == "npy":
            return decode_npy(data)
        if kind in IMAGE_EXTENSIONS:
            return decode_image(data)
        if kind == "wav":
            return decode_wav(data).wave
        if kind == "txt":
            return data.decode()
        if kind == "json":
            return json.loads(data)
        if kind == "cls":
            return int(data)
        if kind == "safetensors":
            return load_tensors(data)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"got a .{extension} that cannot be read: {error}") from error
    _check_extension(extension, extension)
    return data


def _check_extension(extension: str, name: str) -> None:
    if extension.rsplit(".", 1)[-1].lower() not in EXTENSIONS:
        raise DataError(
            f"member {name!r}: got extension .{extension}, expected one of {', '.join(sorted(EXTENSIONS))}; "
            "nothing else is read from shards"
        )


def read_samples(path: str | Path, limits: Limits | None = None) -> Iterator[RawSample]:
    """The samples of any WebDataset tar, plain or compressed, in order, as bytes.

    Members of one key must be neighbours, as the format demands. Directory entries are skipped.

    Raises:
        DataError: with the file and member: an extension that is not on the list, a link or device, an absolute name or `..`, a repeated
            key or extension, a damaged or cut file, or more than `limits` allow.
    """
    path = Path(path)
    seen: set[str] = set()
    archive, key, members = 0, "", {}  # type: int, str, dict[str, bytes]
    try:
        for member in read_members(path, limits):
            if member.problem or member.data is None:
                raise DataError(f"member {member.name!r}: {member.problem}")
            folder, _, base = member.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not stem or not dot:
                raise DataError(f"member {member.name!r}: expected a name like key.extension")
            _check_extension(extension, member.name)
            own = f"{folder}/{stem}" if folder else stem
            if (member.archive, own) != (archive, key):
                if members:
                    yield RawSample(key, members)
                if own in seen:
                    raise DataError(
                        f"member {member.name!r}: got key {own!r} a second time; members of a sample must be neighbours"
                    )
                seen.add(own)
                archive, key, members = member.archive, own, {}
            if extension.lower() in members:
                raise DataError(f"member {member.name!r}: got it a second time; each member may occur once")
            members[extension.lower()] = member.data
        if members:
            yield RawSample(key, members)
    except (OSError, DataError) as error:
        raise DataError(f"{path}: {error}") from error
