"""Digests of runs, read and compared step by step."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nexus_scale.callbacks.digest import FOLDER
from nexus_scale.engine.checkpoint import Checkpoint

Row = Mapping[str, Any]

OF_THE_PROCESS = ("process", "at")
"""In these, two rows of the same step may differ."""

MOST_WORDS = 12
"""So many differences are named one by one; a run that took another way differs in all later steps."""


@dataclass
class Digests:
    """All rows of a run: `ranks[r]` has those of rank r in the order of writing, with repeated steps."""

    ranks: dict[int, list[Row]]

    @classmethod
    def read(cls, run: Path) -> Digests:
        """A run's digests, without lines that a kill cut short: their steps were not done."""
        ranks: dict[int, list[Row]] = {}
        for path in sorted((run / FOLDER).glob("*-rank*.jsonl")):
            rows = ranks.setdefault(int(path.stem.rpartition("-rank")[2]), [])
            for line in path.read_bytes().split(b"\n"):
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    continue
        for rows in ranks.values():
            rows.sort(key=lambda row: row["at"])
        return cls(ranks)

    @property
    def last(self) -> int:
        return max((row["step"] for rows in self.ranks.values() for row in rows), default=0)

    def of_step(self, step: int) -> dict[int, list[Row]]:
        """All rows of a step, by rank."""
        return {rank: [row for row in rows if row["step"] == step] for rank, rows in self.ranks.items()}

    def redone(self) -> int:
        """Rows beyond one for each rank and step."""
        return sum(len(rows) - len({row["step"] for row in rows}) for rows in self.ranks.values())

    def restarts(self) -> list[Restart]:
        """Each change of process on each rank, in order of time."""
        found = []
        for rank, rows in self.ranks.items():
            since = rows[0]["at"] if rows else 0.0
            for before, after in itertools.pairwise(rows):
                if before["process"] != after["process"]:
                    found.append(Restart(rank, before["step"], after["step"], since, after["at"]))
                    since = after["at"]
        return sorted(found, key=lambda restart: restart.at)


@dataclass(frozen=True)
class Restart:
    """A change of process on a rank: `before` is the old one's last step, `after` the new one's first. `since`, `at`: when each did its
    first step."""

    rank: int
    before: int
    after: int
    since: float
    at: float

    @property
    def lost_steps(self) -> int:
        """Steps that had to be repeated."""
        return max(0, self.before + 1 - self.after)


@dataclass
class Findings:
    """The result of a comparison: `compared` and `differing` items, and the first differences in words."""

    compared: int = 0
    differing: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.differing

    def add(self, words: str) -> None:
        self.differing += 1
        if len(self.wrong) < MOST_WORDS:
            self.wrong.append(words)


def same_bits(reference: Digests, other: Digests, steps: Iterable[int], ranks: Iterable[int]) -> Findings:
    """Whether every row of every step, also of repeated ones, equals the reference's."""
    found = Findings()
    ranks = list(ranks)
    for step in steps:
        found.compared += 1
        one, two = reference.of_step(step), other.of_step(step)
        for rank in ranks:
            if not one.get(rank) or not two.get(rank):
                found.add(f"step {step}, rank {rank}: no digest")
                continue
            first, *again = [*one[rank], *two[rank]]
            differ = sorted({key for row in again for key in {*first, *row} if first.get(key) != row.get(key)})
            if differ := [key for key in differ if key not in OF_THE_PROCESS]:
                found.add(f"step {step}, rank {rank}: {', '.join(differ)}")
    return found


def batches_of(digests: Digests, step: int) -> dict[tuple[int, int], set[int]]:
    """Sample ids by (number of the global batch, position in it), over all ranks and repetitions of the step."""
    found: dict[tuple[int, int], set[int]] = {}
    for rows in digests.of_step(step).values():
        for row in rows:
            # A step that draws several global batches has each position several times, in order.
            seen: dict[int, int] = {}
            for place, sample in zip(row["positions"], row["samples"], strict=True):
                seen[place] = seen.get(place, 0) + 1
                found.setdefault((seen[place], place), set()).add(sample)
    return found


def same_samples(reference: Digests, other: Digests, steps: Iterable[int], global_batch: int) -> Findings:
    """Whether each position of each global batch was taken once, by the same sample as in the reference."""
    found = Findings()
    for step in steps:
        found.compared += 1
        one, two = batches_of(reference, step), batches_of(other, step)
        missing = sorted(
            {place for _, place in one} ^ set(range(global_batch)) | {p for _, p in one.keys() - two.keys()}
        )
        if missing:
            found.add(f"step {step}: positions {missing[:8]} are missing")
        elif one.keys() != two.keys():
            found.add(f"step {step}: positions {sorted(p for _, p in two.keys() - one.keys())[:8]} are repeated")
        elif wrong := [place for (_, place), samples in two.items() if len(samples | one[_, place]) > 1]:
            found.add(f"step {step}: other samples at positions {wrong[:8]}")
    return found


def loss_of(digests: Digests, step: int) -> dict[str, float]:
    """Mean losses of a step over all ranks, when it was last done."""
    sums: dict[str, list[float]] = {}
    rows = [rows for rows in digests.of_step(step).values() if rows]
    # A rank that no longer takes part has older rows.
    workers = max(rows, key=lambda of_rank: of_rank[-1]["at"])[-1]["workers"] if rows else 0
    for of_rank in rows:
        if of_rank[-1]["workers"] != workers:
            continue
        for name, (total, count) in of_rank[-1]["losses"].items():
            both = sums.setdefault(name, [0.0, 0.0])
            both[0], both[1] = both[0] + total, both[1] + count
    return {name: total / count for name, (total, count) in sums.items() if count}


def deviations(reference: Digests, other: Digests, steps: Sequence[int]) -> list[float]:
    """Largest relative deviation of a loss from the reference's, by step; infinite where one is missing."""
    found = []
    for step in steps:
        one, two = loss_of(reference, step), loss_of(other, step)
        if not one or one.keys() != two.keys():
            found.append(float("inf"))
            continue
        found.append(max(abs(two[name] - one[name]) / max(abs(one[name]), 1e-30) for name in one))
    return found


def same_tensors(one: Checkpoint, two: Checkpoint) -> Findings:
    """Whether two checkpoints have the same tensors and progress, to the bit."""
    found = Findings()
    if one.names != two.names:
        found.add(f"the checkpoints hold different tensors: {sorted({*one.names} ^ {*two.names})[:8]}")
        return found
    for name in one.names:
        found.compared += 1
        a, b = (checkpoint.tensor(name).reshape(-1).view(torch.uint8) for checkpoint in (one, two))
        if not torch.equal(a, b):
            found.add(f"{name}: {int((a != b).sum())} of {a.numel()} bytes differ")
    if one.state["progress"] != two.state["progress"]:
        found.add(f"progress: {one.state['progress']} and {two.state['progress']}")
    return found
