"""The errors for data that are not what they should be."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from nexus_scale.contracts import UserError


class DataError(UserError):
    """The data differ from their manifest, or from what was asked for. Exit code 3."""

    def __init__(self, message: str, code: int = 3):
        super().__init__(message, code)


class StoreError(RuntimeError):
    """An object store cannot be reached or read, after all tries. It may come back, so a supervised run restarts. Not a UserError, which
    would end the run, and not an OSError, which would count as bad data."""


FULL = (errno.ENOSPC, errno.EDQUOT)


def storage_error(error: OSError, folder: str | Path) -> UserError:
    """The UserError for an error of the operating system in a job. Code 6, with the place, its free space and advice, if `folder`, the
    job's output, is full or not writable; code 3 if something else cannot be read."""
    folder = Path(folder).absolute()
    named = None if error.filename is None else Path(os.fsdecode(error.filename)).absolute()
    place = folder if named is None or folder in named.parents else named
    there = next(path for path in (place, *place.parents) if path.is_dir())
    what = error.strerror or str(error)
    if error.errno in FULL:
        free = shutil.disk_usage(there).free
        room = f"{free / 1e9:.3g} GB are free" + (
            "" if os.statvfs(there).f_favail else ", and no more files can be made"
        )
        return UserError(
            f"{place}: {what}; {room} at {there}. Free some space, or put the data root on a larger disk (--data-root, "
            "NEXUS_DATA_ROOT), and run the same command again",
            code=6,
        )
    if named is None or named == folder or folder in named.parents or named in folder.parents:
        free = shutil.disk_usage(there).free
        return UserError(
            f"{named or folder}: cannot be written ({what}); {free / 1e9:.3g} GB are free at {there}. Make it writable for this user, or "
            "choose another data root (--data-root, NEXUS_DATA_ROOT), and run the same command again",
            code=6,
        )
    return UserError(f"{named}: cannot be read ({what}); correct its place or its permissions", code=3)
