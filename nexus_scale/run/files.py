"""What a run was started with and what it chose, read from its folder even if files in it are damaged.

Every file is written atomically. One that is damaged all the same (by an older version, a failing disk, an editor) is named, and its
contents are taken from elsewhere: `started.json` repeats the recipe, the cluster and the roots, and every checkpoint holds the parts of
the recipe that make the curve, and the choices.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from nexus_scale.config.plain_yaml import read_yaml, write_yaml
from nexus_scale.config.recipe import Cluster, Recipe, cluster_from, dump, identity, identity_of, recipe_from
from nexus_scale.config.registry import nearest
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.engine.checkpoint import newest_state
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_json import DamagedFile, is_count, is_time, read_json, read_json_or, warn_once
from nexus_scale.io.stages import DOING

log = logging.getLogger(__name__)

T = TypeVar("T")

LOCK = "lock"
STARTED = "started.json"


class Started(BaseModel):
    """`started.json`: what the last start was given.

    `data_root_from_run` is the path from the run folder to the data: it survives moving the whole project."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    run: str
    data_root: str
    data_root_from_run: str
    recipe: dict[str, Any]
    cluster: dict[str, Any]


def write_started(run: RunFolder, recipe: Recipe, cluster: Cluster, data_root: Path) -> None:
    """Writes recipe.yaml, cluster.yaml and started.json, each atomically. A damaged file, which may be somebody's edit, is kept as
    `recipe.yaml.damaged`."""
    for path, read in ((run.recipe, recipe_from), (run.cluster, cluster_from)):
        if os.path.lexists(path):
            try:
                read(_read(path), str(path))
            except UserError:
                path.rename(path.with_name(f"{path.name}.damaged"))
    write_yaml(run.recipe, dump(recipe))
    write_yaml(run.cluster, dump(cluster))
    started = Started(
        run=str(run.path),
        data_root=str(data_root),
        data_root_from_run=os.path.relpath(data_root, run.path),
        recipe=dump(recipe),
        cluster=dump(cluster),
    )
    atomic_write(run.path / STARTED, json.dumps(started.model_dump(), indent=1))


def is_run(path: Path) -> bool:
    """Whether a folder belongs to a run, however young or damaged: it has checkpoints, or a file that every run begins with."""
    try:
        return path.is_dir() and any(
            os.path.lexists(path / name)
            for name in ("recipe.yaml", "cluster.yaml", STARTED, "checkpoints", LOCK, DOING)
        )
    except OSError:
        return False


def open_run(path: Path) -> tuple[RunFolder, Recipe, Cluster]:
    """A run folder with the recipe and cluster it was started with; `started.json` stands in for a damaged file.

    Raises:
        UserError: this is no run folder; or the recipe is damaged and stored nowhere else.
    """
    run = run_at(path)
    return run, recipe_of(run), cluster_of(run)


def run_at(path: Path) -> RunFolder:
    """A run's folder, however damaged. Raises UserError if it is not one."""
    run = RunFolder(path.resolve())
    if not is_run(run.path):
        parent = run.path.parent
        known = [other.name for other in sorted(parent.iterdir()) if is_run(other)] if parent.is_dir() else []
        raise UserError(
            f"{path}: not a run folder (it has no recipe.yaml); among the runs beside it: {nearest(path.name, known)}",
            code=5,
        )
    return run


def is_young(run: RunFolder) -> bool:
    """Whether the run holds its folder and has written nothing yet: the recipe is written once the data are ready and all checks passed."""
    names = (run.recipe, run.path / STARTED, run.checkpoints, run.metrics)
    return not any(os.path.lexists(path) for path in names)


def recipe_of(run: RunFolder) -> Recipe:
    """The run's recipe. Raises UserError if both it and `started.json` are damaged or missing."""
    try:
        return recipe_from(_read(run.recipe), str(run.recipe))
    except UserError as error:
        kept = _kept(run, lambda started: recipe_from(started.recipe, str(run.path / STARTED)))
        if kept is None:
            raise UserError(
                f"{_first(error)}\nNo other file of this run holds the recipe. Its checkpoints are unharmed: "
                f"nexus train RECIPE run={run.path.name} with the original recipe resumes from them.",
                code=5,
            ) from None
        warn_once(f"{_first(error)}; the recipe is taken from {STARTED}")
        return kept


def cluster_of(run: RunFolder) -> Cluster:
    """The run's cluster; the default one if it is damaged and stored nowhere else, since it changes no bit of the curve."""
    try:
        return cluster_from(_read(run.cluster), str(run.cluster))
    except UserError as error:
        kept = _kept(run, lambda started: cluster_from(started.cluster, str(run.path / STARTED)))
        warn_once(f"{_first(error)}; the cluster is taken from {STARTED if kept else 'the defaults'}")
        return kept or Cluster()


def _read(path: Path) -> dict[str, Any]:
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"{path}: is not a regular file")  # reading a pipe would block
    return read_yaml(path)


def _kept(run: RunFolder, read: Callable[[Started], T]) -> T | None:
    started = started_of(run)
    try:
        return None if started is None else read(started)
    except UserError as error:
        warn_once(_first(error))
        return None


def _first(error: UserError) -> str:
    """The first of several mistakes: a damaged file has many."""
    first, *more = str(error).splitlines()
    return f"{first} (and {len(more)} more)" if more else first


def started_of(run: RunFolder) -> Started | None:
    return read_json_or(run.path / STARTED, Started, None)


def data_root_of(run: RunFolder) -> Path | None:
    """Where the run's data were when it last started; if that folder is gone or the run was moved, the same path relative to the run
    folder. None for runs of older versions."""
    started = started_of(run)
    if started is None:
        return None
    absolute, moved = Path(started.data_root), Path(os.path.normpath(run.path / started.data_root_from_run))
    here = started.run == str(run.path)
    choices = (absolute, moved) if here else (moved, absolute)
    try:
        return next((folder for folder in choices if folder.is_dir()), absolute)
    except (OSError, ValueError):
        return absolute


def curve_before(run: RunFolder) -> dict[str, Any] | None:
    """`identity` of the recipe that the run has followed so far; None if no file says."""
    try:
        return identity(recipe_of(run))
    except UserError as error:
        state = newest_state(run.checkpoints)
        if state is None or not isinstance(state.get("recipe"), Mapping):
            warn_once(_first(error))
            return None
        warn_once(f"{run.recipe}: is damaged; what made the curve is taken from the newest checkpoint")
        return identity_of(state["recipe"], str(run.checkpoints))


def steps_before(run: RunFolder) -> int | None:
    """The step at which the run was to end; None if no file says."""
    try:
        return recipe_of(run).steps
    except UserError:
        return None


class _Environment(BaseModel):
    choices: dict[str, Any]


def frozen_choices(run: RunFolder) -> dict[str, Any] | None:
    """What the run's first start chose and later starts reuse: `precision`, `micro_batch`, `kernels`; `found`, where the micro-batch was
    found by trial: with how many `workers`, and whether blocks `recompute`. None before the first start.

    If the file is damaged or gone, the newest checkpoint supplies them.

    Raises:
        UserError: the file is damaged, and no checkpoint has the choices.
    """
    try:
        found = read_json(run.environment, _Environment)
        if found is not None:
            return _checked(found.choices, str(run.environment))
        words = f"{run.environment}: is gone"
    except DamagedFile as error:
        words = str(error)
    state = newest_state(run.checkpoints) if is_begun(run.checkpoints) else None
    if state is not None and isinstance(state.get("choices"), dict):
        warn_once(f"{words}; the choices are taken from the newest checkpoint")
        try:
            return _checked(state["choices"], str(run.checkpoints))
        except DamagedFile as error:
            words = str(error)
    if not os.path.lexists(run.environment):
        return None
    raise UserError(
        f"{words}. It records what the run's first start chose (precision, micro-batch, kernels), and no checkpoint of this run has them. "
        "Move it away to let the run choose again; the last bits may then differ",
        code=5,
    )


def was_deterministic(run: RunFolder) -> bool | None:
    """Whether the run's kernels had to repeat when it last started; None where its folder does not say."""
    before = read_json_or(run.environment, dict[str, Any], {}).get("deterministic")
    return before if isinstance(before, bool) else None


def precision_of(run: RunFolder) -> str | None:
    """What the run computes in, `float32` or `bf16`, as its first start chose; None before it."""
    choices = frozen_choices(run)
    return None if choices is None else str(choices["precision"])


def is_begun(checkpoints: Path) -> bool:
    """Whether the folder of a run's checkpoints holds anything."""
    return checkpoints.is_dir() and any(checkpoints.iterdir())


def _checked(choices: Mapping[str, Any], where: str) -> dict[str, Any]:
    precision, micro, kernels = (choices.get(key) for key in ("precision", "micro_batch", "kernels"))
    if precision not in ("float32", "bf16"):
        raise DamagedFile(f"{where}: is damaged: choices.precision: got {precision!r}; expected float32 or bf16")
    if micro is not None and not (is_count(micro) and micro):
        raise DamagedFile(f"{where}: is damaged: choices.micro_batch: got {micro!r}; expected a positive number")
    found = choices.get("found")
    if found is not None and not (
        isinstance(found, dict)
        and is_count(found.get("workers"))
        and found["workers"]
        and isinstance(found.get("recompute"), bool)
        and micro is not None
    ):
        raise DamagedFile(f"{where}: is damaged: choices.found: got {found!r}; expected workers and recompute")
    if not isinstance(kernels, dict) or not all(isinstance(kernel, str) for kernel in kernels.values()):
        raise DamagedFile(f"{where}: is damaged: choices.kernels: got {kernels!r}; expected names by name")
    return dict(choices)


def read_beats(run: Path) -> dict[int, Mapping[str, Any]]:
    """The newest heartbeat of each rank. A damaged one is ignored: the next comes within half a second, unless the process is gone."""
    beats: dict[int, Mapping[str, Any]] = {}
    for path in sorted((run / "heartbeats").glob("rank*.json")):
        beat: dict[str, Any] = read_json_or(path, dict[str, Any], {})
        rank = path.stem.removeprefix("rank")
        if rank.isdecimal() and is_count(beat.get("step")) and is_time(beat.get("at")):
            beats[int(rank)] = beat
    return beats
