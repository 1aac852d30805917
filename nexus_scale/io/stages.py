"""What a run does besides training, and how far it is: data jobs before it, drawing and scoring after it.

`progress.json` in the run's folder says what is under way, for `nexus runs`, the report and the board; `stages.json` keeps how long each
stage took.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, Field, FiniteFloat

from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_json import read_json_or

log = logging.getLogger(__name__)

DOING = "progress.json"
STAGES = "stages.json"

EVERY_S = 1.0
"""`progress.json` is rewritten at most this often."""

SILENT_S = 120.0
"""A stage of another machine that has written nothing for so long is taken for dead: one that lives writes every few seconds."""

Progress = Callable[[int, int], None]
"""`progress(done, total)` reports how far a stage is, in its own units."""


class Stage(BaseModel):
    """An entry of stages.json."""

    name: str
    seconds: FiniteFloat = Field(ge=0, lt=1e12)


class Doing(BaseModel):
    """`progress.json`: the stage, how far it is (`total` 0: it does not say), when it began and last wrote, and who writes."""

    name: str
    done: int = Field(0, ge=0, lt=2**53)
    total: int = Field(0, ge=0, lt=2**53)
    begun: FiniteFloat = Field(ge=0, lt=1e11)
    at: FiniteFloat = Field(ge=0, lt=1e11)
    host: str
    pid: int = Field(ge=1, lt=2**31)

    @property
    def share(self) -> float | None:
        """Of the work, what is done: 0 to 1; None if the stage does not say."""
        return min(1.0, self.done / self.total) if self.total else None

    def seconds_left(self) -> float | None:
        """By its mean speed; None before anything is done."""
        share = self.share
        return None if not share else (self.at - self.begun) * (1.0 - share) / share


def words_of(doing: Doing) -> str:
    """`score: 30 of 120, 25 %, about 90 s left` or `score: for 40 s`."""
    if (share := doing.share) is None:
        return f"{doing.name}: for {max(0.0, doing.at - doing.begun):.0f} s"
    left = doing.seconds_left()
    words = f"{doing.name}: {doing.done} of {doing.total}, {100 * share:.0f} %"
    return words if left is None else f"{words}, about {left:.0f} s left"


def read_stages(folder: Path) -> list[Stage]:
    """The record of a run's stages; empty if there is none."""
    return read_json_or(folder / STAGES, list[Stage], [])


def note_stage(folder: Path, name: str, seconds: float) -> None:
    """Adds a stage's seconds to the run's record of time; repeated stages add up."""
    stages = {stage.name: stage.seconds for stage in read_stages(folder)}
    stages[name] = stages.get(name, 0.0) + seconds
    rows = [{"name": name, "seconds": seconds} for name, seconds in stages.items()]
    _write(folder / STAGES, json.dumps(rows, indent=1))


def doing(folder: Path) -> Doing | None:
    """The stage that is under way in a run's folder; None if there is none, or if who began it is gone."""
    found: Doing | None = read_json_or(folder / DOING, Doing, None)
    if found is None:
        return None
    if found.host != socket.gethostname():
        return found if time.time() - found.at < SILENT_S else None
    try:
        os.kill(found.pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return found
    return found


_under_way: dict[Path, list[object]] = {}
"""Stages of this process by folder, each within the one before: the innermost is what the file says."""


@contextmanager
def stage(folder: Path, name: str, show: Progress | None = None, *, noted: bool = True) -> Iterator[Progress]:
    """A context in which a run's folder says that a stage is under way; gives a function that says how far it is.

    Args:
        show: is told the same, for a terminal.
        noted: whether its seconds are added to the run's record of time. Not for a stage within another.
    """
    begun, clock = time.time(), time.monotonic()
    how_far, over, me = (0, 0), threading.Event(), object()
    around = _under_way.setdefault(folder, [])
    around.append(me)

    def write() -> None:
        done, total = how_far
        now = Doing(
            name=name, done=done, total=total, begun=begun, at=time.time(), host=socket.gethostname(), pid=os.getpid()
        )
        if around[-1] is me:
            _write(folder / DOING, now.model_dump_json(), synced=False)

    def beat() -> None:
        while not over.wait(EVERY_S):
            write()

    def progress(done: int, total: int) -> None:
        nonlocal how_far
        how_far = (max(0, int(done)), max(0, int(total)))
        if show is not None:
            show(done, total)

    write()
    thread = threading.Thread(target=beat, name="stage", daemon=True)
    thread.start()
    try:
        yield progress
        if noted:
            note_stage(folder, name, time.monotonic() - clock)
    finally:
        over.set()
        thread.join()
        around.remove(me)
        if not around:
            _under_way.pop(folder, None)
            _remove(folder / DOING)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # its writer is gone, so nobody believes it
        log.error("%s: could not be removed: %s", path, error)


def _write(path: Path, text: str, *, synced: bool = True) -> None:
    try:
        atomic_write(path, text, synced=synced)
    except OSError as error:  # loses the figure, not the run
        log.error("%s: could not be written: %s", path, error)
