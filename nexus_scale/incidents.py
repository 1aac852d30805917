"""What went wrong in a run, one JSON line each in `incidents.jsonl`: the record that `nexus runs` and the report read."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from nexus_scale.durable import append_line

log = logging.getLogger(__name__)

FILE = "incidents.jsonl"

KINDS = {
    "worker_lost": "a worker process ended without a word",
    "worker_failed": "a worker raised an error",
    "node_lost": "a machine left the cluster",
    "head_lost": "the head of the cluster, or Ray on the driver's machine, was gone",
    "stalled": "a stage took longer than its deadline",
    "straggler": "a rank is slower than the others",
    "preempted": "the run was asked to leave, and saved",
    "restarted": "the workers were started again",
    "resized": "the number of workers changed",
    "gave_up": "the supervisor stopped restarting",
    "nonfinite": "a step was left out: a gradient or the loss was not finite",
    "spike": "the loss left its usual range",
    "rolled_back": "the run went back to a checkpoint and passes over some batches",
    "bad_data": "a shard or sample was not what its index says",
    "save_failed": "a checkpoint could not be written",
    "corrupt_checkpoint": "a checkpoint did not verify and was set aside",
    "slow_store": "an object store failed or answered late",
}
"""All kinds of incidents."""


def note(run: Path, kind: str, message: str, **facts: Any) -> dict[str, Any]:
    """Appends an incident to the run's record. A disk that takes no more lines costs the line and not the run: it is logged.

    Args:
        run: the run's folder.
        kind: one of KINDS.
        message: for people, one line.
        facts: JSON values: `rank`, `step`, `seconds`, ...
    Returns:
        the row: `at` (seconds since the epoch), `kind`, `message`, `attempt` where the process belongs to one, and the facts.
    """
    assert kind in KINDS, f"{kind!r} is not one of {sorted(KINDS)}"
    row: dict[str, Any] = {"at": round(time.time(), 3), "kind": kind, "message": message, **facts}
    if "NEXUS_ATTEMPT" in os.environ:
        row.setdefault("attempt", os.environ["NEXUS_ATTEMPT"])
    try:
        append_line(run / FILE, json.dumps(row))
    except OSError as error:
        log.error("incident not recorded (%s): %s: %s", error, kind, message)
    return row


def read(run: Path) -> list[dict[str, Any]]:
    """All incidents of a run, oldest first; a line that was cut short by a crash is left out."""
    path = run / FILE
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and row.get("kind") in KINDS:
            rows.append(row)
    return rows
