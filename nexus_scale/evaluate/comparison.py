"""`nexus compare`: differences of evaluations with intervals, paired where prompts and noise are the same, corrected for their number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.evaluate.evaluation import EVALUATIONS
from nexus_scale.evaluate.findings import DRAWN, FILE, REAL, ROWS, Evaluation, lined_up, read
from nexus_scale.evaluate.measures import better_of, measure_of
from nexus_scale.evaluate.suite import SECTIONS, Suite
from nexus_scale.metrics.statistics import Estimate, Resampling, holm

SURE = 0.05
"""A corrected probability below it shows a difference."""

NONE_SHOWN = "no difference shown"


@dataclass(frozen=True)
class Difference:
    """A figure of one evaluation less that of the first.

    Attributes:
        p, corrected: probability by chance alone, and what Holm's method makes of it for all differences of the comparison.
        verdict: better, worse, higher, lower, or that no difference is shown.
    """

    figure: str
    first: float
    other: float
    difference: float
    low: float
    high: float
    p: float
    corrected: float
    paired: bool
    verdict: str


def folder_of(path: Path, suite: str | None) -> Path:
    """The folder of an evaluation: the path itself, or a run's newest by a suite, its only one unless named.

    Raises:
        UserError: there is none, or a run has several and none is named.
    """
    if (path / FILE).exists():
        return path
    parent = path / EVALUATIONS if (path / EVALUATIONS).is_dir() else path.with_name(f"{path.name}.{EVALUATIONS}")
    found = sorted(one.parent for one in parent.glob(f"*/{FILE}"))
    suites = sorted({_suite_of(one) for one in found})
    if suite is None and len(suites) > 1:
        raise UserError(f"{path}: was evaluated by {', '.join(suites)}; choose with --suite")
    own = [one for one in found if suite is None or _suite_of(one) == suite]
    if not own:
        raise UserError(
            f"{path}: has no evaluation; make one: nexus evaluate {path} --suite {suite or 'emoji'}", code=5
        )
    return max(own, key=lambda one: (read(one)[0].of.get("step") or 0, one.name))


def _suite_of(folder: Path) -> str:
    return str(read(folder)[0].suite.get("name"))


def compare(folders: Sequence[Path]) -> dict[str, list[Difference]]:
    """Differences of all others from the first, by the others' names.

    Raises:
        UserError: fewer than two, or they were not measured alike; names what differs.
    """
    if len(folders) < 2:
        raise UserError(f"compare: got {len(folders)} evaluations; expected two at least")
    (first, tensors), *others = [read(folder) for folder in folders]
    for other, _ in others:
        _refuse_unlike(first, other)
    suite = Suite.model_validate(first.suite["settings"])
    resampling = suite.resampling.resampling()
    estimates: list[tuple[int, str, Estimate, bool]] = []
    for number, (other, other_tensors) in enumerate(others):
        for name, estimate, paired in _differences(first, tensors, other, other_tensors, resampling):
            estimates.append((number, name, estimate, paired))
    corrected = holm([estimate.p for _, _, estimate, _ in estimates])
    found: dict[str, list[Difference]] = {}
    for (number, name, estimate, paired), sure in zip(estimates, corrected, strict=True):
        other = others[number][0]
        key = f"{named(other)} against {named(first)}" + (f" ({number + 2})" if len(others) > 1 else "")
        found.setdefault(key, []).append(
            Difference(
                name, first.figures[name].value, other.figures[name].value, estimate.value, estimate.low, estimate.high,
                estimate.p, sure, paired, _verdict(name, estimate, sure),
            )
        )  # fmt: skip
    return found


def named(one: Evaluation) -> str:
    """What was evaluated, with the step of a run."""
    step = one.of.get("step")
    return str(one.of.get("name")) + ("" if step is None else f" at step {step}")


def _verdict(name: str, estimate: Estimate, corrected: float) -> str:
    if estimate.low <= 0 <= estimate.high:
        return NONE_SHOWN
    if corrected >= SURE:
        return f"{NONE_SHOWN} among so many figures"
    better, higher = better_of(name), estimate.value > 0
    if better is None:
        return "higher" if higher else "lower"
    return "better" if higher == (better == "higher") else "worse"


def _refuse_unlike(first: Evaluation, other: Evaluation) -> None:
    """Raises a UserError where two evaluations were not measured alike."""

    def fingerprints(of: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        return {name: one.get("fingerprint") for name, one in of.items()}

    def told(one: Evaluation) -> dict[str, Mapping[str, Any]]:
        return {
            "suites": {"suite": (one.suite.get("name"), one.suite.get("fingerprint"))},
            "reference sets": fingerprints(one.references),
            "prompts": {key: value for key, value in one.prompts.items() if value},
            "features": fingerprints(one.features),
            "numbers of samples": {key: figure.samples for key, figure in one.figures.items() if figure.real},
        }

    ours, others = told(first), told(other)
    for what, mine in ours.items():
        theirs = others[what]
        differing = [
            key for key in sorted({*mine, *theirs}) if key in mine and key in theirs and mine[key] != theirs[key]
        ]
        if what in ("suites", "reference sets"):
            differing += sorted({*mine} ^ {*theirs})
        if differing:
            key = differing[0]
            raise UserError(
                f"compare: {named(first)} and {named(other)} have different {what}: {key}: {mine.get(key, 'none')} and "
                f"{theirs.get(key, 'none')}; evaluate both by one suite on the same data"
            )


def _differences(
    first: Evaluation, a: Mapping[str, Tensor], other: Evaluation, b: Mapping[str, Tensor], resampling: Resampling
) -> list[tuple[str, Estimate, bool]]:
    """Each shared figure's difference, and whether it is of pairs, in the order of the first's figures."""
    found: dict[str, tuple[Estimate, bool]] = {}
    shared = [name for name in first.figures if name in other.figures]
    for name in shared:
        if (key := ROWS + name) in a and key in b:
            paired = _paired(first, other, name) and len(a[key]) == len(b[key])
            found[name] = resampling.mean_difference(a[key], b[key], paired), paired
    for entry in dict.fromkeys(name.rpartition("/")[0] for name in shared if ROWS + name not in a):
        names = [name.rpartition("/")[2] for name in shared if name.rpartition("/")[0] == entry]
        drawn = a[DRAWN + _features(a, entry)], b[DRAWN + _features(b, entry)]
        paired = _paired(first, other, f"{entry}/") and len(drawn[0]) == len(drawn[1])
        real = a[REAL + _features(a, entry)]
        estimates = resampling.differences(measure_of(names), *drawn, real, paired)
        found |= {f"{entry}/{name}": (estimate, paired) for name, estimate in estimates.items()}
    return [(name, *found[name]) for name in shared if name in found]


def _features(tensors: Mapping[str, Tensor], entry: str) -> str:
    """The name under which a figure's features are kept.

    Raises:
        UserError: they are not.
    """
    if DRAWN + entry not in tensors:
        raise UserError(f"compare: an evaluation has lost its features {entry!r}; evaluate again", code=5)
    return entry


def _paired(first: Evaluation, other: Evaluation, name: str) -> bool:
    """Whether rows of a figure belong together: the same prompts, data and noise."""
    section = next((one for one in SECTIONS if name.startswith(f"{one}/")), "samples")
    return first.paired.get(section) is not None and first.paired.get(section) == other.paired.get(section)


def table(found: Mapping[str, Sequence[Difference]]) -> str:
    """The differences as lines of text."""
    blocks = []
    for key, differences in found.items():
        rows: list[tuple[str, ...]] = [("figure", "first", "other", "difference", "interval", "", "")]
        rows += [
            (one.figure, f"{one.first:.4g}", f"{one.other:.4g}", f"{one.difference:+.4g}", f"{one.low:.4g} to {one.high:.4g}",
             one.verdict, "paired" if one.paired else "")
            for one in differences
        ]  # fmt: skip
        blocks.append(f"{key}:\n{lined_up(rows)}")
    return "\n\n".join(blocks)


def as_json(found: Mapping[str, Sequence[Difference]]) -> str:
    return json.dumps({key: [asdict(one) for one in differences] for key, differences in found.items()}, indent=1)
