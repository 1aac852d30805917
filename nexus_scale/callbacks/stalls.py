"""Which rank caused a stall: from the heartbeats of all ranks, and from what each rank does in every step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

TRAINING = ("data", "forward", "backward", "step")
"""Stages of the step itself, in order; callbacks between two steps may differ from step to step."""

Visits = Sequence[tuple[str, int]]
"""Visited stages of a step in order, each with the number of collectives that it began."""


def calls(ends: Sequence[tuple[str, int]]) -> list[tuple[str, int]]:
    """Visits of the step that begins with the first `data`.

    Args:
        ends: stages as they ended, each with the number of collectives that the process had begun by then.
    """
    visits: list[tuple[str, int]] = []
    for i, (stage, count) in enumerate(ends):
        if stage in TRAINING and i and (visits or stage == "data"):
            visits.append((stage, count - ends[i - 1][1]))
    return visits


def oddity(habit: Visits, visits: Visits, complete: bool = True) -> str:
    """How a step differs from the one before it; empty if it does not. In a step that is still under way, the last visit may not have begun
    all of its collectives."""
    for i, (stage, count) in enumerate(visits):
        if i >= len(habit) or habit[i][0] != stage:
            usual = f"{habit[i][0]!r}" if i < len(habit) else "the next step"
            return f"it went on with {stage!r} where {usual} came in the step before"
        under_way = not complete and i == len(visits) - 1
        if count > habit[i][1] or (count < habit[i][1] and not under_way):
            return f"it began {count} collectives in {stage!r}, and {habit[i][1]} in the step before"
    return ""


def blamed(beats: Mapping[int, Mapping[str, Any]], silent: Sequence[int]) -> tuple[int, str]:
    """The rank that the others wait for, and the evidence.

    Args:
        beats: newest heartbeat by rank: `step`, `stage`, `in_stage_s`, `collectives`, `odd`.
        silent: ranks without a fresh heartbeat while the others beat.
    """
    if silent:
        return silent[
            0
        ], "its heartbeat stopped: the process was stopped, or sits in native code that holds Python's lock"
    odd = [rank for rank, beat in beats.items() if beat["odd"]]
    if odd and len(odd) < len(beats):
        return odd[0], str(beats[odd[0]]["odd"])

    def progress(rank: int) -> tuple[int, int, int, float]:
        beat = beats[rank]
        place = TRAINING.index(beat["stage"]) if beat["stage"] in TRAINING else -1
        return beat["step"], place, beat["collectives"], -beat["in_stage_s"]

    rank = min(beats, key=progress)
    beat = beats[rank]
    return rank, f"it is furthest behind, in stage {beat['stage']!r} after step {beat['step']}"
