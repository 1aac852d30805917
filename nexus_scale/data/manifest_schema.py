"""The schema of manifests and indexes. They are checked once, when they are loaded, so that readers can rely on every number."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from nexus_scale.config.registry import explain
from nexus_scale.data.errors import DataError

BLOCK = 512
"""Tar's block size: headers and payloads begin at its multiples."""
CHUNK = 1 << 20
"""Samples that are checked at a time, so that checking takes little memory beside the index."""
SHOWN = 3
LONGEST_JSON = 1 << 30
LONGEST_SEQUENCE = 1 << 31

ARRAY_DTYPES = frozenset(
    {"float16", "float32", "float64", "bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "int64"}
)
DTYPES = ARRAY_DTYPES | {"text", "json", "bytes"}


def _file_name(value: str) -> str:
    if value in ("", ".", "..") or "/" in value or "\\" in value or "\0" in value or len(value.encode()) > 255:
        raise ValueError("expected a file name without folders")
    return value


def _dtype(value: str) -> str:
    if value not in DTYPES:
        raise ValueError(f"expected one of {', '.join(sorted(DTYPES))}")
    return value


def _bucket(value: str) -> str:
    bound = re.fullmatch(r".*<=([0-9]+)", value, re.DOTALL)
    if bound is not None and not 1 <= int(bound[1]) <= LONGEST_SEQUENCE:
        raise ValueError(f"expected a length from 1 to {LONGEST_SEQUENCE} behind <=")
    return value


Text = Annotated[str, Field(max_length=1 << 16)]
Name = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f/]+$")]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Axis = Annotated[int, Field(ge=-1, le=1 << 40)]


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=False)


class _Field(_Part):
    extension: Name
    dtype: Annotated[str, AfterValidator(_dtype)]
    shape: Annotated[list[Axis | None], Field(max_length=32)] | None


class _Shard(_Part):
    file: Annotated[str, AfterValidator(_file_name)]
    samples: Annotated[int, Field(ge=0, le=1 << 40)]
    bytes: Annotated[int, Field(ge=0, le=1 << 50, multiple_of=BLOCK)]
    xxh3_128: Hash


class _Index(_Part):
    file: Literal["index.safetensors"]
    xxh3_128: Hash


class _Latent(_Part):
    mean: list[FiniteFloat]
    std: list[FiniteFloat]


class _Body(_Part):
    fields: Annotated[dict[Name, _Field], Field(min_length=1)]
    shards: Annotated[list[_Shard], Field(min_length=1)]
    buckets: Annotated[list[Annotated[str, Field(max_length=200), AfterValidator(_bucket)]], Field(min_length=1)]
    encoder: dict[str, Any] | None
    latent: _Latent | None
    source: Text | None
    licence: Text
    attribution: Text
    index: _Index
    finite: bool = False
    rates: dict[Name, Annotated[FiniteFloat, Field(gt=0, le=1e9)]] = {}
    hash: Hash


def read_body(text: str, file: str, format: str) -> dict[str, Any]:
    """The contents of a manifest, with the right keys and types.

    Args:
        file: path or URL, for messages.
        format: the one that this version knows.
    Raises:
        DataError: no JSON, numbers that are not finite, another format, or a missing or ill-typed key.
    """
    try:
        body = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        json.dumps(body, ensure_ascii=False).encode()
        if not isinstance(body, dict):
            raise ValueError(f"got a JSON {type(body).__name__}, expected an object")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: got a damaged manifest ({error}); restore it or make the folder again") from error
    if body.get("format") != format:
        raise DataError(
            f"{file}: got format {str(body.get('format'))[:80]!r}, expected {format!r}; make the folder again with this version"
        )
    try:
        _Body.model_validate(body)
    except ValidationError as error:
        lines = explain(error, "")
        more = f", and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        shown = "; ".join(line if len(line) < 300 else f"{line[:300]}..." for line in lines[:SHOWN])
        raise DataError(f"{file}: {shown}{more}; restore it or make the folder again") from None
    _check_together(body, file)
    return body


def _check_together(body: dict[str, Any], file: str) -> None:
    """Raises DataError where keys contradict each other."""

    def refuse(what: str) -> None:
        raise DataError(f"{file}: {what}; restore it or make the folder again")

    for key, names in (("shards", [shard["file"] for shard in body["shards"]]), ("buckets", body["buckets"])):
        if twice := {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set():
            refuse(f"{key}: got {sorted(twice)[0]!r} twice, expected different names")
    extensions = [field["extension"] for field in body["fields"].values()]
    if len(set(extensions)) < len(extensions):
        refuse(f"fields: got extensions {sorted(extensions)}, expected different ones")
    for name, field in body["fields"].items():
        if field["extension"].rsplit(".", 1)[-1] == "npy" and field["dtype"] not in ARRAY_DTYPES:
            refuse(
                f"fields.{name}.dtype: got {field['dtype']!r} of an array, expected one of {', '.join(sorted(ARRAY_DTYPES))}"
            )
    if body["encoder"] is not None and not isinstance(body["encoder"].get("fingerprint"), str):
        refuse(f"encoder.fingerprint: got {body['encoder'].get('fingerprint')!r}, expected a hash as text")
    moments = body["fields"].get("moments")
    if body["latent"] is not None and moments is not None and moments["shape"]:
        channels, count = moments["shape"][0], len(body["latent"]["mean"])
        if channels not in (None, -1, 2 * count):
            refuse(f"latent.mean: got {count} channels, expected {channels // 2} as fields.moments has")


def _refuse_constant(text: str) -> float:
    raise ValueError(f"got {text}, expected a finite number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"got {text[:40]}, expected a finite number")
    return number


COLUMNS = {
    "key_bytes": (np.uint8, 1),
    "key_ends": (np.int64, 1),
    "start": (np.int64, 1),
    "size": (np.int64, 1),
    "offset": (np.int64, 2),
    "length": (np.int64, 2),
    "hash": (np.uint64, 1),
    "bucket": (np.int32, 1),
}
"""Dtype and number of axes of each tensor of an index."""


def check_columns(columns: dict[str, np.ndarray], samples: int, fields: int) -> str:
    """What is wrong with the names, dtypes or shapes of an index's tensors; empty if nothing is."""
    if set(columns) != set(COLUMNS):
        return f"got tensors {sorted(columns)}, expected {sorted(COLUMNS)}"
    for name, (dtype, axes) in COLUMNS.items():
        column = columns[name]
        if column.dtype != dtype or column.ndim != axes:
            return f"{name}: got {column.dtype} of {column.ndim} axes, expected {np.dtype(dtype)} of {axes}"
        expected = (samples, fields)[:axes]
        if name != "key_bytes" and column.shape != expected:
            return f"{name}: got shape {column.shape}, expected {expected} for {samples} samples of {fields} fields"
    return ""


def check_places(
    columns: dict[str, np.ndarray], first: np.ndarray, shard_bytes: np.ndarray, buckets: int, filled: np.ndarray
) -> str:
    """What is wrong with the numbers of an index; empty if nothing is.

    Args:
        first: number of the first sample of each shard, and at the end the number of samples, (shards + 1,).
        shard_bytes: (shards,).
        buckets: number of buckets.
        filled: whether each field has at least one byte in every sample, (fields,).
    """
    ends, keys = columns["key_ends"], columns["key_bytes"]
    samples = len(ends)
    if samples and (int(ends[0]) < 1 or int(ends[-1]) != len(keys)):
        return f"key_ends: got {int(ends[0])} to {int(ends[-1])}, expected to rise from 1 or more to {len(keys)}, the bytes of all keys"
    for begin in range(0, samples, CHUNK):
        rows = slice(begin, min(begin + CHUNK, samples))
        part = {name: column[rows] for name, column in columns.items() if name != "key_bytes"}
        shard = first.searchsorted(np.arange(rows.start, rows.stop), side="right") - 1
        room = shard_bytes[shard]
        start, size, offset, length = (part[name] for name in ("start", "size", "offset", "length"))
        end = np.zeros_like(start)
        checks = [
            (
                "key_ends",
                "keys that are not empty",
                np.diff(part["key_ends"], prepend=ends[begin - 1] if begin else 0) > 0,
            ),
            ("start", "a multiple of 512 within its shard", (start >= 0) & (start % BLOCK == 0) & (start <= room)),
            (
                "size",
                "a multiple of 512 that ends within its shard",
                (size > 0) & (size % BLOCK == 0) & (size <= room - start),
            ),
            ("bucket", f"0 to {buckets - 1}", (part["bucket"] >= 0) & (part["bucket"] < buckets)),
        ]
        for name, expected, right in checks:
            if not right.all():
                return _first_wrong(name, part[name], expected, right, begin)
        end = (start + size)[:, None]
        right = (offset >= start[:, None] + BLOCK) & (offset % BLOCK == 0) & (offset <= end)
        if not right.all():
            return _first_wrong("offset", offset, "a multiple of 512 within its sample", right, begin)
        right = (length >= filled) & (length <= end - offset)
        if not right.all():
            return _first_wrong("length", length, "a payload that ends within its sample", right, begin)
    return _wrong_keys(keys, ends)


def _first_wrong(name: str, column: np.ndarray, expected: str, right: np.ndarray, begin: int) -> str:
    place = np.argwhere(~right)[0]
    return f"{name}: got {column[tuple(place)]} for sample {begin + int(place[0])}, expected {expected}"


def _wrong_keys(keys: np.ndarray, ends: np.ndarray) -> str:
    """What is wrong with the keys, each of which must be UTF-8. Our own are ASCII, which shows without decoding."""
    if not len(keys) or int(keys.max()) < 128:
        return ""
    first = 0
    for number, end in enumerate(ends.tolist()):
        try:
            keys[first:end].tobytes().decode()
        except UnicodeDecodeError:
            return f"key_bytes: got {keys[first:end].tobytes()!r} for sample {number}, expected UTF-8"
        first = end
    return ""
