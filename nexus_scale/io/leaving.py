"""How a run is asked to stop: by a file in its folder, which all of its processes can see on any machine."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_json import read_json_or

LEFT = 75
"""Exit code of a run that saved its state and stopped on request (EX_TEMPFAIL: the same command resumes it)."""

_FILE = "leave.json"


@dataclass(frozen=True)
class Request:
    """Why the run is asked to stop. `restart`: its supervisor then restarts it on the machines available."""

    reason: str
    restart: bool = False
    at: float = field(default_factory=time.time)


def ask(run: Path, reason: str, *, restart: bool = False) -> None:
    """Asks the run in this folder to save and stop. It has no effect on a run that is not running."""
    atomic_write(run / _FILE, json.dumps(asdict(Request(reason, restart))))


def asked(run: Path) -> Request | None:
    """The pending request, if any."""
    return read_json_or(run / _FILE, Request, None)


def withdraw(run: Path) -> None:
    """Removes a pending request; called at every start of a run."""
    (run / _FILE).unlink(missing_ok=True)
