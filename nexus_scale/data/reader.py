"""Tensors from sample numbers: the fields of a batch, gathered by folder and window, with bad samples replaced."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nexus_scale.data.bad import BadData, BadSamples, Note, Quarantine
from nexus_scale.data.encoded import Encoded, as_batch
from nexus_scale.data.fields import (
    NumberCache,
    Payloads,
    PixelCache,
    images_to_tensor,
    read_arrays,
    read_bytes,
    read_numbers,
    read_sequences,
    read_sounds,
)
from nexus_scale.data.manifest import DataError, Field, Manifest
from nexus_scale.data.order import Draw, Stock, Window
from nexus_scale.data.shards import decode
from nexus_scale.data.windows import Chunk, ShardReader

Fields = dict[str, Tensor]

FETCHERS = 4
"""Shards that are fetched from stores at the same time."""


class Reader(abc.ABC):
    """Reads the tensors of samples. Each thread needs its own, since it keeps files and windows open."""

    @abc.abstractmethod
    def read(self, draw: Draw, places: np.ndarray) -> tuple[Fields, np.ndarray]:
        """The samples at `places` (n,) of a draw: fields, each (n, ...), and the samples' numbers in their sources, (n,) int64. They
        differ from the draw's where bad samples were replaced."""

    def fetch(self, windows: Iterable[Window]) -> None:
        """Announces the windows that are read now and next, so that a reader of remote data can fetch them meanwhile."""
        return None

    @abc.abstractmethod
    def close(self) -> None: ...


@dataclass(frozen=True)
class BatchField:
    """The stored field behind a batch field, in the folder at place `folder` of each source; `key` within JSON."""

    name: str
    folder: int
    field: Field
    key: str | None = None


def locate(manifest: Manifest, field: str, samples: np.ndarray, chunk: Chunk) -> Payloads:
    """The payloads of a field of samples (n,) in the chunk that holds their bytes."""
    column = manifest.columns[field]
    index = manifest.index
    length = manifest.even.get(field)
    lengths = index.length[samples, column] if length is None else np.full(len(samples), length)
    return Payloads(chunk.buffer, chunk.base + index.offset[samples, column], lengths)


class Readable(Protocol):
    """The members of a data set that a reader needs. `Dataset` has them.

    Attributes:
        sources: the folders of each source.
        stocks: of each source.
        parts: the stored fields of a batch.
        encoded: conditioners that encode raw fields while reading.
        raw: for each source, the folder and raw field of each of these.
        memory_bytes: most bytes that readers may keep.
        bad: the policy for bad samples.
    """

    sources: Sequence[Sequence[Manifest]]
    parts: tuple[BatchField, ...]
    encoded: tuple[Encoded, ...]
    raw: list[list[tuple[int, Field]]]
    memory_bytes: int
    bad: BadData

    @property
    def stocks(self) -> Sequence[Stock]: ...

    def length(self, name: str, bucket: str, is_sequence: bool = True) -> int | None:
        """The length that a field is cut or padded to in batches of a bucket; None: the length is not set."""
        ...

    def lengths(self, made: Encoded, bucket: str) -> dict[str, int | None]:
        """The same for fields that are encoded while reading, by field."""
        ...


class DatasetReader(Reader):
    """Reads batches of a data set; gathers each field for all samples of a window at once."""

    def __init__(self, dataset: Readable, world_size: int, note: Note | None = None):
        self._dataset = dataset
        used = {part.folder for part in dataset.parts} | {folder for raw in dataset.raw for folder, _ in raw}
        streams = sum(len(np.unique(stock.bucket)) for stock in dataset.stocks)
        # A batch may span two windows of each stream.
        limit = dataset.memory_bytes // (2 * streams * len(used))
        self._quarantine = Quarantine(dataset.bad, dataset.stocks, note)
        self._shards = [
            {
                folder: ShardReader(
                    manifests[folder],
                    world_size,
                    limit,
                    functools.partial(self._quarantine.report, source, manifests[folder]),
                )
                for folder in used
            }
            for source, manifests in enumerate(dataset.sources)
        ]
        # With the shapes of each source: stills may be in buckets beside clips.
        self._parts = [
            [
                replace(part, field=manifests[part.folder].fields.get(part.field.name, part.field))
                for part in dataset.parts
            ]
            for manifests in dataset.sources
        ]
        self._cache = PixelCache(dataset.memory_bytes)
        self._numbers: dict[tuple[int, str], NumberCache] = {}
        self._stores = [m.store for manifests in dataset.sources for m in manifests if m.store is not None]
        self._pool: ThreadPoolExecutor | None = None
        self._fetched: tuple[Window, ...] = ()
        for store in self._stores if note is not None else ():
            store.note = note

    def fetch(self, windows: Iterable[Window]) -> None:
        wanted = tuple(windows) if self._stores else ()
        if wanted == self._fetched:
            return
        self._fetched = wanted
        if self._pool is None:
            self._pool = ThreadPoolExecutor(FETCHERS, "shards")
        for window in wanted:
            for reader in self._shards[window.source].values():
                reader.fetch(window, self._pool)

    def read(self, draw: Draw, places: np.ndarray) -> tuple[Fields, np.ndarray]:
        samples, sources = draw.samples[places], draw.sources[places]
        while True:
            self._quarantine.check()
            bad = self._quarantine.rows(sources, samples)
            try:
                groups = self._groups(draw, places, np.delete(np.arange(len(places)), bad) if len(bad) else None)
                break
            except BadSamples:  # each round finds at least one more
                continue
        for row in bad.tolist():
            fields, samples[row] = self._substitute(draw, int(places[row]))
            groups.append((np.array([row]), fields))
        return self._joined(draw, groups), samples

    def _groups(self, draw: Draw, places: np.ndarray, rows: np.ndarray | None) -> list[tuple[np.ndarray, Fields]]:
        """The fields of rows, grouped by window or by source. `rows`: the places that are read; None reads all.

        Raises:
            BadSamples: some samples are bad; they have been reported.
        """
        groups: list[tuple[np.ndarray, Fields]] = []
        rows = np.arange(len(places)) if rows is None else rows
        if draw.windows:
            window_of = draw.window[places[rows]]
            for number in np.unique(window_of).tolist() if len(draw.windows) > 1 else [0] if len(rows) else []:
                some = rows[window_of == number] if len(draw.windows) > 1 else rows
                window = draw.windows[number]
                groups.append((some, self._read(window.source, draw.samples[places[some]], window, draw.bucket)))
            for source in {window.source for window in draw.windows}:
                needed = [window.shards for window in draw.windows if window.source == source]
                for reader in self._shards[source].values():
                    reader.forget(draw.bucket, needed)
        else:
            sources = draw.sources[places[rows]]
            for source in np.unique(sources).tolist():
                some = rows[sources == source]
                groups.append((some, self._read(source, draw.samples[places[some]], None, draw.bucket)))
        return groups

    def _joined(self, draw: Draw, groups: list[tuple[np.ndarray, Fields]]) -> Fields:
        """The fields of all groups, in the order of their rows."""
        if len(groups) == 1:
            return groups[0][1]
        rows = np.concatenate([rows for rows, _ in groups])
        try:
            fields = {name: torch.cat([part[name] for _, part in groups]) for name in groups[0][1]}
        except RuntimeError as error:
            shapes = {name: [tuple(part[name].shape[1:]) for _, part in groups] for name in groups[0][1]}
            raise DataError(
                f"bucket {draw.bucket!r}: got shapes {shapes} in one batch, expected one per field"
            ) from error
        if (rows[1:] > rows[:-1]).all():  # window by window
            return fields
        back = torch.from_numpy(np.argsort(rows, kind="stable"))
        return {name: value.index_select(0, back) for name, value in fields.items()}

    def _substitute(self, draw: Draw, place: int) -> tuple[Fields, int]:
        """The first good candidate for a place of a draw, with its fields, each (1, ...)."""
        for candidate in self._quarantine.candidates(draw, place):
            try:
                return self._read(int(draw.sources[place]), np.array([candidate]), None, draw.bucket), candidate
            except BadSamples:
                continue
        raise AssertionError("candidates end with an error")

    def _read(self, source: int, samples: np.ndarray, window: Window | None, stream: str) -> Fields:
        """The fields of samples of one source, all in one window if one is given."""
        chunks: dict[int, Chunk] = {}
        fields: Fields = {}
        for part in self._parts[source]:
            reader = self._shards[source][part.folder]
            if part.field.is_image:
                fields[part.name] = self._images(part, source, reader, samples, window, stream)
                continue
            if part.folder not in chunks:
                chunks[part.folder] = reader.read(samples, window, stream)
            kept = self._kept(source, part)
            if kept is not None and (numbers := kept.get(samples)) is not None:
                fields[part.name] = numbers
                continue
            payloads = locate(reader.manifest, part.field.name, samples, chunks[part.folder])
            try:
                fields.update(self._decode(part, payloads, reader.manifest, stream))
            except DataError as error:
                self._blame(source, part, reader.manifest, samples, payloads, stream)
                raise DataError(f"{reader.manifest.where}: {error}") from error
            if kept is not None:
                kept.put(samples, fields[part.name])
        for made, (folder, field) in zip(self._dataset.encoded, self._dataset.raw[source], strict=True):
            reader = self._shards[source][folder]
            if folder not in chunks:
                chunks[folder] = reader.read(samples, window, stream)
            payloads = locate(reader.manifest, field.name, samples, chunks[folder])
            fields.update(self._encode(made, field, source, reader.manifest, samples, payloads, stream))
        return fields

    def _encode(
        self,
        made: Encoded,
        field: Field,
        source: int,
        manifest: Manifest,
        samples: np.ndarray,
        payloads: Payloads,
        bucket: str,
    ) -> Fields:
        """The fields that a conditioner makes from a raw field. Samples that it cannot encode are bad."""
        raw, rows, lengths = read_bytes(payloads), {}, self._dataset.lengths(made, bucket)

        def encode(row: int) -> None:
            rows[row] = made.row(raw[row], functools.partial(decode, field.extension), lengths)

        self._each(source, manifest, samples, encode)
        return as_batch([rows[row] for row in range(len(samples))], made.fields, lengths)

    def _kept(self, source: int, part: BatchField) -> NumberCache | None:
        """The cache of a field's numbers; None where the field has none."""
        if not part.field.is_number:
            return None
        if (source, part.name) not in self._numbers:
            self._numbers[source, part.name] = NumberCache(self._dataset.sources[source][part.folder].samples)
        return self._numbers[source, part.name]

    def _decode(self, part: BatchField, payloads: Payloads, manifest: Manifest, bucket: str) -> Fields:
        if part.field.varies:
            length = self._dataset.length(part.name, bucket, part.field.is_sequence)
            assert length is not None, (part.name, bucket)
            if part.field.is_sound:
                values, mask = read_sounds(part.field, payloads, length)
            else:
                values, mask = read_sequences(part.field, payloads, length, manifest.finite)
            return {part.name: values, f"{part.name}_mask": mask}
        if part.field.is_number:
            return {part.name: read_numbers(part.field, payloads, part.key)}
        return {part.name: read_arrays(part.field, payloads, manifest.finite)}

    def _blame(
        self, source: int, part: BatchField, manifest: Manifest, samples: np.ndarray, payloads: Payloads, bucket: str
    ) -> None:
        """Raises BadSamples where samples cannot be decoded even alone; returns where they only do not fit together."""

        def decode(row: int) -> None:
            one = Payloads(payloads.buffer, payloads.positions[row : row + 1], payloads.lengths[row : row + 1])
            self._decode(part, one, manifest, bucket)

        self._each(source, manifest, samples, decode)

    def _each(self, source: int, manifest: Manifest, samples: np.ndarray, decode: Callable[[int], None]) -> None:
        """Decodes samples one by one and reports those that cannot be decoded; then raises BadSamples."""
        reasons: dict[int, str] = {}
        for row, sample in enumerate(samples.tolist()):
            try:
                decode(row)
            except DataError as error:
                reasons[sample] = f"cannot be used: {error}"
        shards = np.searchsorted(manifest.first_samples, sorted(reasons), side="right") - 1
        for shard in np.unique(shards).tolist():
            here = {s: reasons[s] for s, of in zip(sorted(reasons), shards.tolist(), strict=True) if of == shard}
            self._quarantine.report(source, manifest, shard, here, "has samples that cannot be decoded")
        if reasons:
            raise BadSamples(manifest.where, reasons)

    def _images(
        self,
        part: BatchField,
        source: int,
        reader: ShardReader,
        samples: np.ndarray,
        window: Window | None,
        stream: str,
    ) -> Tensor:
        """Decoded images (n, 3, H, W); reads only the bytes of those that are not cached."""
        name = f"{source}/{part.name}"
        missing = np.array([s for s in np.unique(samples).tolist() if self._cache.get(name, s) is None], np.int64)
        decoded: dict[int, np.ndarray] = {}
        if len(missing):
            payloads = locate(reader.manifest, part.field.name, missing, reader.read(missing, window, stream))

            def decode(row: int) -> None:
                one = Payloads(payloads.buffer, payloads.positions[row : row + 1], payloads.lengths[row : row + 1])
                decoded[int(missing[row])] = self._cache.decode(name, int(missing[row]), part.field, one)

            self._each(source, reader.manifest, missing, decode)
        pixels = [decoded[s] if s in decoded else self._cache.get(name, s) for s in samples.tolist()]
        return images_to_tensor([array for array in pixels if array is not None])

    def close(self) -> None:
        if self._pool is not None:
            for store in self._stores:
                store.hurry.set()
            self._pool.shutdown(cancel_futures=True)
            for store in self._stores:
                store.hurry.clear()
            self._pool, self._fetched = None, ()
        for folders in self._shards:
            for reader in folders.values():
                reader.close()


def strict(manifest: Manifest) -> Callable[[int, object, str], None]:
    """A report function for a `ShardReader` without replacements: raises DataError."""

    def report(shard: int, reasons: object, damage: str) -> None:
        raise DataError(
            f"{manifest.at(manifest.shards[shard].file)}: {damage}; the shard is damaged: restore it or make it again"
        )

    return report


def read_alone(manifest: Manifest, field: str, samples: np.ndarray) -> Payloads:
    """The payloads of one field of samples (n,), without the rest. Raises DataError where one is bad."""
    reader = ShardReader(manifest, 1, 0, strict(manifest))
    try:
        return locate(manifest, field, samples, reader.read(samples, None))
    finally:
        reader.close()


__all__: Sequence[str] = ["DatasetReader", "BatchField", "Reader", "locate", "read_alone"]
