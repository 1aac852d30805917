"""Data folders in object stores, read through fsspec; each request has a deadline and a few tries.

Nothing from a store is trusted: shards are hashed while they arrive, and only then get a name in the cache (`cache.py`). A slow or failing
store costs data wait; one that stays away is a StoreError, after which a supervised run restarts. A store whose bytes differ from the
manifest has bad data (`bad.py`).
"""

from __future__ import annotations

import errno
import functools
import io
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import xxhash

from nexus_scale.data.cache import ShardCache
from nexus_scale.data.errors import DataError, StoreError

log = logging.getLogger(__name__)

SCHEMES = ("s3", "gs", "https", "file", "memory")
"""Allowed schemes of a data folder's URL, besides `http` on this machine. fsspec also has schemes that run commands or nest."""
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "https": "aiohttp", "http": "aiohttp"}
TRIES = 4
DEADLINE_S = 60.0
PIECE_BYTES = 8 << 20
LATE_S = 10.0
_NOTE_EVERY_S = 60.0


def is_url(folder: str | Path) -> bool:
    return isinstance(folder, str) and re.match(r"[A-Za-z][A-Za-z0-9+.:-]*://|pipe:", folder) is not None


def placed(root: Path, folder: str) -> str | Path:
    """The place of a data folder that a recipe names: a URL unchanged, a path below the data root."""
    return folder if is_url(folder) else root / folder


class Store:
    """One folder in an object store.

    Args:
        url: `s3://bucket/folder`. Credentials and endpoints come from the environment, as for any client of the store.
        tries: number of attempts at a request before the store counts as away.
        deadline_s: for one request of at most PIECE_BYTES.
        backoff_s: pause before the second try; it doubles, with jitter.

    Attributes:
        note: gets `slow_store` when requests fail or are late, at most once a minute.
        hurry: set while a reader closes; failed requests are then not repeated.

    Raises:
        DataError: a scheme that is not allowed, credentials in the URL, or a missing package.
    """

    def __init__(
        self,
        url: str,
        cache: ShardCache,
        *,
        tries: int = TRIES,
        deadline_s: float = DEADLINE_S,
        backoff_s: float = 0.5,
    ):
        parts = urlsplit(url)
        here = parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")
        if "://" not in url or not (parts.scheme in SCHEMES or here):
            raise DataError(f"{url}: got scheme {parts.scheme!r}, expected one of {', '.join(SCHEMES)}")
        if parts.username or parts.password or parts.query:
            raise DataError(
                f"{parts.scheme}://{parts.hostname}: got credentials or a query in a URL; give them by the environment"
            )
        self.url, self.cache = url.rstrip("/"), cache
        self.note: Callable[..., object] | None = None
        self._tries, self._deadline_s, self._backoff_s = tries, deadline_s, backoff_s
        self.hurry = threading.Event()
        self._noted = -_NOTE_EVERY_S
        import fsspec

        try:
            self._fs: Any = fsspec.filesystem(parts.scheme)
        except ImportError as error:
            raise DataError(f"{url}: needs the package {PACKAGES.get(parts.scheme, parts.scheme)} ({error})") from error

    def at(self, file: str) -> str:
        return f"{self.url}/{file}"

    def read(self, file: str) -> bytes:
        """A whole file. Raises FileNotFoundError, StoreError."""
        into = io.BytesIO()
        self._download(file, self.size(file), into)
        return into.getvalue()

    def size(self, file: str) -> int:
        """Bytes of a file. Raises FileNotFoundError, StoreError."""

        def ask() -> int:
            try:
                return int(self._call("info", self.at(file))["size"])
            except FileNotFoundError:
                # fsspec's http raises this for every error: reading a byte tells which.
                self._call("cat_file", self.at(file), start=0, end=1)
                raise ConnectionError("size not given") from None

        return int(self._tried(file, ask))

    def sizes(self, files: Sequence[str]) -> list[int | None]:
        """Bytes of each file, None for those that are missing."""
        if not self.url.startswith("http"):  # other schemes list a folder in one request
            listed = self._tried("", lambda: self._call("ls", self.url, detail=True))
            known = {entry["name"].rsplit("/", 1)[-1]: int(entry["size"] or 0) for entry in listed}
            return [known.get(file) for file in files]

        def one(file: str) -> int | None:
            try:
                return self.size(file)
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(one, files))

    def open(self, file: str, size: int, digest: str) -> int:
        """A file descriptor of a file with this size and XXH3-128, fetched unless it is cached.

        Raises:
            OSError: the file is missing, or differs from the manifest each time.
            StoreError: the store cannot be reached.
        """

        def fetch(into: IO[bytes]) -> None:
            for left in reversed(range(self._tries)):
                into.seek(0)
                into.truncate()
                got = self._download(file, size, into)
                if got == digest:
                    return
                self._tell(f"{self.at(file)}: got hash {got}, expected {digest}" + ("; fetched again" if left else ""))
            raise OSError(errno.EIO, f"the store has other bytes than the manifest says, {self._tries} times")

        return self.cache.open(digest, size, fetch)

    def _download(self, file: str, size: int, into: IO[bytes]) -> str:
        """Writes the file piece by piece and returns its XXH3-128."""
        hashed = xxhash.xxh3_128()
        for start in range(0, size, PIECE_BYTES):
            end = min(start + PIECE_BYTES, size)
            data = self._tried(file, functools.partial(self._piece, file, start, end, size))
            hashed.update(data)
            into.write(data)
        return hashed.hexdigest()

    def _piece(self, file: str, start: int, end: int, size: int) -> bytes:
        data: bytes = self._call("cat_file", self.at(file), start=start, end=end)
        if len(data) == size != end - start:  # a server without support for ranges
            data = data[start:end]
        if len(data) != end - start:
            raise _Short(errno.EIO, f"got {len(data)} bytes of {start} to {end}")
        return data

    def _call(self, method: str, *arguments: Any, **named: Any) -> Any:
        if getattr(self._fs, "async_impl", False):
            named["timeout"] = self._deadline_s
        return getattr(self._fs, method)(*arguments, **named)

    def _tried(self, file: str, ask: Callable[[], Any]) -> Any:
        """The answer to a request, which is tried up to `tries` times.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: the answer was too short, each time.
            StoreError: all tries failed.
        """
        for number in range(1, self._tries + 1):
            begun = time.monotonic()
            try:
                answer = ask()
            except (FileNotFoundError, IsADirectoryError, StoreError):
                raise
            except Exception as error:  # the kind of error depends on the store; any of them may be temporary
                what = f"{type(error).__name__}: {error}".rstrip(": ")
                text = f"{self.at(file)}: {what} (try {number} of {self._tries}, {time.monotonic() - begun:.1f} s)"
                self._tell(text)
                if number == self._tries:
                    if isinstance(error, _Short):
                        raise
                    raise StoreError(f"{text}; check the store, the network and the credentials") from error
            else:
                if (seconds := time.monotonic() - begun) > LATE_S:
                    self._tell(f"{self.at(file)}: answered after {seconds:.1f} s")
                return answer
            # With jitter, so that ranks do not retry in step.
            pause = self._backoff_s * 2 ** (number - 1) * random.uniform(0.5, 1.5)
            if self.hurry.wait(pause):
                raise StoreError(f"{self.at(file)}: given up, because the reader was closed")
        raise AssertionError("the last try returns or raises")

    def _tell(self, message: str) -> None:
        log.warning("%s", message)
        now = time.monotonic()
        if self.note is not None and now - self._noted >= _NOTE_EVERY_S:
            self._noted = now
            self.note("slow_store", message, store=self.url)


class _Short(OSError):
    """A complete answer with fewer or more bytes than requested."""


def open_store(url: str) -> Store:
    """The store of a URL, with this machine's cache: NEXUS_CACHE (default ~/.cache/nexus_scale/shards) of NEXUS_CACHE_BYTES."""
    folder = Path(os.environ.get("NEXUS_CACHE") or Path.home() / ".cache" / "nexus_scale" / "shards")
    limit = os.environ.get("NEXUS_CACHE_BYTES")
    if limit is not None and not limit.isdigit():
        raise DataError(f"NEXUS_CACHE_BYTES: got {limit!r}, expected a number of bytes")
    return Store(url, ShardCache(folder, int(limit) if limit else None))
