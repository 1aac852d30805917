"""Writes that are there whole or not at all, whatever becomes of the process or the machine meanwhile."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def fsync_folder(path: Path) -> None:
    """Makes the names in a folder durable: a rename is on disk only after this."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes | str, *, synced: bool = True) -> None:
    """A file with all of `data`, or the file that was there before; its folder is made where it is missing.

    Args:
        synced: whether it must outlive a power cut; without, it is whole only against the death of a process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            if synced:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    if synced:
        fsync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Adds a line in one write and syncs it, so that lines of several processes never mix. `line` holds no line break."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        os.write(handle, line.encode() + b"\n")
        os.fsync(handle)
    finally:
        os.close(handle)
