"""The folder that a job makes: below the data root, and written by one job at a time.

A second job for the same folder waits for the first, says for whom it waits, and then finds its work done. The lock is an `flock` on
`<output>/.job.lock`, which the kernel releases however its holder ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, TextIO

from nexus_scale.contracts import UserError
from nexus_scale.data.errors import storage_error

log = logging.getLogger(__name__)

LOCK = ".job.lock"
POLL_S = 0.2
SAID_S = 60.0
"""Seconds between two log lines that say for whom a job waits."""


def output_name(output: Any) -> str:
    """`output` as a plain path below the data root.

    Raises:
        UserError: not text, empty, absolute, or with `..`.
    """
    if not isinstance(output, str) or not output.strip() or "\0" in output:
        raise UserError(f"output {output!r}: expected the name of a folder below the data root, such as openmoji-32")
    path = PurePosixPath(output)
    if path.is_absolute() or ".." in path.parts or not path.parts or path.parts[0].startswith("~"):
        raise UserError(
            f"output {output!r}: expected the name of a folder below the data root, without a leading '/' and without '..'; "
            "--data-root or NEXUS_DATA_ROOT says where that root is"
        )
    return str(path)


def output_folder(output: Any, data_root: Path) -> Path:
    """The folder that a job makes.

    Raises:
        UserError: not a name below the data root, or a file or a dangling link is in the way.
    """
    folder = data_root / output_name(output)
    for place in (folder, *folder.parents):
        if place.is_symlink() and not place.exists():
            raise UserError(f"{place}: a link to {os.readlink(place)}, which does not exist; repair or remove it", 3)
        if place.exists():
            if not place.is_dir():
                raise UserError(f"{place}: a file, expected a folder; choose another output or move it away", 3)
            break
    return folder


def refuse_nested(folder: Path, *sources: Path) -> None:
    """Raises UserError where the output lies within the job's input: a rerun would read its own output."""
    for source in sources:
        inner, outer = folder.resolve(), source.resolve()
        if inner == outer or outer in inner.parents:
            raise UserError(f"{folder}: the output lies in the job's own input {source}; choose another output", 3)


class LockError(UserError):
    """The output folder cannot be made or locked."""


@contextmanager
def held(folder: Path, job: str) -> Iterator[None]:
    """Holds the lock of a folder; waits for whoever has it, and says for whom.

    Raises:
        LockError: the folder cannot be written to, or its file system has no locks.
    """
    fresh = [place for place in (folder, *folder.parents) if not place.exists()]
    file, path = _acquired(folder), folder / LOCK
    try:
        file.truncate(0)
        owner = {"job": job, "host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
        file.write(json.dumps(owner))
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        for place in fresh:  # a job that fails before it writes anything leaves no folder behind
            try:
                place.rmdir()
            except OSError:
                break


def _acquired(folder: Path) -> TextIO:
    """The lock file of a folder, locked by this process."""
    said = 0.0
    while True:
        file = _opened(folder)
        if file is None:
            time.sleep(POLL_S)
            continue
        if _locked(file, folder):
            if _is_at(file.fileno(), folder / LOCK):
                return file
            file.close()  # its last holder removed the file
            continue
        if time.monotonic() >= said:
            log.info("%s: %s, waiting for it", folder, _owner(file.read() if not file.seek(0) else ""))
            said = time.monotonic() + SAID_S
        file.close()
        time.sleep(POLL_S)


def _opened(folder: Path) -> TextIO | None:
    """The lock file of a folder, both made where they are missing; None where a failed job has just removed its empty folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / LOCK).open("a+", encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        told = storage_error(error, folder)
        raise LockError(str(told), told.code) from error


def _locked(file: TextIO, folder: Path) -> bool:
    """Locks a file; False where another process has it. Closes the file where its file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        file.close()
        raise LockError(
            f"{folder}: its file system has no locks ({error.strerror}), but jobs need them to keep out of each other's way; "
            "put the data root on a file system with locks, or mount this one with them (`flock` of Lustre, `local_lock` of NFS)",
            6,
        ) from error


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file still has that name."""
    try:
        there, own = path.stat(), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def _owner(text: str) -> str:
    try:
        owner = json.loads(text)
        return f"{owner['job']} (process {owner['pid']} on {owner['host']}, since {owner['since']}) is making it"
    except (ValueError, KeyError, TypeError):
        return "another job is making it"
