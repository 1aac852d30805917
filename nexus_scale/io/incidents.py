"""What went wrong in a run, one JSON line each in `incidents.jsonl`: the record that `nexus runs` and the report read."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_scale.io.durable import append_line
from nexus_scale.io.plain_json import is_time, read_objects

log = logging.getLogger(__name__)

FILE = "incidents.jsonl"

KINDS = {
    "worker_lost": "a worker process ended without an error message",
    "worker_failed": "a worker raised an error",
    "node_lost": "a machine left the cluster",
    "head_lost": "the head of the cluster, or Ray on the driver's machine, was gone",
    "stalled": "a stage took longer than its deadline",
    "straggler": "a rank is slower than the others",
    "preempted": "the run was asked to stop, and saved",
    "restarted": "the workers were started again",
    "resized": "the number of workers changed",
    "gave_up": "the supervisor stopped restarting",
    "nonfinite": "a step was skipped: a gradient or the loss was not finite",
    "spike": "the loss left its usual range",
    "collapse": "samples became alike: their diversity fell",
    "overfitting": "samples are nearer to training samples than to held-out ones",
    "memorisation": "samples are copies of training samples",
    "rolled_back": "the run went back to a checkpoint and skips some batches",
    "bad_data": "a shard or sample does not match its index",
    "save_failed": "a checkpoint could not be written",
    "corrupt_checkpoint": "a checkpoint did not verify and was set aside",
    "slow_store": "an object store failed or was slow",
}
"""All kinds of incidents."""


def note(run: Path, kind: str, message: str, **facts: Any) -> dict[str, Any]:
    """Appends an incident to the run's record. If the disk refuses it, the incident is only logged and the run continues.

    Args:
        run: the run's folder.
        kind: one of KINDS.
        message: for people, one line.
        facts: JSON values: `rank`, `step`, `seconds`, ...
    Returns:
        the row: `at` (seconds since the epoch), `kind`, `message`, `attempt` if the process belongs to one, and the facts.
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
    """All incidents of a run, oldest first; lines cut short by a crash are skipped."""
    return [row for row in read_objects(run / FILE) if _is_incident(row)]


def _is_incident(row: Mapping[str, Any]) -> bool:
    kind, message = row.get("kind"), row.get("message")
    return isinstance(kind, str) and kind in KINDS and isinstance(message, str) and is_time(row.get("at"))
