"""Bytes from disk to memory, checked: whole shards of a window, or the byte ranges of single samples.

Which of the two is decided in `ShardReader.reads_whole`, nowhere else. Either way the bytes end up in one buffer in
which payloads begin at multiples of 512, so that all of a batch are gathered at once, and nothing leaves this file
unchecked: whole shards are hashed once when they are read, ranges sample by sample.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from nexus_scale.data.manifest import DataError, Manifest
from nexus_scale.data.order import Window

WHOLE_FROM = 0.25
"""Part of a window's bytes from which on reading all of it is cheaper than picking: a pick costs a system call and a
hash of its own, about 10 us against 2.5 us for 8 KiB in one stream."""
_OPEN_FILES = 32
_PIECE = 1 << 20


class Chunk(NamedTuple):
    """Bytes of some samples of one folder.

    Attributes:
        buffer: (bytes,) uint8; its length is a multiple of 512.
        base: for each sample, what to add to an offset of the index to find it in the buffer, (n,) int64.
    """

    buffer: Tensor
    base: np.ndarray


class ShardReader:
    """Reads the shards of one folder. Not shared between threads.

    Args:
        world_size: ranks that share a global batch, each needing that part of a window.
        memory_bytes: most that one window may take.
    """

    def __init__(self, manifest: Manifest, world_size: int, memory_bytes: int):
        self.manifest = manifest
        self._world_size, self._memory_bytes = world_size, memory_bytes
        self._windows: dict[str, dict[tuple[int, ...], tuple[Tensor, np.ndarray]]] = {}
        self._spare: Tensor | None = None
        self._largest = 0
        self._files: OrderedDict[int, int] = OrderedDict()

    def reads_whole(self, window: Window | None) -> bool:
        """Whether this rank reads all of a window's shards, rather than its own samples alone."""
        if window is None or window.share / self._world_size < WHOLE_FROM:
            return False
        return sum(self.manifest.shards[shard].bytes for shard in window.shards) <= self._memory_bytes

    def read(self, samples: np.ndarray, window: Window | None, stream: str = "") -> Chunk:
        """The bytes of samples (n,), which lie in `window` where one is given.

        A stream keeps the windows of its latest batch: `forget` drops the others.
        """
        shards = np.searchsorted(self.manifest.first_samples, samples, side="right") - 1  # (n,)
        if window is None or not self.reads_whole(window):
            return self._read_ranges(samples, shards)
        held = self._windows.setdefault(stream, {})
        if window.shards not in held:
            held[window.shards] = self._read_whole(window.shards)
        buffer, starts = held[window.shards]
        return Chunk(buffer, starts[np.searchsorted(np.asarray(window.shards), shards)])

    def forget(self, stream: str, needed: Sequence[tuple[int, ...]]) -> None:
        """Drops the stream's windows but those of these shards; the last one dropped is written over next."""
        held = self._windows.get(stream, {})
        for shards in [shards for shards in held if shards not in needed]:
            self._spare = held.pop(shards)[0]

    def close(self) -> None:
        self._windows.clear()
        self._spare = None
        while self._files:
            os.close(self._files.popitem()[1])

    def _path(self, shard: int) -> Path:
        return self.manifest.folder / self.manifest.shards[shard].file

    def _buffer(self, size: int) -> Tensor:
        """Memory for a window: that of the window dropped last, since memory used before costs no page faults."""
        spare, self._spare = self._spare, None
        if spare is not None and size <= spare.numel():
            return spare
        self._largest = max(self._largest, size)
        # numpy asks for huge pages, torch does not: gathering at random takes two thirds of the time.
        return torch.from_numpy(np.empty(self._largest, np.uint8))

    def _read_whole(self, shards: tuple[int, ...]) -> tuple[Tensor, np.ndarray]:
        """One buffer with the shards one after the other, and where each begins, (shards,)."""
        sizes = [self.manifest.shards[shard].bytes for shard in shards]
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        buffer = self._buffer(sum(sizes))
        view = buffer.numpy().data
        for shard, start, size in zip(shards, starts.tolist(), sizes, strict=True):
            part = view[start : start + size]
            path = self._path(shard)
            digest = xxhash.xxh3_128()
            try:
                with path.open("rb", buffering=0) as file:
                    got = 0
                    while got < size and (count := file.readinto(part[got : got + _PIECE])):
                        digest.update(part[got : got + count])  # while it is in the cache
                        got += count
                    longer = bool(file.read(1))
            except OSError as error:
                raise DataError(f"{path}: cannot read the shard ({error.strerror}); restore it") from error
            if got < size or longer:
                raise DataError(
                    f"{path}: got {'more than ' if longer else ''}{got} bytes, expected {size}; "
                    "the shard is cut or replaced: restore it"
                )
            if digest.hexdigest() != self.manifest.shards[shard].xxh3_128:
                raise DataError(
                    f"{path}: {self._first_bad(shard, part)}; the shard is damaged: restore it or make it again"
                )
        return buffer, starts

    def _first_bad(self, shard: int, data: memoryview) -> str:
        index, first = self.manifest.index, self.manifest.first_samples
        for sample in range(int(first[shard]), int(first[shard + 1])):
            start = int(index.start[sample])
            if xxhash.xxh3_64_intdigest(data[start : start + int(index.size[sample])]) != int(index.hash[sample]):
                return f"sample {index.key(sample)!r} (number {sample}) does not have the hash of the index"
        return "its hash is not the manifest's, though all samples have theirs: the bytes after them differ"

    def _file(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        while len(self._files) >= _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        self._files[shard] = os.open(self._path(shard), os.O_RDONLY)
        return self._files[shard]

    def _read_ranges(self, samples: np.ndarray, shards: np.ndarray) -> Chunk:
        """The samples alone, one after the other."""
        index = self.manifest.index
        sizes = index.size[samples]
        ends = np.cumsum(sizes)
        buffer = torch.empty(int(ends[-1]), dtype=torch.uint8)
        view = buffer.numpy().data
        offsets = index.start[samples]
        for place in np.lexsort((offsets, shards)).tolist():  # in the order of the disk
            sample, shard, size = int(samples[place]), int(shards[place]), int(sizes[place])
            part = view[int(ends[place]) - size : int(ends[place])]
            name = f"{self._path(shard)}: sample {index.key(sample)!r} (number {sample})"
            try:
                got = os.preadv(self._file(shard), [part], int(offsets[place]))
            except OSError as error:
                raise DataError(f"{name} cannot be read ({error.strerror}); restore the shard") from error
            if got != size:
                raise DataError(f"{name}: got {got} of {size} bytes; the shard is cut: restore it")
            if xxhash.xxh3_64_intdigest(part) != int(index.hash[sample]):
                raise DataError(
                    f"{name} does not have the hash of the index; the shard is damaged: restore it or make it again"
                )
        return Chunk(buffer, ends - sizes - offsets)
