"""Retention of checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nexus_scale.contracts import UserError
from nexus_scale.engine.checkpoint.places import Commit


@dataclass(frozen=True)
class Best:
    """The checkpoints with the best figures.

    Attributes:
        figures: what was measured so far, by step. A step that was not measured is never among the best.
    """

    figures: Callable[[], Mapping[int, float]]
    mode: Literal["min", "max"] = "min"
    count: int = 1

    def steps(self, steps: Sequence[int]) -> set[int]:
        figures = self.figures()
        measured = [step for step in steps if step in figures]
        measured.sort(key=lambda step: figures[step], reverse=self.mode == "max")
        return set(measured[: self.count])


@dataclass(frozen=True)
class Retention:
    """Keeps the newest `keep`, those at multiples of `every`, and the best."""

    keep: int = 2
    every: int | None = None
    best: Best | None = None

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise UserError(f"callbacks.checkpoint.keep: expected at least 1, got {self.keep}")

    def superfluous(self, commits: Sequence[Commit], keep: int | None = None) -> list[Commit]:
        """The removable ones of `commits`, oldest first; optionally with another number of newest to keep."""
        stay = {commit.step for commit in commits[-(keep or self.keep) :]}
        if self.every:
            stay |= {commit.step for commit in commits if commit.step % self.every == 0}
        if self.best:
            stay |= self.best.steps([commit.step for commit in commits])
        return [commit for commit in commits if commit.step not in stay]
