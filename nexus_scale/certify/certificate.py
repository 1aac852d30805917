"""The result of a proof, as plain values, as JSON and in a few lines."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Leg:
    """The findings on one leg. `wrong`: the first differences, in words."""

    name: str
    workers: list[int]
    seconds: float
    steps_compared: int
    differing: int
    wrong: list[str]


@dataclass(frozen=True)
class Certificate:
    """The result.

    Attributes:
        passed: every promise holds; the other fields say which does not.
        equal_bits: every step of the twin and its last checkpoint are the reference's, to the bit.
        same_samples: in twin and rescaled leg, each position of each global batch was taken once, by the same sample.
        largest_deviation: of the rescaled leg's loss, relative.
        lost_steps: the most steps repeated after one kill; `lost_behind_a_save` of them were trained while the checkpoint that the
            kill tore was being written.
        lost_to_preemption: the same after SIGTERM; 0 is promised.
        recovery_seconds: from SIGKILL to the end of the next new process's first step: `median` and `worst`.
        kills: those that struck, of `kills_planned`.
        controls: whether the comparison found a missing item, by item.
    """

    recipe: str
    passed: bool
    equal_bits: bool
    same_samples: bool
    largest_deviation: float | None
    lost_steps: int
    lost_behind_a_save: int
    lost_to_preemption: int
    checkpoint_every: int
    recovery_seconds: dict[str, float] | None
    kills: int
    kills_planned: int
    kills_inside_a_save: int
    kills_by_kind: dict[str, int]
    steps: int
    steps_compared: int
    steps_redone: int
    workers: list[int]
    left_out: str | None
    controls: dict[str, bool]
    failures: list[str]
    legs: list[Leg]
    seed: int
    seconds: float
    versions: dict[str, Any]
    deviations: list[tuple[int, float]] = field(repr=False)
    kill_table: list[dict[str, Any]] = field(repr=False)


def summary(certificate: Certificate) -> str:
    """The verdict in a few lines."""
    recovery, deviation = certificate.recovery_seconds, certificate.largest_deviation
    lines = [
        "passed: nothing was lost" if certificate.passed else "failed: " + "; ".join(certificate.failures),
        f"bits {'equal' if certificate.equal_bits else 'different'} in {certificate.steps_compared} compared steps, "
        f"{certificate.kills} kills ({certificate.kills_inside_a_save} inside a save), at most {certificate.lost_steps} steps lost",
    ]
    if recovery is not None:
        lines.append(f"recovery {recovery['median']:.1f} s (median), {recovery['worst']:.1f} s (worst)")
    if deviation is not None:
        lines.append(f"on {certificate.workers} workers in turn the loss deviates by {deviation:.1e} at most")
    lines += [f"without {item}: {'found' if found else 'unnoticed'}" for item, found in certificate.controls.items()]
    return "\n".join(lines)


def as_json(certificate: Certificate) -> dict[str, Any]:
    """Plain values; a deviation that is not finite is null, as JSON has no word for it."""
    values = asdict(certificate)
    values["deviations"] = [(step, value if math.isfinite(value) else None) for step, value in certificate.deviations]
    if values["largest_deviation"] is not None and not math.isfinite(values["largest_deviation"]):
        values["largest_deviation"] = None
    return values
