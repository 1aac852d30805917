"""Run folders: create, lock, compare with a recipe; list, follow, stop, delete."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_scale.config.recipe import Cluster, Recipe, differences, identity, recipe_hash
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.engine.checkpoint import committed_steps
from nexus_scale.io import incidents, leaving, stages
from nexus_scale.io.durable import append_line, atomic_write, remove_partial_files
from nexus_scale.io.plain_json import is_count, is_number, parse_object, read_json, read_objects
from nexus_scale.run.files import (
    LOCK,
    curve_before,
    data_root_of,
    frozen_choices,
    is_begun,
    is_run,
    is_young,
    open_run,
    read_beats,
    run_at,
    steps_before,
    write_started,
)

log = logging.getLogger(__name__)

CHANGES = "changes.jsonl"
"""Changes of the recipe that the user allowed while the run was under way, one JSON line each."""


def check_run(run: RunFolder, recipe: Recipe, cluster: Cluster) -> None:
    """Checks that an existing run folder fits this recipe and cluster. A folder whose run never took a step fits any.

    Raises:
        UserError: it holds a run of another recipe, or one with other choices (`frozen_choices`), or one that is already past the
            requested last step; shows the difference.
    """
    if not begun(run):
        return
    before = curve_before(run)
    changed = [] if before is None else differences(before, identity(recipe))
    if changed:
        raise UserError(
            f"{run.path}: holds a run of another recipe; give this one another name (run=NAME), move that folder away, or name "
            "each key that may change (--allow-change KEY). The difference:\n  " + "\n  ".join(changed),
            code=5,
        )
    changed = other_choices(run, cluster)
    if changed:
        raise UserError(
            f"{run.path}: keeps the choices of its first start, and the cluster file now sets others; remove them, or name each key "
            "that may change (--allow-change KEY). The difference:\n  " + "\n  ".join(changed),
            code=5,
        )
    if recipe.steps < newest_step(run):
        raise UserError(
            f"{run.path}: steps={recipe.steps}: the run has already trained {newest_step(run)} steps; give at least as many, or "
            "another name (run=NAME)",
            code=5,
        )


def begun(run: RunFolder) -> bool:
    """Whether the run has anything to lose: a row of its curve, or a checkpoint."""
    return bool(newest_rows(run)) or is_begun(run.checkpoints)


def newest_rows(run: RunFolder) -> list[dict[str, Any]]:
    """The last hundred or so rows of the run's curve."""
    return [row for row in read_objects(run.metrics, tail_bytes=2**16) if is_count(row.get("step"))]


def prepare_run(run: RunFolder, recipe: Recipe, cluster: Cluster, data_root: Path | None = None) -> None:
    """Creates the run folder, or repairs the existing one. Raises as `check_run`.

    Args:
        data_root: where its data lie; `data` beside the runs unless given.
    """
    check_run(run, recipe, cluster)
    if not begun(run):
        run.environment.unlink(missing_ok=True)  # before the first step, choices may still change
    else:
        before = steps_before(run)
        if before is not None and before != recipe.steps:
            log.info("%s: the run now ends at step %d instead of %d", run.path, recipe.steps, before)
    if run.path.is_dir():
        remove_partial_files(run.path)
    write_started(run, recipe, cluster, data_root or run.path.parent.parent / "data")


def other_choices(run: RunFolder, cluster: Cluster) -> list[str]:
    """Cluster settings that differ from what the run's first start chose, as `cluster.key: old -> new`. `auto` never differs."""
    frozen = frozen_choices(run)
    if frozen is None:
        return []
    asked = _asked(cluster)
    kept = {key: frozen.get(key) for key in asked}
    kept["kernels"] = {name: frozen.get("kernels", {}).get(name) for name in asked["kernels"]}
    return differences(kept, asked, "cluster")


def _asked(cluster: Cluster) -> dict[str, Any]:
    asked: dict[str, Any] = {"kernels": {name: kernel for name, kernel in cluster.kernels.items() if kernel != "auto"}}
    if cluster.precision != "auto":
        asked["precision"] = cluster.precision
    if cluster.fixed_micro_batch is not None:
        asked["micro_batch"] = cluster.fixed_micro_batch
    return asked


def change_run(run: RunFolder, recipe: Recipe, cluster: Cluster, allowed: Sequence[str]) -> list[str]:
    """Lets a run continue with a recipe or cluster that differs from its own in the keys the user named, and records the change in its
    folder.

    Args:
        allowed: dotted keys of the recipe or of the cluster (`cluster.precision`); each includes all keys below it.
    Returns:
        what changed, `key: old -> new`.
    Raises:
        UserError: there is no run yet, or other keys differ too; shows them.
    """
    open_run(run.path)  # raises before a lock creates the folder
    with locked(run):
        _, before, _ = open_run(run.path)
        of_recipe, of_cluster = differences(identity(before), identity(recipe)), other_choices(run, cluster)
        changed = of_recipe + of_cluster
        other = [line for line in changed if not any(_below(line.partition(": ")[0], key) for key in allowed)]
        if other:
            raise UserError(
                f"{run.path}: --allow-change ({', '.join(allowed)}) does not cover every difference; these keys differ too:\n  "
                + "\n  ".join(other),
                code=5,
            )
        if changed:
            log.warning(
                "%s: continues with different settings from those it was started with:\n  %s",
                run.path,
                "\n  ".join(changed),
            )
            note = {"at": round(time.time(), 3), "step": newest_step(run), "changed": changed}
            if of_recipe:
                note |= {"before": recipe_hash(before), "recipe": identity(before)}
            append_line(run.path / CHANGES, json.dumps(note))
            write_started(run, recipe, cluster, data_root_of(run) or run.path.parent.parent / "data")
            if of_cluster:
                _choose_anew(run, cluster)
    return changed


def _choose_anew(run: RunFolder, cluster: Cluster) -> None:
    """Replaces the run's choices by the cluster's settings; those that it leaves open stay."""
    environment = read_json(run.environment, dict[str, Any]) or {}
    choices, asked = frozen_choices(run) or {}, _asked(cluster)
    if "micro_batch" in asked:
        choices.pop("found", None)
    environment["choices"] = {**choices, **asked, "kernels": {**choices.get("kernels", {}), **asked["kernels"]}}
    atomic_write(run.environment, json.dumps(environment, indent=1))


def _below(key: str, allowed: str) -> bool:
    return key == allowed or key.startswith(f"{allowed}.")


def accepted_recipes(run: RunFolder) -> list[Mapping[str, Any]]:
    """`identity` of the recipes before changes that the user allowed, as in older checkpoints."""
    return [row["recipe"] for row in read_objects(run.path / CHANGES) if isinstance(row.get("recipe"), dict)]


def accepted_hashes(run: RunFolder) -> set[str]:
    """Hashes of the recipes before changes that the user allowed."""
    return {row["before"] for row in read_objects(run.path / CHANGES) if isinstance(row.get("before"), str)}


class HeldError(UserError):
    """Another process holds the run's folder."""


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Holds the run folder against every other driver; the lock is released when the process ends, however it ends.

    Raises:
        HeldError: another process holds it; names its host, process and start.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    with (run.path / LOCK).open("a+", encoding="utf-8", errors="replace") as file:
        # `nexus runs` holds a folder for an instant to see whether anyone does.
        end = time.monotonic() + 1.0
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() < end:
                    time.sleep(0.1)
                    continue
                file.seek(0)
                raise HeldError(
                    f"{run.path}: another run holds this folder ({file.read(2**16).strip() or 'unknown'}); wait for it or choose run=NAME",
                    code=5,
                ) from None
        file.truncate(0)
        owner = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "at": time.time(),
        }
        file.write(json.dumps(owner))
        file.flush()
        yield


def check_folder(run: RunFolder) -> None:
    """Checks, before hours of work, that the run's folder can be written or created.

    Raises:
        UserError: its path is taken by something else, or this user may not write there.
    """
    for path in (run.path, *run.path.parents):
        if path.is_dir():
            if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                raise UserError(
                    f"{path}: you have no permission to write there; expected a folder for {run.path}", code=5
                )
            return
        if os.path.lexists(path):
            kind = f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "not a folder"
            raise UserError(
                f"{path}: is {kind}; expected a folder for {run.path}, or nothing: move it away, or choose another (run=NAME, "
                "cluster.paths.runs)",
                code=5,
            )


def room_needed(run: RunFolder, checkpoint_bytes: int) -> int:
    """Free bytes that a start of the run needs: room for three checkpoints (two kept, one being written) less those it has, and always for
    one."""
    own = sum(path.lstat().st_size for path in run.checkpoints.glob("step_*/*"))
    return max(checkpoint_bytes, 3 * checkpoint_bytes - own)


def check_disk(run: RunFolder, needed_bytes: int) -> None:
    """Checks that `needed_bytes` (see `room_needed`) are free.

    Raises:
        UserError: the disk is too full.
    """
    folder = next(p for p in (run.path, *run.path.parents) if p.exists())
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise UserError(
            f"{folder}: {free / 2**30:.2f} GiB free, but the run's checkpoints need {needed_bytes / 2**30:.2f} GiB; "
            "free some or choose cluster.paths.runs",
            code=6,
        )


def newest_step(run: RunFolder) -> int:
    """The step of the newest committed checkpoint; 0 without one. Looks at names alone: verifying is the loader's work.

    Raises:
        OSError: they lie in an object store that does not answer.
    """
    return max(committed_steps(run.checkpoints), default=0)


def resolve_run(text: str, runs_root: Path) -> Path:
    """The path of a run given as `runs/<name>` or `<name>`; a name cannot lead out of the root."""
    given = Path(text)
    return given if given.is_dir() else runs_root / given.name


# ------------------------------------------------------------------------------------------------- many runs

WORD_S = 5.0
"""Between two lines of `nexus runs follow` about a stage that is under way."""

FRESH_S = 60.0
"""A heartbeat older than this does not count as a sign of life: they come every second."""

STATES = {
    "new": "prepared, never started",
    "preparing": "its data are being made",
    "running": "held by a driver, with fresh heartbeats",
    "starting": "held by a driver, without heartbeats yet",
    "stalled": "held by a driver, no sign of life",
    "left": "stopped on request, and saved; the same command resumes it",
    "failed": "ended before its last step; the same command resumes it",
    "done": "trained to its last step",
}


@dataclass(frozen=True)
class Summary:
    """A run in one line. `age_s`: seconds since its last sign of life; `owner`: who holds it; `incident`: the latest; `doing`: what it does
    besides training, and how far it is."""

    name: str
    path: str
    state: str
    step: int
    steps: int
    loss: float | None
    age_s: float | None
    owner: Mapping[str, Any] | None
    incident: Mapping[str, Any] | None
    doing: str | None = None


def runs_below(root: Path) -> list[Summary]:
    """All runs in a folder, by name. A run that cannot be read, or whose object store does not answer, has the state `unreadable`.

    Raises:
        UserError: the path is not a folder, or cannot be listed.
    """
    return [summary_of_damaged(RunFolder(path)) for path in run_folders(root)]


def run_folders(root: Path) -> list[Path]:
    """Run folders directly below a folder, by name; empty if it does not exist. Raises as `runs_below`."""
    try:
        return sorted(path for path in root.iterdir() if is_run(path) and not path.name.startswith("."))
    except FileNotFoundError:
        if root.is_symlink():
            raise UserError(f"{root}: is a link to {root.readlink()}, which does not exist", code=5) from None
        return []
    except OSError as error:
        raise UserError(f"{root}: expected a folder of runs: {error.strerror or error}", code=5) from None


def summary_of_damaged(run: RunFolder) -> Summary:
    """As `summary_of`, and for a run that cannot be read a summary that says so."""
    try:
        return summary_of(run)
    except (UserError, OSError) as error:
        log.warning("%s: %s", run.path.name, error)
        return Summary(run.path.name, str(run.path), "unreadable", 0, 0, None, None, None, None)


def summary_of(run: RunFolder) -> Summary:
    """A run's state from its folder, and the process that holds it."""
    owner, told, now = owner_of(run), incidents.read(run.path), stages.doing(run.path)
    doing = None if now is None else stages.words_of(now)
    if is_young(run):
        state = "starting" if owner is not None else "new" if now is None else "preparing"
        return Summary(run.path.name, str(run.path), state, 0, 0, None, None, owner, told[-1] if told else None, doing)
    _, recipe, _ = open_run(run.path)
    beats = read_beats(run.path).values()
    rows = newest_rows(run)
    saved = newest_step(run)
    step = max([saved, *(row["step"] for row in rows[-1:])]) if owner is None else max(
        [saved, *(beat["step"] for beat in beats)]
    )  # fmt: skip
    seen = max((float(beat["at"]) for beat in beats), default=None)
    age = None if seen is None else max(0.0, time.time() - seen)
    if owner is not None:
        began = owner["at"] if is_number(owner.get("at")) else 0.0
        if seen is not None and seen >= began:
            state = "running" if time.time() - seen < FRESH_S else "stalled"
        else:
            state = "starting"
    elif saved >= recipe.steps:
        state = "done"
    elif not beats and not saved and not (run.path / "attempts").is_dir():
        state = "new"
    else:
        ends = [incident["kind"] for incident in told if incident["kind"] in ("preempted", "gave_up", "restarted")]
        state = "left" if leaving.asked(run.path) is not None or ends[-1:] == ["preempted"] else "failed"
    losses = [float(row["loss"]) for row in rows if is_number(row.get("loss"))]
    return Summary(
        run.path.name, str(run.path), state, step, recipe.steps, losses[-1] if losses else None, age, owner,
        told[-1] if told else None, doing,
    )  # fmt: skip


def owner_of(run: RunFolder) -> dict[str, Any] | None:
    """Host, process and start time of the driver that holds the folder; None if nobody does."""
    path = run.path / LOCK
    if not path.is_file():
        return None
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return parse_object(file.read(2**16)) or {}  # empty for a moment after its creation
    return None


def newest_log(run: RunFolder) -> Path | None:
    """Rank 0's output in the newest attempt."""
    # Attempts are named by their start time.
    logs = (path for path in run.path.glob("attempts/*/rank_0.log") if path.is_file())
    return max(logs, default=None, key=lambda path: path.parent.name)


def follow(run: RunFolder, *, lines: int = 20, poll_s: float = 0.5) -> Iterator[str]:
    """Rank 0's output, incidents and how far stages besides training are, as they come, attempt after attempt, until nobody works on it.

    Args:
        lines: how many of the existing lines to begin with.
    """
    path: Path | None = None
    position = 0
    told = len(incidents.read(run.path))
    pending, doing, next_word = b"", "", 0.0
    if newest_log(run) is None and stages.doing(run.path) is None:
        yield f"{run.path.name}: no worker has written a log yet; with cluster.workers=0 a run prints where it was started"
    while True:
        now = stages.doing(run.path)
        held = (
            owner_of(run) is not None or now is not None
        )  # asked first, so that the last words are read after it has ended
        if now is not None and (words := stages.words_of(now)) != doing and next_word <= time.monotonic():
            doing, next_word = words, time.monotonic() + WORD_S
            yield words
        newest = newest_log(run)
        if newest is not None:
            if newest != path:
                position, pending = (0, b"") if path is not None else (_last_lines(newest, lines), b"")
                path = newest
            with newest.open("rb") as file:
                file.seek(position)
                fresh = file.read()
            position += len(fresh)
            *whole, pending = (pending + fresh).split(b"\n")
            yield from (line.decode(errors="replace") for line in whole)
        known = incidents.read(run.path)
        yield from (f"incident: {row['kind']}: {row['message']}" for row in known[told:])
        told = len(known)
        if not held:
            if pending:
                yield pending.decode(errors="replace")
            return
        time.sleep(poll_s)


def _last_lines(path: Path, count: int) -> int:
    """The offset at which the last `count` lines of a file begin."""
    data = path.read_bytes()
    place = len(data) - data.endswith(b"\n")
    for _ in range(count):
        place = data.rfind(b"\n", 0, place)
        if place < 0:
            return 0
    return place + 1


def stop(run: RunFolder, *, deadline_s: float, reason: str = "nexus runs stop") -> Summary:
    """Asks a run to save and stop, and waits until it has.

    Raises:
        UserError: it is not running; or it did not leave in time (the request stands).
    """
    owner = owner_of(run)
    if owner is None:
        raise UserError(f"{run.path}: is not running ({summary_of(run).state})", code=5)
    leaving.ask(run.path, reason)
    end = time.monotonic() + deadline_s
    while owner_of(run) is not None:
        if time.monotonic() > end:
            raise UserError(
                f"{run.path}: did not stop within {deadline_s:.0f} s; the request remains. Its driver is {dict(owner)}",
                code=5,
            )
        time.sleep(0.2)
    return summary_of(run)


def deletable(path: Path, root: Path) -> RunFolder:
    """The run in a folder directly below the root.

    Raises:
        UserError: it lies elsewhere, is a link, is not a run folder, or is held.
    """
    if path.is_symlink() or path.resolve().parent != root.resolve():
        raise UserError(f"{path}: is not directly inside {root}; delete it by hand", code=5)
    run = run_at(path)
    owner = owner_of(run)
    if owner is not None:
        raise UserError(f"{path}: is held by {dict(owner)}; stop it first (nexus runs stop {path.name})", code=5)
    return run


def delete(path: Path, root: Path) -> None:
    """Removes a run's folder with all checkpoints in it. Raises as `deletable`."""
    run = deletable(path, root)
    with locked(run):
        # The rename hides it at once, however long the removal takes.
        doomed = root / f".{path.name}.deleted-{os.getpid()}"
        run.path.rename(doomed)
    shutil.rmtree(doomed)
    for left in root.glob(".*.deleted-*"):  # left by a killed deletion
        shutil.rmtree(left, ignore_errors=True)
