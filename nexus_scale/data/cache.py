"""A cache of object-store shards on the local disk: whole files, named by their hash, shared by all processes of a machine.

A file gets its name in one rename after its bytes are verified, so a killed process leaves a hidden part and never a wrong file. The
process that fetches a file holds a lock on its name; others wait and then find the file. Above the limit, the least recently used files
go first; a reader that has one open keeps it. Nothing is synced to disk, because readers hash what they read.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from nexus_scale.data.errors import DataError

_TRIES = 8
_STALE_S = 3600.0
"""Seconds without a write after which a partial file is taken for one of a killed process."""


class ShardCache:
    """A folder of files named by their XXH3-128.

    Args:
        limit_bytes: largest total size of the files; None is half of the space that is free when the first is added.
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None):
        self.folder, self._limit = folder, limit_bytes

    def has(self, digest: str, size: int) -> bool:
        try:
            return (self.folder / digest).stat().st_size == size
        except OSError:
            return False

    def open(self, digest: str, size: int, fetch: Callable[[IO[bytes]], None]) -> int:
        """A file descriptor of a file. `fetch` writes and verifies the file if it is not there.

        Raises:
            DataError: the file is larger than the cache may be.
            OSError: the disk is full or not writable, or whatever `fetch` raises.
        """
        path = self.folder / digest
        for _ in range(_TRIES):
            try:
                file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                added = self._add(digest, size, fetch)
                if added is not None:
                    return added
                continue
            if os.fstat(file).st_size == size:
                os.utime(file)
                return file
            os.close(file)
            self.discard(digest)
        raise DataError(f"{path}: gone {_TRIES} times before it was read; set NEXUS_CACHE_BYTES higher")

    def discard(self, digest: str) -> None:
        """Removes a file whose bytes are wrong."""
        (self.folder / digest).unlink(missing_ok=True)

    def _add(self, digest: str, size: int, fetch: Callable[[IO[bytes]], None]) -> int | None:
        """Fetches a file and opens it before another process can evict it. None: another process has just added it."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / digest
        with self._locked(digest[:2]):  # 256 lock files are enough, and need no clean-up
            if path.exists():
                return None
            for part in self.folder.glob(f".{digest}.*.partial"):  # left by a killed process, since we hold the lock
                part.unlink(missing_ok=True)
            self._make_room(size)
            part = self.folder / f".{digest}.{os.getpid()}-{threading.get_ident()}.partial"
            try:
                with part.open("wb") as file:
                    fetch(file)
                opened = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            self._make_room(0)  # leaves room for files fetched at the same time
            return opened

    def _make_room(self, size: int) -> None:
        with self._locked("room"):
            files = []
            for path in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another process has just finished it
                    status = path.stat()
                    files.append((status.st_mtime, status.st_size, path))
            held = sum(bytes_ for _, bytes_, _ in files)
            if self._limit is None:
                self._limit = (held + shutil.disk_usage(self.folder).free) // 2
            if size > self._limit:
                raise DataError(
                    f"{self.folder}: got a shard of {size} bytes for a cache of {self._limit}; set NEXUS_CACHE_BYTES higher, or "
                    "NEXUS_CACHE to a larger disk"
                )
            for used, bytes_, path in sorted(files):
                if held + size <= self._limit:
                    break
                if not path.name.startswith(".") or (path.suffix == ".partial" and used < time.time() - _STALE_S):
                    path.unlink(missing_ok=True)
                    held -= bytes_

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Holds a lock that ends with the process at the latest."""
        with open(self.folder / f".lock-{name}", "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
