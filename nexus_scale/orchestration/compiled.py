"""Where a worker keeps code that libraries compile while it runs: a folder of this run's and this user's alone.

The common default, ~/.cache/torch_extensions, is code that every later program of the user runs, whoever wrote it there.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from pathlib import Path

import xxhash

from nexus_scale.contracts import UserError

VARIABLE = "TORCH_EXTENSIONS_DIR"


def keep_compiled_code_apart(run: Path, environ: MutableMapping[str, str] = os.environ) -> Path:
    """Points torch's and DeepSpeed's compilers to a folder below the user's cache, on this machine's own disk, mode 0700.

    A folder that the user has named stays.

    Raises:
        UserError: the folder belongs to somebody else, or is a link.
    """
    if VARIABLE in environ:
        return Path(environ[VARIABLE])
    cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    # Runs of one name in two roots are two runs.
    folder = cache / "nexus_scale" / "compiled" / f"{run.name}-{xxhash.xxh3_64_hexdigest(str(run).encode())}"
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.mkdir(exist_ok=True, mode=0o700)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid():
        raise UserError(f"{folder}: compiled code would lie in a folder that is not this user's own; remove it", code=5)
    folder.chmod(0o700)
    environ[VARIABLE] = str(folder)
    return folder
