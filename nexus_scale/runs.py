"""Run folders: made, locked, compared with a recipe, read back."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.recipe import (
    Cluster,
    Recipe,
    cluster_from,
    differences,
    dump,
    identity,
    read_yaml,
    recipe_from,
    write_yaml,
)

log = logging.getLogger(__name__)


def open_run(path: Path) -> tuple[RunFolder, Recipe, Cluster]:
    """A run folder with the recipe and the cluster that it was started with.

    Raises:
        UserError: no run folder there.
    """
    run = RunFolder(path.resolve())
    if not run.recipe.is_file():
        raise UserError(f"{path}: not a run folder (it holds no recipe.yaml); expected runs/<name>", code=5)
    recipe = recipe_from(read_yaml(run.recipe), str(run.recipe))
    cluster = cluster_from(read_yaml(run.cluster), str(run.cluster))
    return run, recipe, cluster


def prepare_run(run: RunFolder, recipe: Recipe, cluster: Cluster) -> None:
    """Makes the run folder, or checks that the one there was started with the same recipe.

    Raises:
        UserError: the folder holds a run of another recipe; shows the difference.
    """
    if run.recipe.is_file():
        _, before, _ = open_run(run.path)
        changed = differences(identity(before), identity(recipe))
        if changed:
            raise UserError(
                f"{run.path}: holds a run of another recipe; give this one another name (run=NAME) or move that folder away. "
                "The difference:\n  " + "\n  ".join(changed),
                code=5,
            )
        if before.steps != recipe.steps:
            log.info("%s: the run now ends at step %d, before at %d", run.path, recipe.steps, before.steps)
    run.path.mkdir(parents=True, exist_ok=True)
    write_yaml(run.recipe, dump(recipe))
    write_yaml(run.cluster, dump(cluster))


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Holds the run folder against every other driver; the lock goes with the process, however it ends.

    Raises:
        UserError: another process holds it; names its host, process and start.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    path = run.path / "lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{run.path}: another run holds this folder ({file.read().strip() or 'unknown'}); wait for it or choose run=NAME",
                code=5,
            ) from None
        file.truncate(0)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        file.write(json.dumps(owner))
        file.flush()
        yield


def check_disk(run: RunFolder, needed_bytes: int) -> None:
    """Room for two checkpoints beside what there is.

    Raises:
        UserError: the disk is too full.
    """
    folder = next(p for p in (run.path, *run.path.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"{folder}: {free / 2**30:.2f} GiB free, the run's checkpoints need {needed_bytes / 2**30:.2f} GiB; "
            "free some or choose cluster.paths.runs",
            code=6,
        )


def newest_step(run: RunFolder) -> int:
    """The step of the newest committed checkpoint, 0 where there is none. Looks at names alone; verification is the loader's."""
    steps = [
        int(p.name.removeprefix("step_"))
        for p in run.checkpoints.glob("step_*")
        if p.name.removeprefix("step_").isdigit()
    ]
    return max(steps, default=0)


def resolve_run(text: str, runs_root: Path) -> Path:
    """`runs/<name>` or `<name>` as a path; names may not leave the root."""
    given = Path(text)
    return given if given.is_dir() else runs_root / given.name
