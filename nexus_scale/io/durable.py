"""Atomic, durable writes: a file is complete or absent, even if the process or the machine dies."""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

PARTIAL = ".partial"
"""Suffix of files that are not complete yet; their names begin with a dot."""


def fsync_folder(path: Path) -> None:
    """Makes the names in a folder durable: a rename is on disk only after this."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """This process's umask, for files that another process writes on its behalf.

    Read from /proc, since os.umask would change it while other threads create files.
    """
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return int(next(line.split()[1] for line in file if line.startswith("Umask:")), 8)


def atomic_write(path: Path, data: bytes | str, *, synced: bool = True) -> None:
    """Writes a file atomically: afterwards it has all of `data`, or what it had before. Creates the folder if needed.

    Args:
        synced: whether it must survive a power cut; otherwise it survives only the death of the process.
    """
    with replacing(path, synced=synced) as partial:
        partial.write_bytes(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacing(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """A path to write to, which replaces `path` at the end, or is removed if an error is raised.

    For libraries that write to a path; otherwise see `atomic_write`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}")
    try:
        yield partial
        if partial.stat().st_mode & 0o777 == 0o600:  # as safetensors writes them, whatever the umask
            partial.chmod(0o666 & ~umask())
        if synced:
            handle = os.open(partial, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        partial.replace(path)
    except Exception as error:
        number = re.search(r"os error (\d+)|code: (\d+)", str(error))  # how libraries written in Rust report it
        if isinstance(error, OSError) or number is None:
            raise
        code = int(number[1] or number[2])
        raise OSError(code, os.strerror(code), str(path)) from error
    finally:
        _remove(partial)
    if synced:
        fsync_folder(path.parent)


def _remove(partial: Path) -> None:
    try:
        partial.unlink(missing_ok=True)
    except OSError as error:  # the folder is no longer writable: the error being raised says so
        log.debug("%s: stays: %s", partial, error)


def trouble(error: OSError) -> tuple[str, int] | None:
    """Message and exit code of a file system error; None for other errors, such as those of a connection."""
    names = " and ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    if error.errno == errno.EFBIG:
        return (
            f"{names or 'a file'}: File too large: it exceeds this process's limit for one file; raise the limit (ulimit -f)",
            6,
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{names or 'a file'} could not be written: the disk is full; free some space", 6
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) or (names and error.strerror):
        return (
            f"{names or 'a file'}: {error.strerror}; the run folder and everything in it must be readable and writable for this user",
            5,
        )
    return None


def remove_partial_files(folder: Path) -> None:
    """Removes files that killed processes left half-written in or below a folder; those of living processes stay."""
    for path in folder.rglob(f".*{PARTIAL}"):
        writer = re.search(r"\.(\d+)-\d+\.partial$", path.name)
        if writer is None or not _lives(int(writer[1])):
            _remove(path)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def append_line(path: Path, line: str) -> None:
    """Appends a line in one write and syncs it, so that lines of several processes never mix. `line` has no line break.

    If a killed process or a full disk left half a line at the end, the new line begins on a line of its own.

    Raises:
        OSError: the line could not be written completely.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(handle).st_size
        half = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
        data = b"\n" * half + line.encode() + b"\n"
        if os.write(handle, data) < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(handle)
    finally:
        os.close(handle)
