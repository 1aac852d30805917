"""A folder for code that libraries compile at run time, private to the run and the user.

Every later program of the user would run what lies in the common default, ~/.cache/torch_extensions, whoever wrote it there.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

import xxhash

from nexus_scale.contracts import UserError

VARIABLE = "TORCH_EXTENSIONS_DIR"


def keep_compiled_code_apart(run: Path, environ: MutableMapping[str, str] = os.environ) -> Path:
    """The folder, mode 0700, below the user's cache on this machine's own disk; torch's and DeepSpeed's compilers are pointed to it.

    A folder that the user has set stays.

    Raises:
        UserError: the folder belongs to another user, or is a link.
    """
    if VARIABLE in environ:
        return Path(environ[VARIABLE])
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # Two roots may have runs of the same name.
    folder = cache / "nexus_scale" / "compiled" / f"{run.name}-{xxhash.xxh3_64_hexdigest(str(run).encode())}"
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid():
        raise UserError(f"{folder}: this folder for compiled code does not belong to this user; remove it", code=5)
    folder.chmod(0o700)
    environ[VARIABLE] = str(folder)
    return folder
