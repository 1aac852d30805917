"""Synthetic samples with the interface of a `Dataset`, for tests and dry runs; no files needed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.data.bad import Note
from nexus_scale.data.buckets import LengthBucket, check_bounds
from nexus_scale.data.dataset import Reader, Samples
from nexus_scale.data.manifest import canonical_json
from nexus_scale.data.order import Draw, Stock, derive, keyed_hash

_DTYPES = {"float32": torch.float32, "int64": torch.int64, "bool": torch.bool}
_KNOWN = {"shape", "dtype", "lengths", "high", "bounds"}


class SyntheticDataset(Samples):
    """Samples whose values are a function of (seed, field, number of the sample).

    Args:
        samples: number of samples.
        fields: by name `{"shape": [...]}` with, where wanted, `dtype`: float32 (standard normal, the default), int64
            (0..high-1) or bool; `lengths: true`: a length of 1..shape[0] per sample, zeros after it, and `<name>_mask`. One field
            with lengths may have `bounds`, up to shape[0]: samples are in buckets of its length, padded to their bucket's bound.
        seed: of the values.
    """

    def __init__(self, samples: int, fields: Mapping[str, Mapping[str, Any]], seed: int = 0):
        for name, field in fields.items():
            if unknown := set(field) - _KNOWN:
                raise UserError(f"data.synthetic.fields.{name}: got unknown {sorted(unknown)}, valid: {sorted(_KNOWN)}")
            if "shape" not in field or field.get("dtype", "float32") not in _DTYPES:
                raise UserError(
                    f"data.synthetic.fields.{name}: got {dict(field)}, expected a shape and a dtype of {list(_DTYPES)}"
                )
            if field.get("lengths") and not field["shape"]:
                raise UserError(
                    f"data.synthetic.fields.{name}: got lengths for a number, expected a shape with an axis"
                )
            if field.get("dtype") == "int64" and int(field.get("high", 0)) < 1:
                raise UserError(f"data.synthetic.fields.{name}: int64 needs `high`, the number of values")
            if "bounds" in field and (
                not field.get("lengths") or check_bounds(field["bounds"])[-1] != field["shape"][0]
            ):
                raise UserError(
                    f"data.synthetic.fields.{name}: got {dict(field)}, expected `lengths: true` and bounds up to {field['shape'][0]}"
                )
        bounded = [name for name, field in fields.items() if "bounds" in field]
        if len(bounded) > 1:
            raise UserError(f"data.synthetic: got bounds for {bounded}, expected them for one field at most")
        if samples < 1 or not fields:
            raise UserError(
                f"data.synthetic: got {samples} samples with fields {list(fields)}, expected at least one each"
            )
        self.seed, self.spec = seed, {name: dict(field) for name, field in fields.items()}
        self.fields: dict[str, tuple[int | None, ...]] = {}
        self.buckets: tuple[str, ...] = ("",)
        bucket = np.zeros(samples, np.int32)
        for name, field in self.spec.items():
            shape = list(field["shape"])
            if "bounds" in field:
                shape[0] = None if len(field["bounds"]) > 1 else shape[0]
                self.buckets = tuple(LengthBucket(name, bound).name for bound in field["bounds"])
                bucket = np.searchsorted(field["bounds"], self.lengths(name, np.arange(samples))).astype(np.int32)
            self.fields[name] = tuple(shape)
            if field.get("lengths"):
                self.fields[f"{name}_mask"] = (shape[0],)
        self.latent_stats = None
        self.encoders: Mapping[str, Mapping[str, object]] = {}
        self.hash = xxhash.xxh3_128_hexdigest(canonical_json([samples, self.spec, seed]))
        self._stock = Stock(np.array([samples]), bucket)

    @property
    def stocks(self) -> Sequence[Stock]:
        return (self._stock,)

    def key(self, name: str) -> int:
        """The key of a field's values."""
        return derive(self.seed, int.from_bytes(name.encode(), "little"))

    def lengths(self, name: str, samples: np.ndarray) -> np.ndarray:
        """The length of a field in each of the samples (n,), as (n,) int64 in 1..shape[0]."""
        longest = np.uint64(self.spec[name]["shape"][0])
        return 1 + (keyed_hash(derive(self.key(name), 2), samples) % longest).astype(np.int64)

    def only(self, fields: Sequence[str]) -> SyntheticDataset:
        """The same samples with only some of their fields."""
        kept = {name: spec for name, spec in self.spec.items() if name in fields}
        return SyntheticDataset(self.samples, kept, self.seed)

    def keys(self, samples: Sequence[int]) -> list[str]:
        """Names for samples without captions."""
        return [f"made up {number}" for number in samples]

    def of_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Fields (B, ...) in place of encoded texts: those of the sample whose number is the hash of the text."""
        numbers = np.array([xxhash.xxh3_64_intdigest(text.encode()) % (1 << 20) for text in texts], np.int64)
        draw = Draw(self.buckets[-1], np.zeros_like(numbers), numbers, (), np.zeros(0, np.int64))
        fields, _ = self.reader().read(draw, np.arange(len(numbers)))
        return fields

    def reader(self, world_size: int = 1, note: Note | None = None) -> SyntheticReader:
        return SyntheticReader(self)


class SyntheticReader(Reader):
    """The reader of synthetic samples, which computes them."""

    def __init__(self, dataset: SyntheticDataset):
        self._dataset = dataset

    def read(self, draw: Draw, places: np.ndarray) -> tuple[dict[str, Tensor], np.ndarray]:
        samples = draw.samples[places]
        fields: dict[str, Tensor] = {}
        bucket = LengthBucket.of(draw.bucket)
        for name, field in self._dataset.spec.items():
            values = _values(self._dataset.key(name), samples, field)
            if field.get("lengths"):
                longest = bucket.bound if bucket is not None and bucket.field == name else field["shape"][0]
                lengths = torch.from_numpy(self._dataset.lengths(name, samples))
                mask = torch.arange(longest) < lengths[:, None]  # (n, L)
                values = values[:, :longest]
                values = values * mask.view(*mask.shape, *[1] * (values.ndim - 2)).to(values.dtype)
                fields[f"{name}_mask"] = mask
            fields[name] = values
        return fields, samples

    def close(self) -> None:
        return None


def _values(key: int, samples: np.ndarray, field: Mapping[str, Any]) -> Tensor:
    """(n, *shape) of the field's dtype."""
    count = math.prod(field["shape"])
    # Each value has its own number: sample * count + place in the sample.
    numbers = samples[:, None] * max(count, 1) + np.arange(count)  # (n, count)
    bits = keyed_hash(key, numbers)
    dtype = field.get("dtype", "float32")
    if dtype == "int64":
        flat = (bits % np.uint64(field["high"])).astype(np.int64)
    elif dtype == "bool":
        flat = bits >> np.uint64(63) == 1
    else:
        # Box and Muller 1958; 24 bits each, in (0, 1] and [0, 1).
        u = ((bits >> np.uint64(40)) + np.uint64(1)).astype(np.float64) * 2.0**-24
        v = (bits & np.uint64(0xFFFFFF)).astype(np.float64) * 2.0**-24
        flat = (np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)).astype(np.float32)
    return torch.from_numpy(flat.reshape(len(samples), *field["shape"])).to(_DTYPES[dtype])
