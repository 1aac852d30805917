"""A data set made of folders of shards: joined by key, checked against each other, read batch by batch."""

from __future__ import annotations

import abc
import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from dataclasses import field as made_by
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
import xxhash

from nexus_scale.contracts import Batch
from nexus_scale.data.bad import BadData, Note
from nexus_scale.data.buckets import LengthBucket
from nexus_scale.data.encoded import Encoded
from nexus_scale.data.fields import read_bytes, read_numbers
from nexus_scale.data.manifest import DataError, Field, Manifest, canonical_json
from nexus_scale.data.npy import HEADER_BYTES
from nexus_scale.data.order import Draw, Order, Stock, fixed_order
from nexus_scale.data.reader import BatchField, DatasetReader, Reader, read_alone
from nexus_scale.data.unpaired import UnpairedReader
from nexus_scale.processes.latents import LatentStats

log = logging.getLogger(__name__)

MEMORY_BYTES = 512 << 20
"""Bytes: most that the windows of one reader take together, and most that its decoded images take."""
WINDOW = 8
"""Number of shards whose samples are shuffled together."""
REPLACE = BadData()


@dataclass(frozen=True)
class Source:
    """Folders with the fields of the same samples, and how often these are drawn relative to other sources.

    `balance` in [0, 1]: 0 draws all samples alike, 1 draws all classes of the `label` field alike (`order.Stock`). `named`: further
    folders, by what batches call their image, or its moments.
    """

    folders: Sequence[str | Path]
    weight: float = 1.0
    balance: float = 0.0
    named: Mapping[str, str | Path] = made_by(default_factory=dict)


class Samples(abc.ABC):
    """What a loader needs to know of data: the number of samples, their buckets, and how to read them.

    Attributes:
        fields: shape of each batch field without the batch axis; None on axes that differ between buckets.
        latent_stats: mean and standard deviation per latent channel, where the data are latents.
        no_text: the conditions of the empty text, (1, ...) each, where the recipe's objective asks for them.
        encoders: what made each field that an encoder made, by field; each has a `fingerprint`.
        rates: frames or audio samples per second, by field, if the manifest names them.
        buckets: names of the resolutions or lengths.
        hash: changes whenever the data, or what is read of them, change.
        sources: joined folders of shards; empty for data that are not in folders.
    """

    fields: Mapping[str, tuple[int | None, ...]]
    latent_stats: LatentStats | None
    no_text: Mapping[str, torch.Tensor] | None = None
    encoders: Mapping[str, Mapping[str, object]]
    rates: Mapping[str, float] = MappingProxyType({})
    buckets: tuple[str, ...]
    hash: str
    window: int = WINDOW
    sources: Sequence[Sequence[Manifest]] = ()
    _fixed_reader: Reader | None = None

    @property
    @abc.abstractmethod
    def stocks(self) -> Sequence[Stock]:
        """Shards, buckets and weight of each source."""

    @abc.abstractmethod
    def reader(self, world_size: int = 1, note: Note | None = None) -> Reader:
        """A reader for one of `world_size` ranks. `note` gets incidents such as bad data and slow stores."""

    @property
    def samples(self) -> int:
        return sum(len(stock.bucket) for stock in self.stocks)

    @cached_property
    def first_numbers(self) -> np.ndarray:
        """The number of the first sample of each source in the whole data set, (sources,) int64."""
        return np.cumsum([0, *(len(stock.bucket) for stock in self.stocks)])[:-1].astype(np.int64)

    def order(self, seed: int, global_batch: int) -> Order:
        return Order(self.stocks, seed, global_batch, self.window, self.buckets)

    def fixed(self, count: int, rank: int = 0, world_size: int = 1, batch: int = 64) -> Iterator[Batch]:
        """This rank's batches of the first `count` samples in a fixed order, for validation.

        Positions are 0..count-1, with the same sample at the same position for any number of ranks. All ranks get the same number of
        batches of the same sizes. Where the ranks do not divide a bucket, its last samples (fewer than the ranks) are left out. If there
        are fewer samples than `count`, all are taken. Both are logged.
        """
        sources, numbers = fixed_order([len(stock.bucket) for stock in self.stocks], count)
        if len(sources) < count:
            log.warning("validation: got a request for %d samples, the data have %d: taking all", count, len(sources))
        bucket = np.array([self.stocks[s].bucket[n] for s, n in zip(sources, numbers, strict=True)], np.int64)
        if self._fixed_reader is None:
            self._fixed_reader = self.reader(world_size)
        left_out = 0
        for number in np.unique(bucket).tolist():
            positions = np.flatnonzero(bucket == number)
            usable = len(positions) - len(positions) % world_size
            left_out += len(positions) - usable
            draw = Draw(self.buckets[number], sources, numbers, (), np.zeros(0, np.int64))
            for start in range(0, usable, batch * world_size):
                each = min(batch, (usable - start) // world_size)
                own = positions[start + rank * each : start + (rank + 1) * each]
                fields, taken = self._fixed_reader.read(draw, own)
                taken = taken + self.first_numbers[sources[own]]
                yield Batch(fields, torch.from_numpy(own), torch.from_numpy(taken), bucket=self.buckets[number])
        if left_out:
            log.warning(
                "validation: leaving out %d of %d samples, so that %d ranks get equally many",
                left_out,
                count,
                world_size,
            )


# ------------------------------------------------------------------------------------------- real folders


class Dataset(Samples):
    """Sources of joined folders. Make it with `open`.

    Attributes:
        unpaired: see `beside`.
    """

    unpaired: Mapping[str, Dataset] = MappingProxyType({})

    def __init__(
        self,
        sources: Sequence[Sequence[Manifest]],
        weights: Sequence[float],
        balances: Sequence[float],
        parts: Sequence[BatchField],
        text_tokens: int | None,
        tokens: Mapping[str, int],
        memory_bytes: int,
        window: int,
        bad: BadData,
        encoded: Sequence[Encoded] = (),
    ):
        self.sources, self.parts, self.text_tokens, self.tokens = sources, tuple(parts), text_tokens, dict(tokens)
        self.memory_bytes, self.window, self.bad = memory_bytes, window, bad
        self.encoded, self.raw = tuple(encoded), [_raw_fields(manifests, encoded) for manifests in sources]
        shaped = [_bucket_names(manifests) for manifests in sources]
        self.buckets = tuple(sorted({name for names, _ in shaped for name in names}))
        self._bounds = {name: LengthBucket.of(name) for name in self.buckets}
        self._check_lengths()
        shapes = dict(pair for part in parts for pair in self._batch_shapes(part))
        for encoder in self.encoded:
            self._add_encoded(encoder, shapes)
        self.fields = shapes
        first = sources[0]
        used = sorted({part.folder for part in parts})
        stated = [*(first[folder].latent for folder in used), *(one.latent_stats for one in self.encoded)]
        self.latent_stats = next((stats for stats in stated if stats is not None), None)
        made = {part.name: first[part.folder].encoder for part in parts}
        self.encoders = {name: encoder for name, encoder in made.items() if encoder is not None}
        self.encoders |= {name: one.encoder for one in self.encoded for name in one.fields}
        self.rates = {part.name: rate for part in parts if (rate := _rate(part, sources)) is not None}
        place = {name: number for number, name in enumerate(self.buckets)}
        self._stocks = [
            Stock(
                np.array([shard.samples for shard in manifests[0].shards], np.int64),
                np.array([place[name] for name in names], np.int32)[bucket],
                weight,
                _labels(manifests) if balance > 0 else None,
                balance,
            )
            for manifests, weight, balance, (names, bucket) in zip(sources, weights, balances, shaped, strict=True)
        ]
        drawn = zip(sources, weights, balances, strict=True)
        body = [[[m.hash for m in manifests], weight, balance] for manifests, weight, balance in drawn]
        read = [[part.name, part.folder, part.field.extension, part.key] for part in parts]
        lengths: list[object] = (
            [dict(tokens)] if tokens else []
        )  # data without caps keep the hash that older versions gave them
        lengths += [[one.raw, one.conditioner.fingerprint] for one in self.encoded]
        self.hash = xxhash.xxh3_128_hexdigest(canonical_json([body, read, text_tokens, window, *lengths]))

    @property
    def stocks(self) -> Sequence[Stock]:
        return self._stocks

    def length(self, name: str, bucket: str, is_sequence: bool = True) -> int | None:
        """The length that a field is cut or padded to in batches of a bucket: the bucket's bound if it bounds this field, but at most the
        field's cap; otherwise the cap, or `text_tokens` for sequences. None: the length is not set."""
        own, bounds = self.tokens.get(name), self._bounds[bucket]
        if bounds is not None and bounds.field == name:
            return bounds.bound if own is None else min(own, bounds.bound)
        return self.text_tokens if own is None and is_sequence else own

    def lengths(self, made: Encoded, bucket: str) -> dict[str, int | None]:
        """The same for fields that are encoded while reading, by field."""
        return {name: self.length(name, bucket) for name, field in made.fields.items() if field.varies}

    def _add_encoded(self, made: Encoded, shapes: dict[str, tuple[int | None, ...]]) -> None:
        """Adds the names and shapes of the batch fields that a conditioner makes.

        Raises:
            DataError: a folder already has one of them.
        """
        for name, field in made.fields.items():
            if name in shapes:
                raise DataError(
                    f"data.on_the_fly: {name!r} would be encoded while reading, but the folders already have it; leave one of them out"
                )
            if not field.varies:
                shapes[name] = field.shape
                continue
            lengths = {self.length(name, bucket) for bucket in self.buckets}
            length = lengths.pop() if len(lengths) == 1 else None
            shapes[name], shapes[f"{name}_mask"] = (length, *field.shape[1:]), (length,)

    def cut(self) -> dict[str, int]:
        """Number of samples whose sequence is longer than batches keep, by field, for fields with any; reads no sample."""
        found: dict[str, int] = {}
        for part in self.parts:
            shape = part.field.shape
            if not part.field.is_sequence or shape is None or None in shape[1:]:
                continue
            each = math.prod(axis for axis in shape[1:] if axis is not None) * np.dtype(part.field.dtype).itemsize
            for manifests in self.sources:
                names, bucket = _bucket_names(manifests)
                caps = np.array([self.length(part.name, name) for name in names], np.int64)[bucket]  # (samples,)
                manifest = manifests[part.folder]
                longer = manifest.index.length[:, manifest.columns[part.field.name]] - HEADER_BYTES > caps * each
                found[part.name] = found.get(part.name, 0) + int(longer.sum())
        return {name: count for name, count in found.items() if count}

    def _check_lengths(self) -> None:
        """Raises DataError where the length of a varying field is not set, or a cap names no varying field."""
        sequences = {part.name: part.field.is_sequence for part in self.parts if part.field.varies}
        varying = sequences | {name: True for made in self.encoded for name, one in made.fields.items() if one.varies}
        if unknown := sorted(set(self.tokens) - set(varying)):
            raise DataError(
                f"data.tokens: got {unknown}, fields of varying length are {sorted(varying)}; remove the others"
            )
        open_ended = [
            name
            for name, is_sequence in varying.items()
            if any(self.length(name, bucket, is_sequence) is None for bucket in self.buckets)
        ]
        if open_ended:
            raise DataError(
                f"data: fields {open_ended} have varying lengths; set data.text_tokens, or data.tokens with a length for each, to "
                "cut or pad them to"
            )

    def _batch_shapes(self, part: BatchField) -> Iterator[tuple[str, tuple[int | None, ...]]]:
        """Names and shapes of the batch fields that a stored field gives; None on axes that differ between buckets."""
        shape = part.field.shape
        is_sequence = part.field.is_sequence
        lengths = {self.length(part.name, one, is_sequence) for one in self.buckets} if part.field.varies else set()
        length = lengths.pop() if len(lengths) == 1 else None
        if part.field.is_number:
            yield part.name, ()
        elif part.field.is_image:
            height, width = shape[:2] if shape else (None, None)
            yield part.name, (3, height, width)
        elif part.field.is_sound:
            yield part.name, (shape[0] if shape else None, length)
            yield f"{part.name}_mask", (length,)
        elif part.field.is_sequence:
            assert shape is not None
            yield part.name, (length, *shape[1:])
            yield f"{part.name}_mask", (length,)
        else:
            yield part.name, tuple(shape or ())

    @classmethod
    def open(
        cls,
        sources: Sequence[Source],
        fields: Sequence[str] | None = None,
        text_tokens: int | None = None,
        *,
        tokens: Mapping[str, int] | None = None,
        verify: Literal["none", "sizes", "hashes"] = "sizes",
        memory_bytes: int = MEMORY_BYTES,
        window: int = WINDOW,
        bad: BadData = REPLACE,
        encoded: Sequence[Encoded] = (),
    ) -> Dataset:
        """The data set of some sources, with the folders of each joined sample by sample.

        Args:
            fields: of batches; by default all that become tensors. A name that is a field of no folder is looked up in the `.json`.
                `<name>_mask` comes with its `<name>`.
            text_tokens: number of tokens to which sequences are cut or padded.
            tokens: the same for single fields. A field that buckets bound (`codes<=150`) is padded to its bucket's bound and needs none.
                Sounds are read only if they have one, in samples.
            verify: what is compared with the manifests now; hashes are in any case compared when shards are read.
            bad: the policy for samples that turn out bad when they are read.
            encoded: conditioners that make further fields from raw ones while reading.

        Raises:
            DataError: a folder is missing, empty or damaged, folders or sources do not fit each other, or no folder has a field.
        """
        if not sources or any(not s.folders or s.weight <= 0 or not 0 <= s.balance <= 1 for s in sources):
            raise DataError(
                f"data: got sources {list(sources)}, expected at least one, with folders, a weight above 0 and a "
                "balance in [0, 1]"
            )
        loaded = [[Manifest.load(folder) for folder in (*source.folders, *source.named.values())] for source in sources]
        for manifests in loaded:
            if verify != "none":
                for manifest in manifests:
                    manifest.verify(deep=verify == "hashes")
            for other in manifests[1:]:
                _check_joined(manifests[0], other)
        tokens = dict(tokens or {})
        made = {name for one in encoded for name in one.fields}
        asked = None if fields is None else [name for name in fields if name not in sources[0].named]
        unnamed = loaded[0][: len(sources[0].folders)]
        parts = _choose(unnamed, asked, {name: length for name, length in tokens.items() if name not in made})
        parts += _named(sources, loaded[0], parts, fields)
        for manifests in loaded[1:]:
            _check_alike(loaded[0], manifests, parts)
        weights, balances = [source.weight for source in sources], [source.balance for source in sources]
        return cls(loaded, weights, balances, parts, text_tokens, tokens, memory_bytes, window, bad, encoded)

    def check_encoders(self, fingerprints: Mapping[str, str]) -> None:
        """Raises DataError unless the encoder with the given fingerprint made each named field, in all sources."""
        for part in self.parts:
            if part.name in fingerprints:
                for manifests in self.sources:
                    manifests[part.folder].check_encoder(fingerprints[part.name], f"field {part.name!r}")

    def only(self, fields: Sequence[str]) -> Dataset:
        """The same samples with only some of their fields: quick to read where the others are large."""
        parts = [part for part in self.parts if part.name in fields]
        weights, balances = [stock.weight for stock in self._stocks], [stock.balance for stock in self._stocks]
        encoded = [one for one in self.encoded if any(name in fields for name in one.fields)]
        kept = {*fields, *(name for one in encoded for name in one.fields)}
        tokens = {name: length for name, length in self.tokens.items() if name in kept}
        some = Dataset(
            self.sources, weights, balances, parts, self.text_tokens, tokens, self.memory_bytes, self.window, self.bad,
            encoded,
        )  # fmt: skip
        return some.beside({name: other for name, other in self.unpaired.items() if name in fields})

    def beside(self, unpaired: Mapping[str, Dataset]) -> Dataset:
        """The same samples, with an image of each of these sets beside them that has nothing to do with them, by the field's name.

        Raises:
            DataError: a field of that name is there already; images of several sizes, or none.
        """
        made = copy.copy(self)
        for name, other in unpaired.items():
            if name in self.fields:
                raise DataError(
                    f"data.unpaired: {name!r} is a field of {self.sources[0][0].where}; choose another name"
                )
            if other.buckets != self.buckets or len(self.buckets) != 1:
                raise DataError(
                    f"data.unpaired.{name}: got images of {sorted({*self.buckets, *other.buckets})}; expected one size, on both sides"
                )
        if unpaired:
            made.unpaired = dict(unpaired)
            made.fields = {**self.fields, **{name: one.fields[one.image] for name, one in unpaired.items()}}
            hashes = [self.hash, {name: one.hash for name, one in unpaired.items()}]
            made.hash = xxhash.xxh3_128_hexdigest(canonical_json(hashes))
        return made

    @property
    def image(self) -> str:
        """The name of its one field of images; raises DataError where it has none, or several."""
        names = [part.name for part in self.parts if part.field.is_image]
        if len(names) != 1:
            raise DataError(f"{self.sources[0][0].where}: got images {names}; expected one field of images")
        return names[0]

    def reader(self, world_size: int = 1, note: Note | None = None) -> Reader:
        own = DatasetReader(self, world_size, note)
        return UnpairedReader(own, self.unpaired, world_size, note) if self.unpaired else own

    def keys(self, samples: Sequence[int]) -> list[str]:
        """The keys of samples by their numbers in the data set, as in `Batch.samples`."""
        found = []
        for sample in samples:
            source = int(np.searchsorted(self.first_numbers, sample, side="right")) - 1
            found.append(self.sources[source][0].index.key(int(sample - self.first_numbers[source])))
        return found

    def texts(self, field: str, samples: Sequence[int]) -> list[str]:
        """A `.txt` or `.json` field, such as captions, of samples by their numbers in the data set."""
        texts = []
        for sample in samples:
            source = int(np.searchsorted(self.first_numbers, sample, side="right")) - 1
            manifest = next(
                (m for m in self.sources[source] if field in m.fields and m.fields[field].kind in ("txt", "json")), None
            )
            if manifest is None:
                raise DataError(
                    f"{self.sources[source][0].where}: got no text field {field!r} in this source's folders"
                )
            number = np.array([sample - self.first_numbers[source]], np.int64)
            for data in read_bytes(read_alone(manifest, field, number)):
                try:
                    texts.append(data.decode())
                except UnicodeDecodeError as error:
                    raise DataError(
                        f"{manifest.where}: {manifest.name(int(number[0]))}: got a text {field!r} that is not UTF-8 ({error})"
                    ) from error
        return texts


def _rate(part: BatchField, sources: Sequence[Sequence[Manifest]]) -> float | None:
    """The rate of a field; the first source's if they differ, which is logged; None if no source has one."""
    said = [rate for manifests in sources if (rate := manifests[part.folder].rates.get(part.field.name)) is not None]
    if len(set(said)) > 1:
        log.warning(
            "data: sources have %s at different rates (%s per second); samples are written at %g",
            part.name,
            said,
            said[0],
        )
    return said[0] if said else None


def _bucket_names(manifests: Sequence[Manifest]) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of a source's buckets and the bucket of each sample, from the first folder that has shapes."""
    manifest = next((m for m in manifests if any(m.buckets)), manifests[0])
    return manifest.buckets, manifest.index.bucket


def _raw_fields(manifests: Sequence[Manifest], encoded: Sequence[Encoded]) -> list[tuple[int, Field]]:
    """For each raw field that is encoded while reading: the place of its folder in the source, and the field.

    Raises:
        DataError: no folder has it.
    """
    found = []
    for made in encoded:
        place = next((n for n, manifest in enumerate(manifests) if made.raw in manifest.fields), None)
        if place is None:
            where = ", ".join(manifest.where for manifest in manifests)
            raise DataError(
                f"data.on_the_fly: {where}: got no field {made.raw!r} to encode {sorted(made.fields)} from; add the folder that has it"
            )
        found.append((place, manifests[place].fields[made.raw]))
    return found


def _check_joined(first: Manifest, other: Manifest) -> None:
    """Raises DataError unless two folders of one source hold fields of the same samples, shard by shard."""
    a, b = [shard.samples for shard in first.shards], [shard.samples for shard in other.shards]
    mine, its = first.index, other.index
    if a == b and np.array_equal(mine.key_ends, its.key_ends) and np.array_equal(mine.key_bytes, its.key_bytes):
        return
    for number in range(min(first.samples, other.samples)):
        if mine.key(number) != its.key(number):
            difference = f"sample {number} is {mine.key(number)!r} here and {its.key(number)!r} there"
            break
    else:
        difference = f"{first.samples} samples in {len(a)} shards here and {other.samples} in {len(b)} there"
    raise DataError(
        f"{first.where} and {other.where}: got folders of different samples ({difference}), expected the same "
        "keys in "
        "the same shards; make both from the same input"
    )


def _check_alike(first: Sequence[Manifest], other: Sequence[Manifest], parts: Sequence[BatchField]) -> None:
    """Raises DataError unless a further source has the same fields in the same form, made by the same encoders."""
    for part in parts:
        if part.folder >= len(other):
            raise DataError(
                f"{other[0].where}: got a source of {len(other)} folders, expected {len(first)} as in the first"
            )
        mine, its = first[part.folder], other[part.folder]
        field = its.fields.get(part.field.name)
        if field is None or (field.extension, field.dtype) != (part.field.extension, part.field.dtype):
            raise DataError(f"{its.where}: got field {field}, expected {part.field} as in {mine.where}")
        if mine.fingerprint != its.fingerprint:
            raise DataError(
                f"{its.where}: got data of encoder {its.fingerprint}, expected {mine.fingerprint} as in "
                f"{mine.where}; "
                "make both with one encoder"
            )
        if mine.latent != its.latent:
            raise DataError(
                f"{its.where}: got latent statistics {its.latent}, expected {mine.latent} as in {mine.where}; "
                "write the same statistics into both"
            )


def _choose(manifests: Sequence[Manifest], fields: Sequence[str] | None, tokens: Mapping[str, int]) -> list[BatchField]:
    """The stored field behind each batch field: from the first folder that has it. Sounds are long, so they come only on request."""
    known = {name: (f, field) for f, m in reversed(list(enumerate(manifests))) for name, field in m.fields.items()}
    asked = set(tokens).union(fields or ())
    tensors = {
        n: v for n, v in known.items() if v[1].kind in ("npy", "cls") or v[1].is_image or (v[1].is_sound and n in asked)
    }
    if fields is None:
        return [BatchField(name, *tensors[name]) for name in sorted(tensors)]
    parts = []
    for name in fields:
        base = name.removesuffix("_mask")
        if name not in known and base != name and base in tensors and tensors[base][1].varies:
            if base not in fields:
                parts.append(BatchField(base, *tensors[base]))
        elif name in tensors:
            parts.append(BatchField(name, *tensors[name]))
        elif name not in known and (source := next((v for v in known.values() if v[1].kind == "json"), None)):
            parts.append(BatchField(name, *source, key=name))
        else:
            where = ", ".join(manifest.where for manifest in manifests)
            raise DataError(
                f"{where}: got no field {name!r} that becomes a tensor, there are {sorted(tensors)}; add its folder"
            )
    return parts


def _named(
    sources: Sequence[Source], manifests: Sequence[Manifest], parts: Sequence[BatchField], fields: Sequence[str] | None
) -> list[BatchField]:
    """The images of folders, or their moments, that batches call by a name of its own; see `Source.named`."""
    first = sources[0]
    for other in sources[1:]:
        if list(other.named) != list(first.named) or (first.named and len(other.folders) != len(first.folders)):
            raise DataError(f"data: got sources {list(first.named)} and {list(other.named)}; expected the same `named`")
    if both := sorted({part.name for part in parts} & set(first.named)):
        raise DataError(f"data: {both} are fields of {manifests[0].where}; give what is `named` another name")
    named = zip(first.named, manifests[len(first.folders) :], range(len(first.folders), len(manifests)), strict=True)
    return [
        BatchField(name, place, manifest.fields.get("moments") or manifest.image)
        for name, manifest, place in named
        if fields is None or name in fields
    ]


def _labels(manifests: Sequence[Manifest]) -> np.ndarray:
    """The class of each sample of joined folders, (samples,), from the first folder with a `label` field."""
    manifest = next((m for m in manifests if "label" in m.fields and m.fields["label"].kind == "cls"), None)
    if manifest is None:
        raise DataError(
            f"{manifests[0].where}: balance needs a `label` field (.cls), and no folder of the source has one"
        )
    parts = []
    for first, shard in zip(manifest.first_samples[:-1].tolist(), manifest.shards, strict=True):
        payloads = read_alone(manifest, "label", np.arange(first, first + shard.samples, dtype=np.int64))
        parts.append(read_numbers(manifest.fields["label"], payloads, None).numpy())
    return np.concatenate(parts)


__all__ = ["BadData", "Dataset", "Reader", "Samples", "Source"]
