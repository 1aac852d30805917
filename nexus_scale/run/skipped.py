"""Global batches that a run skips: decided once, when it rolls back to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_json import DamagedFile, read_json


@dataclass(frozen=True)
class SkippedRange:
    """Global batches [first, last] that the run skips since it rolled back after `step` steps."""

    step: int
    first: int
    last: int
    reason: str


def skipped_ranges(run: RunFolder) -> list[SkippedRange]:
    """All ranges that the run has decided to skip, oldest first.

    The decision is final: a run that is killed before its next checkpoint still resumes without these batches.
    """
    try:
        return read_json(run.path / "passed_over.json", list[SkippedRange]) or []
    except DamagedFile as error:
        raise UserError(
            f"{error}. It lists the batches that the run skips, and the checkpoints may not have all of them; see "
            "`rolled_back` in incidents.jsonl, and write it again, or move it away to continue with the list in the newest checkpoint",
            code=5,
        ) from None


def skip(run: RunFolder, entry: SkippedRange) -> None:
    atomic_write(
        run.path / "passed_over.json", json.dumps([asdict(one) for one in [*skipped_ranges(run), entry]], indent=1)
    )


def all_skipped(skipped: Iterable[tuple[int, int]], passed: Iterable[SkippedRange]) -> list[tuple[int, int]]:
    """`Progress.skipped` with the ranges decided since it was saved; in order, each range once."""
    return sorted({*((first, last) for first, last in skipped), *((one.first, one.last) for one in passed)})
