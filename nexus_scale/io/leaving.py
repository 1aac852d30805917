"""How a run is asked to leave: a file in its folder, which all of its processes can see wherever they run."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_json import read_json_or

LEFT = 75
"""Exit code of a run that was asked to leave and has saved its state (EX_TEMPFAIL: the same command goes on)."""

_FILE = "leave.json"


@dataclass(frozen=True)
class Request:
    """Why the run shall leave. `restart`: its supervisor starts it again, on what machines there are then."""

    reason: str
    restart: bool = False
    at: float = field(default_factory=time.time)


def ask(run: Path, reason: str, *, restart: bool = False) -> None:
    """Asks the run in this folder to save and leave; a run that does not run will not start by it."""
    atomic_write(run / _FILE, json.dumps(asdict(Request(reason, restart))))


def asked(run: Path) -> Request | None:
    """The request that stands, if any."""
    return read_json_or(run / _FILE, Request, None)


def withdraw(run: Path) -> None:
    """Called by whoever starts the run (again): requests of the past are done with."""
    (run / _FILE).unlink(missing_ok=True)
