"""Checkpoints in an object store, through fsspec: S3, GCS, Azure, or any other store with a driver.

Such stores have no rename, and put an object whole or not at all. So parts go to `step_00000100/<start>-<attempt>-<n>/`, where
start counts the starts of the run, and the manifest, written last and once, is the commit. No object is ever written twice: a
late write of an earlier attempt cannot replace that of a later one, since of several commits of a step that of the last start
counts.

Every request is retried with growing pauses before it counts as failed. To read a file, it is copied to a temporary folder of
this process (TMPDIR) and hashed on the way. The copies of one checkpoint are kept, those of the previous one are removed.
"""

from __future__ import annotations

import json
import logging
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

import xxhash

from nexus_scale.contracts import UserError
from nexus_scale.engine.checkpoint.manifest import MANIFEST, STEP_FOLDER, folder_name
from nexus_scale.engine.checkpoint.places import ATTEMPT, Claim, Commit, claim_from, fenced
from nexus_scale.engine.tensor_file import CHUNK_BYTES
from nexus_scale.io.durable import atomic_write

logger = logging.getLogger(__name__)

CORRUPT = "CORRUPT"
TRIES = 5
FIRST_PAUSE_S = 0.2

T = TypeVar("T")


SCHEMES = ("s3", "gs", "az", "abfs", "file", "memory")
"""Allowed URL schemes; fsspec has others that run commands, nest, or overwrite in place."""


def allowed_url(url: str) -> str:
    """The URL, if it may hold checkpoints.

    Raises:
        UserError: another scheme than SCHEMES, or credentials in it: the recipe that names it is copied far.
    """
    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or "://" not in url:
        raise UserError(
            f"callbacks.checkpoint.to: {url}: got scheme {parts.scheme!r}, expected one of {', '.join(SCHEMES)}"
        )
    if parts.username or parts.password or parts.query:
        raise UserError(
            f"callbacks.checkpoint.to: {parts.scheme}://{parts.hostname}: got credentials or a query in a URL; give them through the "
            "environment of the nodes"
        )
    return url


def _open_filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    allowed_url(url)

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"callbacks.checkpoint.to: {url}: {error}; install the driver that fsspec names (s3fs for s3://) on all nodes"
        ) from None
    return filesystem, str(path).rstrip("/")


class ObjectStore:
    """See `places.Place`.

    Args:
        url: of a prefix of the run's own, `s3://bucket/runs/name`. Credentials are the driver's affair: the environment's, or a file's.
        filesystem: instead of the URL's own, for tests.
    """

    remote = True

    def __init__(self, url: str, filesystem: Any = None):
        own, self.prefix = _open_filesystem(url)
        self.url, self.fs = url, filesystem or own
        self._kept: tempfile.TemporaryDirectory[str] | None = None
        self._kept_of: Commit | None = None

    def __str__(self) -> str:
        return self.url

    # ------------------------------------------------------------------------------------------ requests

    def tried(self, what: str, request: Callable[[], T]) -> T:
        """The result of a request, after at most TRIES tries.

        Raises:
            FileNotFoundError: there is no such object; not tried again.
            OSError: no try went well.
        """
        for count in range(1, TRIES + 1):
            try:
                return request()
            except FileNotFoundError:
                raise
            except Exception as error:  # drivers have their own errors for lost connections and refusals
                if count == TRIES:
                    raise OSError(
                        f"{self.url}: {what} failed {TRIES} times: {type(error).__name__}: {error}"
                    ) from error
                pause = FIRST_PAUSE_S * 2 ** (count - 1) * random.uniform(0.75, 1.25)
                logger.warning("%s: %s: %s: %s; retrying in %.1f s", self.url, what, type(error).__name__, error, pause)
                time.sleep(pause)
        raise AssertionError("unreachable")

    def put(self, name: str, data: bytes) -> None:
        if self._has_folders:
            atomic_write(Path(self.prefix) / name, data)
        else:
            self.tried(f"put {name}", lambda: self.fs.pipe_file(f"{self.prefix}/{name}", data))

    def get(self, name: str) -> bytes:
        data: bytes = self.tried(f"get {name}", lambda: self.fs.cat_file(f"{self.prefix}/{name}"))
        return data

    def upload(self, name: str, header: bytes, data: memoryview, halfway: Callable[[], None]) -> tuple[int, str]:
        """Writes an object in one stream; its bytes and XXH3-128, which is computed on the way."""
        size = len(header) + len(data)

        def stream() -> str:
            digest = xxhash.xxh3_128(header)
            struck = False
            with self.fs.open(f"{self.prefix}/{name}", "wb", block_size=CHUNK_BYTES) as file:
                file.write(header)
                for start in range(0, len(data), CHUNK_BYTES):
                    if not struck and start >= len(data) // 2:
                        struck = True
                        halfway()
                    chunk = data[start : start + CHUNK_BYTES]
                    digest.update(chunk)
                    file.write(chunk)
            self._forget()
            there = self.fs.info(f"{self.prefix}/{name}")["size"]
            if there != size:
                raise OSError(f"{there} of {size} bytes arrived")
            return digest.hexdigest()

        if self._has_folders:
            (Path(self.prefix) / name).parent.mkdir(parents=True, exist_ok=True)
        return size, self.tried(f"upload of {name}", stream)

    def remove(self, names: list[str]) -> None:
        if names:
            self.tried(f"removal of {len(names)} objects", lambda: self._remove(names))

    def _remove(self, names: list[str]) -> None:
        for name in names:
            try:
                self.fs.rm_file(f"{self.prefix}/{name}")
            except FileNotFoundError:
                continue  # removed by an earlier try

    def listing(self) -> dict[str, int]:
        """Bytes of every object below the prefix, by its name there."""

        def request() -> dict[str, int]:
            self._forget()
            try:
                found = self.fs.find(self.prefix, detail=True)
            except FileNotFoundError:
                return {}
            cut = len(self.prefix) + 1
            return {name[cut:]: int(entry["size"]) for name, entry in found.items()}

        return self.tried("listing", request)

    def _forget(self) -> None:
        """Drops the driver's cached listings, since others write here too."""
        self.fs.invalidate_cache()

    @property
    def _has_folders(self) -> bool:
        """Whether this is a file system (`file:`), which needs folders, and a rename to make a put atomic."""
        return "file" in self.fs.protocol

    # ------------------------------------------------------------------------------------------ who may write

    def _holder(self) -> Claim | None:
        try:
            return claim_from(self.get(ATTEMPT), f"{self.url}/{ATTEMPT}")
        except FileNotFoundError:
            return None

    def claim(self, attempt: str) -> None:
        before = self._holder()
        # If the file is damaged, the names of checkpoints still give the number of starts.
        numbers = [int(commit.name.partition("/")[2].partition("-")[0]) for commit in self.commits()]
        number = 1 + max([before.number if before else 0, *numbers])
        self.put(ATTEMPT, json.dumps(Claim(attempt, number)._asdict()).encode())
        self.sweep(None)

    def check(self, attempt: str) -> Claim | None:
        holder = self._holder()
        if holder is not None and holder.attempt != attempt:
            raise fenced(self, attempt, holder)
        return holder

    # ------------------------------------------------------------------------------------------ writing

    def draft(self, step: int, attempt: str, number: int) -> ObjectDraft:
        holder = self.check(attempt)
        if holder is None:
            raise UserError(
                f"{self.url}/{ATTEMPT}: is damaged or missing; it says which attempt may write checkpoints. Start the run again",
                code=5,
            )
        return ObjectDraft(self, step, f"{folder_name(step)}/{holder.number:05d}-{attempt}-{number}")

    def withdraw(self, commit: Commit) -> None:
        self.remove([f"{commit.name}/{MANIFEST}"])

    def sweep(self, attempt: str | None) -> None:
        names = self.listing()
        whole = {str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name in (MANIFEST, CORRUPT)}
        self.remove(
            [
                name
                for name in names
                if STEP_FOLDER.fullmatch(name.partition("/")[0])
                and str(PurePosixPath(name).parent) not in whole
                and (attempt is None or f"-{attempt}-" not in name)
            ]
        )

    def room(self) -> None:
        return None

    # ------------------------------------------------------------------------------------------ reading

    def commits(self) -> list[Commit]:
        names = self.listing()
        found = []
        for name in names:
            path = PurePosixPath(name)
            match = STEP_FOLDER.fullmatch(path.parts[0])
            if match and len(path.parts) == 3 and path.name == MANIFEST and f"{path.parent}/{CORRUPT}" not in names:
                found.append(Commit(int(match[1]), str(path.parent)))
        return sorted(found)

    def where(self, commit: Commit) -> str:
        return f"{self.url.rstrip('/')}/{commit.name}"

    def manifest(self, commit: Commit) -> bytes:
        return self.get(f"{commit.name}/{MANIFEST}")

    def sizes(self, commit: Commit) -> dict[str, int]:
        cut = len(commit.name) + 1
        return {
            name[cut:]: size
            for name, size in self.listing().items()
            if name.startswith(f"{commit.name}/") and name[cut:] != MANIFEST
        }

    def verify(self, commit: Commit, file: str, expected: str) -> None:
        self.path_of(commit, file, expected)

    def path_of(self, commit: Commit, file: str, expected: str) -> Path:
        """A copy of the file, hashed on its way here."""
        if self._kept is None or self._kept_of != commit:
            if self._kept is not None:
                self._kept.cleanup()
            self._kept, self._kept_of = tempfile.TemporaryDirectory(prefix="nexus-checkpoint-"), commit
        path = Path(self._kept.name) / file
        if not path.exists():
            self._fetch(f"{commit.name}/{file}", path, expected)
        return path

    def _fetch(self, name: str, path: Path, expected: str) -> None:
        """Raises ValueError if the hash is wrong twice."""

        def request() -> str:
            digest = xxhash.xxh3_128()
            stored = self.fs.open(f"{self.prefix}/{name}", "rb", block_size=CHUNK_BYTES, cache_type="readahead")
            with stored, open(partial, "wb") as copy:
                while chunk := stored.read(CHUNK_BYTES):
                    digest.update(chunk)
                    copy.write(chunk)
            return digest.hexdigest()

        partial = path.with_name(f".{path.name}.partial")
        for _ in range(2):  # a truncated read is not a damaged object
            digest = self.tried(f"download of {name}", request)
            if digest == expected:
                partial.rename(path)
                return
        raise ValueError(f"{path.name} has XXH3-128 {digest}, the manifest says {expected}")

    def set_aside(self, commit: Commit) -> str:
        self.put(f"{commit.name}/{CORRUPT}", b"does not verify; kept to be looked at\n")
        return f"{commit.name} with {CORRUPT} beside it"

    def damaged(self) -> bool:
        return any(PurePosixPath(name).name == CORRUPT for name in self.listing())


class ObjectDraft:
    """See `places.Draft`."""

    def __init__(self, place: ObjectStore, step: int, name: str):
        self.place, self.step, self.name = place, step, name
        self.notes = f"{name}.notes"  # outside it: a checkpoint contains only what its manifest names

    def __str__(self) -> str:
        return f"{self.place}/{self.name}"

    def write(self, file: str, header: bytes, data: memoryview, halfway: Callable[[], None]) -> tuple[int, str]:
        return self.place.upload(f"{self.name}/{file}", header, data, halfway)

    def drop(self, file: str) -> None:
        self.place.remove([f"{self.name}/{file}"])

    def say(self, rank: int, text: str) -> None:
        self.place.put(f"{self.notes}/rank{rank:05d}.json", text.encode())

    def said(self, rank: int) -> str | None:
        try:
            return self.place.get(f"{self.notes}/rank{rank:05d}.json").decode()
        except FileNotFoundError:
            return None

    def commit(self, manifest: str, before: Callable[[], None]) -> None:
        before()
        self.place.put(f"{self.name}/{MANIFEST}", manifest.encode())
        names = self.place.listing()
        for commit in self.place.commits():
            if commit.step == self.step and commit.name < self.name:  # a run that rolled back reached this step again
                self.place.withdraw(commit)
        self.place.remove([name for name in names if name.startswith(f"{self.notes}/")])

    def discard(self) -> None:
        self.place.remove(
            [name for name in self.place.listing() if name.startswith((f"{self.name}/", f"{self.notes}/"))]
        )
