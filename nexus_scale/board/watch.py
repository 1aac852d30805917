"""Runs of a root and their folders, read again as far as they change."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nexus_scale.config.plain_yaml import read_yaml
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.io import incidents, stages
from nexus_scale.io.plain_json import read_objects
from nexus_scale.report.contents import Contents, Reader, mark_of
from nexus_scale.report.history import History
from nexus_scale.run.files import is_run
from nexus_scale.run.runs import LOCK, Summary, owner_of, run_folders, summary_of_damaged

T = TypeVar("T")

AT_ONCE = 4 << 20
"""Bytes of curves that one request reads whole: about a tenth of a second."""

MOST_OPEN = 64
"""Runs whose curves are kept in memory."""

WATCHED = (
    "recipe.yaml", "started.json", "metrics.jsonl", "validation.jsonl", incidents.FILE, stages.DOING, "heartbeats", "checkpoints",
    "attempts", "leave.json", LOCK,
)  # fmt: skip
"""What a run's line depends on: files, and folders whose names change."""

TAIL = 64 << 10
"""Bytes at the end of a file of rows that hold its newest."""


@dataclass(frozen=True)
class Listed:
    """A run in the list.

    Attributes:
        seen: seconds since the epoch of its last sign of life or, without one, of its last row.
        validation: the newest loss on held-out data, or its ratio to the zero predictor's, and which of them it is.
        curve: training losses, a few dozen.
    """

    summary: Summary
    family: str
    seen: float | None
    samples_per_s: float | None
    validation: tuple[str, float] | None
    incidents: int
    curve: list[float]


class Runs:
    """The runs directly below a folder. Any thread may call; a run is read by one at a time."""

    def __init__(self, root: Path):
        self.root = root
        self._lock = threading.Lock()
        self._listed: dict[str, tuple[object, Listed]] = {}
        self._readers: OrderedDict[str, tuple[threading.Lock, Reader]] = OrderedDict()

    def listed(self) -> list[Listed]:
        """All runs: those at work first, then the last seen. Raises UserError if the root cannot be listed."""
        with self._lock:
            found = {}
            for folder in run_folders(self.root):
                mark = _mark(folder)
                known = self._listed.get(folder.name)
                found[folder.name] = known if known is not None and known[0] == mark else (mark, _listed(folder))
            self._listed = found
        busy = ("running", "starting", "preparing", "stalled")
        rows = [row for _, row in found.values()]
        return sorted(rows, key=lambda row: (row.summary.state not in busy, -(row.seen or 0.0), row.summary.name))

    def folder(self, name: str) -> RunFolder:
        """The folder of a run of this root. Raises UserError if there is no such run."""
        if Path(name).name != name or name.startswith(".") or "\0" in name or not is_run(self.root / name):
            raise UserError(f"{name}: no run of {self.root}", code=5)
        return RunFolder(self.root / name)

    def contents(self, name: str) -> tuple[Contents, Summary]:
        """What a run's page shows. Raises UserError if there is no such run, or if it vanishes meanwhile."""
        run = self.folder(name)
        with self._lock:
            lock, reader = self._readers.pop(name, (None, None))
            lock, reader = lock or threading.Lock(), reader or Reader(run, AT_ONCE)
            self._readers[name] = (lock, reader)
            while len(self._readers) > MOST_OPEN:
                self._readers.popitem(last=False)
        with lock:
            try:
                return reader.read(), summary_of_damaged(run)
            except OSError as error:  # removed meanwhile, or not for this user to read
                raise UserError(f"{name}: cannot be read: {error.strerror or error}", code=5) from None


def _mark(folder: Path) -> object:
    """Differs whenever a run's line may."""
    try:
        owner = owner_of(RunFolder(folder))
    except OSError:
        owner = None
    # A stall shows by what does not change.
    minute = int(time.time() // 30) if owner is not None else None
    return (*(mark_of(folder / name) for name in WATCHED), None if owner is None else owner.get("pid"), minute)


def _listed(folder: Path) -> Listed:
    summary = summary_of_damaged(RunFolder(folder))
    newest = _last(folder / "metrics.jsonl")
    held = _last(folder / "validation.jsonl")
    seen = time.time() - summary.age_s if summary.age_s is not None else _changed(folder)
    curve = History(folder / "metrics.jsonl", longest=TAIL, stretches=60).read().rows
    validation: tuple[str, float] | None = None
    if isinstance(value := held.get("ratio"), int | float):
        validation = ("validation loss over the zero predictor's", float(value))
    elif isinstance(value := held.get("loss"), int | float):
        validation = ("validation loss", float(value))
    speed = newest.get("samples_per_s")
    return Listed(
        summary=summary,
        family=_family(folder),
        seen=seen,
        samples_per_s=float(speed) if isinstance(speed, int | float) else None,
        validation=validation,
        incidents=len(incidents.read(folder)),
        curve=[float(row["loss"]) for row in curve if "loss" in row],
    )


def _last(path: Path) -> dict[str, Any]:
    """The newest row; empty without one."""
    found: dict[str, Any] = {}
    for row in read_objects(path, tail_bytes=TAIL):
        found = {**found, **{name: value for name, value in row.items() if value is not None}}
    return found


def _changed(folder: Path) -> float | None:
    marks = [mark for name in WATCHED if (mark := mark_of(folder / name)) is not None]
    return max((mark[3] / 1e9 for mark in marks), default=None)


def _family(folder: Path) -> str:
    """The networks that a recipe names, for the list."""
    try:
        networks = read_yaml(folder / "recipe.yaml").get("networks")
    except (UserError, OSError):
        return ""
    specs = networks.values() if isinstance(networks, dict) else ()
    return " · ".join(str(spec["name"]) for spec in specs if isinstance(spec, dict) and spec.get("name"))


class Kept:
    """Results of a function by name, each at most so many seconds old, so that many viewers cost as much as one."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._locks: dict[str, threading.Lock] = {}
        self._found: dict[str, tuple[float, Any]] = {}
        self._lock = threading.Lock()

    def get(self, name: str, make: Callable[[], T]) -> T:
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            at, value = self._found.get(name, (-1e9, None))
            if time.monotonic() - at > self.seconds:
                value = make()
                with self._lock:
                    self._found[name] = (time.monotonic(), value)
                    if len(self._found) > MOST_OPEN:
                        oldest = min(self._found, key=lambda one: self._found[one][0])
                        del self._found[oldest]
                        self._locks.pop(oldest, None)
            made: T = value
            return made
