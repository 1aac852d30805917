"""Checked bytes from disk in memory: the whole shards of a window, or the byte ranges of single samples.

`ShardReader.reads_whole` alone decides between the two. Either way the bytes end up in one buffer in which payloads begin at multiples of
512, so that a whole batch is gathered at once. Nothing leaves this file unchecked: whole shards are hashed once when they are read, ranges
sample by sample. In both cases the hash of a sample decides whether it is bad, so that does not depend on how it was read.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import mmap
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from nexus_scale.data.bad import BadSamples
from nexus_scale.data.errors import DataError, StoreError
from nexus_scale.data.manifest import Manifest
from nexus_scale.data.order import Window

log = logging.getLogger(__name__)

WHOLE_FROM = 0.25
"""Share of a window's bytes above which reading all of it is cheaper than picking samples: a pick costs a system call and a hash, about
10 us against 2.5 us for 8 KiB in one stream."""
_OPEN_FILES = 32
_PIECE = 1 << 20

Buffer = bytes | memoryview
Report = Callable[[int, Mapping[int, str], str], None]


class Chunk(NamedTuple):
    """The bytes of some samples of one folder.

    Attributes:
        buffer: (bytes,) uint8; its length is a multiple of 512.
        base: for each sample, the difference between an offset in the buffer and in the index, (n,) int64.
    """

    buffer: Tensor
    base: np.ndarray


class _HeldWindow(NamedTuple):
    """The shards of a window in memory, ascending: all bytes, and the beginning and first sample of each shard, (shards,) each."""

    buffer: Tensor
    starts: np.ndarray
    firsts: np.ndarray


class ShardReader:
    """Reads the shards of one folder. Not thread-safe.

    Bytes that differ from the index are read once more, from a reopened file, before they count as bad.

    Args:
        world_size: number of ranks that share a global batch, so that each needs that part of a window.
        memory_bytes: most bytes that one window may take.
        report: `report(shard, reasons, damage)` is called for a damaged shard, with the reasons why samples are bad, by their numbers, and
            with what is wrong with the shard. It may raise.
    """

    def __init__(self, manifest: Manifest, world_size: int, memory_bytes: int, report: Report):
        self.manifest = manifest
        self._world_size, self._memory_bytes, self._report = world_size, memory_bytes, report
        self._windows: dict[str, dict[tuple[int, ...], _HeldWindow]] = {}
        self._bad: dict[int, str] = {}
        self._coming: set[int] = set()
        self._spare: Tensor | None = None
        self._largest = 0
        self._files: OrderedDict[int, int] = OrderedDict()

    def reads_whole(self, window: Window | None) -> bool:
        """Whether this rank reads all shards of a window instead of only its own samples."""
        if window is None or window.share / self._world_size < WHOLE_FROM:
            return False
        return sum(self.manifest.shards[shard].bytes for shard in window.shards) <= self._memory_bytes

    def read(self, samples: np.ndarray, window: Window | None, stream: str = "") -> Chunk:
        """The bytes of samples (n,), all in `window` if one is given.

        A stream keeps the windows of its latest batch; `forget` drops the others.

        Raises:
            BadSamples: some of these samples are bad; they have been reported.
        """
        if window is None or not self.reads_whole(window):
            self._refuse(samples)
            return self._read_ranges(samples)
        windows = self._windows.setdefault(stream, {})
        if window.shards not in windows:
            windows[window.shards] = self._read_whole(window.shards)
        self._refuse(samples)
        held = windows[window.shards]
        return Chunk(held.buffer, held.starts[held.firsts.searchsorted(samples, side="right") - 1])

    def _refuse(self, samples: np.ndarray) -> None:
        if self._bad and (bad := {s: self._bad[s] for s in samples.tolist() if s in self._bad}):
            raise BadSamples(self.manifest.where, bad)

    def fetch(self, window: Window, pool: Executor) -> None:
        """Fetches the shards of a window in other threads if they are in a store."""
        store = self.manifest.store
        for shard in window.shards if store is not None else ():
            entry = self.manifest.shards[shard]
            if shard not in self._coming and store is not None and not store.cache.has(entry.xxh3_128, entry.bytes):
                self._coming.add(shard)
                pool.submit(self._fetch, shard)

    def _fetch(self, shard: int) -> None:
        try:
            os.close(self.manifest.open(shard))
        except (
            OSError,
            DataError,
            StoreError,
        ) as error:  # the reader that needs the shard meets the error again and raises it
            log.info("%s: not fetched ahead: %s", self.manifest.at(self.manifest.shards[shard].file), error)
        finally:
            self._coming.discard(shard)

    def forget(self, stream: str, needed: Sequence[tuple[int, ...]]) -> None:
        """Drops the windows of a stream except those of these shards. The memory of the last one is reused."""
        held = self._windows.get(stream, {})
        for shards in [shards for shards in held if shards not in needed]:
            self._spare = held.pop(shards).buffer

    def close(self) -> None:
        self._windows.clear()
        self._spare = None
        for shard in list(self._files):
            self._close(shard)

    def _buffer(self, size: int) -> Tensor:
        """Memory for a window: that of the window dropped last if possible, since used memory costs no page faults."""
        spare, self._spare = self._spare, None
        if spare is not None and size <= spare.numel():
            return spare
        self._largest = max(self._largest, size)
        # numpy asks for huge pages and torch does not; random gathering then takes two thirds of the time. But numpy's memory begins
        # 16 bytes into a page, and some kernels copy to such an address at half speed.
        memory = np.empty(self._largest + mmap.PAGESIZE, np.uint8)
        return torch.from_numpy(memory[-memory.ctypes.data % mmap.PAGESIZE :][: self._largest])

    def _read_whole(self, shards: tuple[int, ...]) -> _HeldWindow:
        """The shards of a window, one after the other in one buffer."""
        sizes = [self.manifest.shards[shard].bytes for shard in shards]
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        buffer = self._buffer(sum(sizes))
        view = buffer.numpy().data
        for shard, start, size in zip(shards, starts.tolist(), sizes, strict=True):
            part = view[start : start + size]
            got, damage = self._read_shard(shard, part)
            if damage:
                got, damage = self._read_shard(shard, part)
            if damage:
                self._found(shard, damage, functools.partial(_piece, part[:got]))
        return _HeldWindow(buffer, starts, self.manifest.first_samples[list(shards)])

    def _read_shard(self, shard: int, into: memoryview) -> tuple[int, str]:
        """Reads a shard; returns its number of bytes, and what is wrong with them, if anything."""
        digest, got, size = xxhash.xxh3_128(), 0, len(into)
        self._close(shard)  # opened by name each time, so that a restored shard is found
        try:
            file = self.manifest.open(shard)
            try:
                while got < size and (count := os.readv(file, [into[got : got + _PIECE]])):
                    digest.update(into[got : got + count])  # the descriptor stays valid while the file is cached
                    got += count
                longer = bool(os.read(file, 1))
            finally:
                os.close(file)
        except OSError as error:
            return 0, f"cannot be read ({error.strerror or error})"
        if got < size or longer:
            damage = f"got {'more than ' if longer else ''}{got} bytes, expected {size}"
        else:
            damage = "" if digest.hexdigest() == self.manifest.shards[shard].xxh3_128 else "does not have its hash"
        if damage:
            self.manifest.discard(shard)
        return got, damage

    def _found(
        self, shard: int, damage: str, data: Callable[[int, int], Buffer], known: Mapping[int, str] | None = None
    ) -> None:
        """Compares every sample of a damaged shard with the index and reports the bad ones.

        Args:
            data: `data(start, count)` returns bytes of the shard, fewer where it is cut.
            known: samples that count as bad whatever this reading says.
        """
        index, first = self.manifest.index, self.manifest.first_samples
        reasons = dict(known or {})
        for sample in range(int(first[shard]), int(first[shard + 1])):
            size = int(index.size[sample])
            part = data(int(index.start[sample]), size)
            if len(part) != size:
                reasons[sample] = f"has {len(part)} of its {size} bytes"
            elif xxhash.xxh3_64_intdigest(part) != int(index.hash[sample]):
                reasons[sample] = "does not have the hash of the index"
        self._bad.update(reasons)
        self._report(shard, reasons, damage)

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        while len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = self.manifest.open(shard)
        return self._files[shard]

    def _close(self, shard: int) -> None:
        if (file := self._files.pop(shard, None)) is not None:
            with contextlib.suppress(OSError):  # the system may have closed it already, which is why it is reopened
                os.close(file)

    def _read_ranges(self, samples: np.ndarray) -> Chunk:
        """The bytes of single samples, one after the other."""
        index = self.manifest.index
        shards = self.manifest.first_samples.searchsorted(samples, side="right") - 1  # (n,)
        sizes = index.size[samples]
        ends = np.cumsum(sizes)
        buffer = torch.empty(int(ends[-1]), dtype=torch.uint8)
        view = buffer.numpy().data
        offsets = index.start[samples]
        for place in np.lexsort((offsets, shards)).tolist():  # in disk order
            sample, shard, size = int(samples[place]), int(shards[place]), int(sizes[place])
            if sample in self._bad:  # already found bad with another sample of the shard
                continue
            part = view[int(ends[place]) - size : int(ends[place])]
            if not (damage := self._read_range(sample, shard, int(offsets[place]), part)):
                continue
            self._close(shard)
            self.manifest.discard(shard)
            if self._read_range(sample, shard, int(offsets[place]), part):
                self._found(shard, damage, functools.partial(self._bytes, shard), {sample: damage})
        self._refuse(samples)
        return Chunk(buffer, ends - sizes - offsets)

    def _read_range(self, sample: int, shard: int, offset: int, into: memoryview) -> str:
        """Reads one sample; what is wrong with it, if anything."""
        try:
            got = os.preadv(self._file(shard), [into], offset)
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"
        if got != len(into):
            return "is cut"
        index = self.manifest.index
        return "" if xxhash.xxh3_64_intdigest(into) == int(index.hash[sample]) else "is damaged"

    def _bytes(self, shard: int, start: int, count: int) -> bytes:
        try:
            return os.pread(self._file(shard), count, start)
        except OSError:
            return b""  # counts as cut; the shard's own error says that it cannot be read


def _piece(data: memoryview, start: int, count: int) -> memoryview:
    return data[start : start + count]
