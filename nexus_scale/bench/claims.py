"""What theory demands of a scoreboard's rows: each claim is a section of its settings file, and ends with the figures that decide it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError

Rows = Sequence[Mapping[str, Any]]
Curves = Mapping[str, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True)
class Outcome:
    """A claim in words, whether it holds, and the two figures."""

    claim: str
    holds: bool
    figures: list[float | None]


class Pair(BaseModel):
    """A claim about two runs, by their names."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    of: str
    than: str

    def check(self, runs: Mapping[str, Sequence[Mapping[str, Any]]], where: str) -> None:
        """Raises a UserError where the claim is about what the board does not have.

        Args:
            runs: by name, how each is drawn: what a row's `draws` says.
        """
        for run in (self.of, self.than):
            check_run(run, runs, where)


class InSteps(Pair):
    """A claim about what two runs draw in so many steps; None: of families that draw at once."""

    steps: int | None = Field(None, ge=1)

    @property
    def way(self) -> str:
        """The steps in words."""
        return "at once" if self.steps is None else f"in {self.steps} step{'s'[: self.steps > 1]}"

    def check(self, runs: Mapping[str, Sequence[Mapping[str, Any]]], where: str) -> None:
        super().check(runs, where)
        for run in (self.of, self.than):
            drawn_in([{"run": run, "draws": draws} for draws in runs[run]], run, self.steps)


class Better(InSteps):
    """`of` has the lower Fréchet distance."""

    claim: Literal["better"]

    def outcome(self, rows: Rows, curves: Curves) -> Outcome:
        figures = [drawn_in(rows, run, self.steps)["frechet"] for run in (self.of, self.than)]
        words = f"{self.of} draws better {self.way} than {self.than}: Fréchet distance"
        return Outcome(words, figures[0] < figures[1], figures)


class Straighter(InSteps):
    """What `of` draws in so many steps is nearer to what it draws, from the same noise, in the most."""

    claim: Literal["straighter"]

    def outcome(self, rows: Rows, curves: Curves) -> Outcome:
        figures = [drawn_in(rows, run, self.steps)["distance_to_most_steps"] for run in (self.of, self.than)]
        words = f"{self.of} is straighter than {self.than}: distance of what is drawn {self.way} to most steps"
        return Outcome(words, figures[0] < figures[1], figures)


class Earlier(Pair):
    """`of` reaches `part` of the way that `than` goes, from its first validation to its best, in fewer steps of training."""

    claim: Literal["earlier"]
    metric: str = "loss"
    part: float = Field(0.9, gt=0, le=1)

    def outcome(self, rows: Rows, curves: Curves) -> Outcome:
        theirs = [row[self.metric] for row in curves[self.than]]
        level = theirs[0] + self.part * (min(theirs) - theirs[0])
        figures = [first_below(curves[run], self.metric, level) for run in (self.of, self.than)]
        mine, other = figures
        holds = mine is not None and other is not None and mine < other
        words = f"{self.of} reaches validation {self.metric} {level:.4f} earlier than {self.than}: step"
        return Outcome(words, holds, figures)


class Lower(Pair):
    """`of` ends with the lower value of a metric of its validations."""

    claim: Literal["lower"]
    metric: str

    def outcome(self, rows: Rows, curves: Curves) -> Outcome:
        figures = [values_of(curves[run], self.metric, run)[-1] for run in (self.of, self.than)]
        words = f"{self.of} ends with a lower validation {self.metric} than {self.than}:"
        return Outcome(words, figures[0] < figures[1], [*figures])


class Follows(BaseModel):
    """While `of` trains, a metric of its validations rises and falls with another, such as what callbacks.monitor measures: Spearman's rank
    correlation is at least `correlation`; where that is negative, at most.

    Attributes:
        after: the first step that counts: a critic that has learnt nothing says nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    claim: Literal["follows"]
    of: str
    metric: str
    other: str = "frechet"
    correlation: float = Field(0.8, ge=-1, le=1)
    after: int = Field(0, ge=0)

    def check(self, runs: Mapping[str, Sequence[Mapping[str, Any]]], where: str) -> None:
        """Raises a UserError where the claim is about what the board does not have."""
        check_run(self.of, runs, where)

    def outcome(self, rows: Rows, curves: Curves) -> Outcome:
        both = [row for row in curves[self.of] if row["step"] >= self.after and {self.metric, self.other} <= row.keys()]
        values = [values_of(both, name, self.of) for name in (self.metric, self.other)]
        found = rank_correlation(*values)
        holds = found >= self.correlation if self.correlation >= 0 else found <= self.correlation
        words = (
            f"{self.of}: validation {self.metric} follows {self.other} over {len(both)} validations: rank correlation"
        )
        return Outcome(words, holds, [found, self.correlation])


class Near(BaseModel):
    """`of` ends with a metric of its validations within `within` of `value`: what another program, trained alike, came to."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    claim: Literal["near"]
    of: str
    metric: str
    value: float
    within: float = Field(gt=0)

    def check(self, runs: Mapping[str, Sequence[Mapping[str, Any]]], where: str) -> None:
        """Raises a UserError where the claim is about what the board does not have."""
        check_run(self.of, runs, where)

    def outcome(self, rows: Rows, curves: Curves) -> Outcome:
        found = values_of(curves[self.of], self.metric, self.of)[-1]
        words = f"{self.of} ends with a validation {self.metric} within {self.within:g} of"
        return Outcome(words, abs(found - self.value) <= self.within, [found, self.value])


Claim = Better | Straighter | Earlier | Lower | Follows | Near


def check_run(run: str, runs: Mapping[str, Any], where: str) -> None:
    """Raises a UserError where the board has no such run."""
    if run not in runs:
        raise UserError(f"{where}: a claim is about the run {run!r}; {nearest(run, list(runs))}")


def values_of(curve: Sequence[Mapping[str, Any]], name: str, run: str) -> list[float]:
    """The values of a metric of a run.

    Raises:
        UserError: it has none.
    """
    found = [float(row[name]) for row in curve if name in row]
    if not found:
        known = sorted({key for row in curve for key in row} - {"step", "weights"})
        raise UserError(
            f"scoreboard: a claim is about {name!r} of {run}, which its validations do not have; they have {known}"
        )
    return found


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, of equal values their mean; 0 where one never changes."""
    ranks = [np.array([np.mean(np.flatnonzero(np.sort(v) == one)) for one in v]) for v in (np.array(x), np.array(y))]
    deviations = [rank - rank.mean() for rank in ranks]
    size = float(np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum()) / size if size else 0.0


def drawn_in(rows: Rows, run: str, steps: int | None) -> Mapping[str, Any]:
    """The row of a run that was drawn in so many steps.

    Raises:
        UserError: it was not.
    """
    own = [row for row in rows if row["run"] == run]
    for row in own:
        if row["draws"].get("steps") == steps:
            return row
    known = sorted(str(row["draws"].get("steps")) for row in own)
    if steps is None:
        raise UserError(
            f"scoreboard: a claim is about {run} without steps; it is drawn in {', '.join(known)}: give the claim its `steps`"
        )
    raise UserError(
        f"scoreboard: a claim is about {run} in {steps} steps; it is drawn in {', '.join(known)}: add `steps: {steps}`"
    )


def first_below(curve: Sequence[Mapping[str, Any]], metric: str, level: float) -> float | None:
    """The step of the first validation whose metric is at most `level`, between validations by a straight line; None: it stays above."""
    before: tuple[float, float] | None = None
    for row in curve:
        step, value = float(row["step"]), float(row[metric])
        if value <= level:
            if before is None or before[1] == value:
                return step
            return before[0] + (step - before[0]) * (before[1] - level) / (before[1] - value)
        before = step, value
    return None
