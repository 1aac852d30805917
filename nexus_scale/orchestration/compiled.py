"""Folders for code that libraries compile at run time, private to the user.

Every later program of the user would run what lies in the common defaults, ~/.cache/torch_extensions and /tmp/torchinductor_USER, whoever
wrote it there.
"""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import tempfile
from collections.abc import MutableMapping
from pathlib import Path

import torch
import xxhash

from nexus_scale.contracts import UserError

log = logging.getLogger(__name__)

VARIABLE = "TORCH_EXTENSIONS_DIR"
GRAPHS, KERNELS = "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"

FOLDER = ".compiled"
"""In the root of runs, so that a restart on another machine and the next run of the same network find their graphs."""


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


def keep_graphs(runs_root: Path, here: Path, environ: MutableMapping[str, str] = os.environ) -> Path:
    """Where torch's compiler and Triton keep what they compile: in the root of runs, which all machines share, or, where that cannot
    be, in `here` on this machine's disk, or else where torch puts it, which is logged. A folder that the user has set stays.

    Workers write to it at the same time: both libraries write files under other names first, and rename them. What is compiled for
    another version of torch or Python, or another processor, lies in a folder beside it.

    Args:
        runs_root: no folder of a run, since people pass those on, and what lies here is run.
        here: see `keep_compiled_code_apart`.
    """
    from torch._inductor.runtime.cache_dir_utils import (
        default_cache_dir,  # nearly a second: not for those that compile nothing
    )

    if (
        environ.get(GRAPHS, default_cache_dir()) != default_cache_dir()
    ):  # torch sets it to its default as it is imported
        environ.setdefault(KERNELS, str(Path(environ[GRAPHS]) / "triton"))
        return Path(environ[GRAPHS])
    suits = f"torch{torch.__version__}-python{platform.python_version()}-{torch.backends.cpu.get_cpu_capability()}"
    try:
        folder = _private(runs_root / FOLDER, f"user{os.getuid()}") / suits.replace(" ", "_")
        folder.mkdir(exist_ok=True)
        _try_out(folder)
    except OSError as error:
        folder = here / suits
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _try_out(folder)
        except OSError:
            folder = Path(default_cache_dir())
        if environ.get("RANK", "0") == "0":
            log.warning("compiled code cannot be kept in %s (%s): %s on each machine serves", runs_root, error, folder)
    environ[GRAPHS] = str(folder)
    environ.setdefault(KERNELS, str(folder / "triton"))
    return folder


def _private(parent: Path, name: str) -> Path:
    """A folder that nobody else can write to, below one that users share.

    Raises:
        OSError: it cannot be made, or belongs to another user, or is a link.
    """
    parent.mkdir(parents=True, exist_ok=True)
    folder = parent / name
    folder.mkdir(exist_ok=True, mode=0o700)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} does not belong to this user")
    if found.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def _try_out(folder: Path) -> None:
    """Makes and locks a file, as the compiler will. Raises OSError where the file system does not let it."""
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"x")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
