"""What follows from a study's answers: scores with intervals, agreement, who beats whom, prompt by prompt; as values, text and a page."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from nexus_scale.contracts import UserError
from nexus_scale.io.durable import atomic_write
from nexus_scale.metrics.agreement import alpha_of_pairs
from nexus_scale.metrics.bradley_terry import PRIOR, strengths
from nexus_scale.report.charts import percent, table
from nexus_scale.report.page import framed
from nexus_scale.study.answers import Answers, Judgement, checked, failing
from nexus_scale.study.folder import Study

REDRAWN = 1000
"""Bootstrap samples."""
INTERVAL = (2.5, 97.5)
"""Percentiles."""
CHOICES = ("first", "second", "tie")

METHOD = (
    "Scores are logarithms of strength by Bradley and Terry's model, with mean 0: a system that is 1 ahead wins e = 2.7 times as often as "
    f"it loses. {{ties}} Each two systems begin with {PRIOR:g} comparison spread over the outcomes. Intervals hold 95 % of {REDRAWN} "
    "redraws of raters (bootstrap); those of fewer than a dozen raters are too narrow. Agreement is Krippendorff's alpha: 1 throughout, "
    "0 by chance."
)
TIES = "Ties are an outcome of their own (Davidson's model)."
NO_TIES = "There were no ties to choose."


def report_of(study: Study) -> dict[str, Any]:
    """All figures of a study, as JSON values.

    Raises:
        UserError: nobody has judged a pair yet, or nobody whose judgements count.
    """
    answers = Answers(study)
    try:
        judged = list(answers.judgements())
    finally:
        answers.close()
    if not any(one.kind == "pair" for one in judged):
        raise UserError(
            f"{study.folder}: nobody has judged a pair yet; `nexus study serve {study.folder}` shows them to people",
            code=3,
        )
    tried = checked(judged)
    excluded = failing(study, tried)
    counted = [one for one in judged if one.kind == "pair" and one.rater not in excluded]
    if not counted:
        raise UserError(f"{study.folder}: all {len(excluded)} raters failed the checks: no judgement counts", code=3)
    each = Counter(one.item for one in counted)
    wanted = study.settings.judgements
    sides = [
        ("left" if (c == "first") is not one.swapped else "right")
        for one in counted
        for c in one.choices.values()
        if c != "tie"
    ]
    return {
        "study": study.folder.name,
        "fingerprint": study.fingerprint,
        "kind": study.settings.kind,
        "systems": study.samples.systems,
        "drawn": study.settings.drawn,
        "loudness": study.settings.loudness,
        "pairs": len(study.pairs),
        "judgements": len(counted),
        "wanted": wanted * len(study.pairs),
        "pairs_with_fewer": sum(each[item] < wanted for item in range(len(study.pairs))),
        "raters": len({one.rater for one in counted}),
        "excluded": [
            {"rater": rater, "passed": sum(tried[rater]), "checks": len(tried[rater])} for rater in sorted(excluded)
        ],
        "excluded_judgements": sum(one.kind == "pair" and one.rater in excluded for one in judged),
        "checks": {"passed": sum(map(sum, tried.values())), "of": sum(map(len, tried.values()))},
        "median_seconds": statistics.median(one.seconds for one in counted),
        "left_share": sides.count("left") / len(sides) if sides else None,
        "questions": [_question(study, one.name, one.text, counted) for one in study.settings.questions],
        "method": METHOD.format(ties=TIES if study.settings.ties else NO_TIES),
    }


def _question(study: Study, name: str, text: str, counted: Sequence[Judgement]) -> dict[str, Any]:
    systems = study.samples.systems
    raters = {rater: row for row, rater in enumerate(sorted({one.rater for one in counted}))}
    wins = np.zeros((len(raters), len(systems), len(systems)))
    ties = np.zeros_like(wins)
    units = np.zeros((len(study.pairs), len(CHOICES)))
    prompts: dict[int, Counter[str]] = defaultdict(Counter)
    for one in counted:
        pair, choice = study.pairs[one.item], one.choices[name]
        units[one.item, CHOICES.index(choice)] += 1
        row, (won, lost) = (
            raters[one.rater],
            (pair.first, pair.second) if choice != "second" else (pair.second, pair.first),
        )
        if choice == "tie":
            ties[row, won, lost] += 1
            ties[row, lost, won] += 1
        else:
            wins[row, won, lost] += 1
        prompts[pair.group]["" if choice == "tie" else systems[won]] += 1
    return {
        "name": name,
        "text": text,
        "judgements": len(counted),
        **scores_of(systems, wins, ties if study.settings.ties else None, study.settings.seed),
        "wins": wins.sum(0).astype(int).tolist(),
        "ties": ties.sum(0).astype(int).tolist(),
        "agreement": _or_none(alpha_of_pairs(units)),
        "prompts": [
            {
                "name": group.name,
                "prompt": group.prompt,
                "ties": prompts[i][""],
                "wins": [prompts[i][system] for system in systems],
            }
            for i, group in enumerate(study.samples.groups)
        ],
    }


def scores_of(systems: Sequence[str], wins: np.ndarray, ties: np.ndarray | None, seed: int) -> dict[str, Any]:
    """Scores and their differences, with intervals where there are raters to redraw.

    In 200 simulated studies of three systems, four judgements of every two by each rater, intervals of 95 % held 94 % of the true scores
    with 16 and with 50 raters, and 86 % with 8.

    Args:
        wins, ties: of each rater, (R, S, S), see `strengths`.
    """
    whole = strengths(wins.sum(0), None if ties is None else ties.sum(0))
    count = len(wins)
    redraws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), REDRAWN).astype(np.float64)
    again = strengths(_weighed(redraws, wins), None if ties is None else _weighed(redraws, ties)).scores

    def interval(values: np.ndarray) -> dict[str, float | None]:
        low, high = np.percentile(values, INTERVAL) if count > 1 else (None, None)
        return {"low": None if low is None else float(low), "high": None if high is None else float(high)}

    order = sorted(range(len(systems)), key=lambda i: -whole.scores[i])
    return {
        "tie_strength": None if ties is None else math.exp(float(whole.ties)),
        "scores": [{"system": systems[i], "score": float(whole.scores[i]), **interval(again[:, i])} for i in order],
        "differences": [
            {
                "better": systems[i],
                "than": systems[j],
                "difference": float(whole.scores[i] - whole.scores[j]),
                **interval(again[:, i] - again[:, j]),
                "chance": float(whole.beats()[i, j]),
            }
            for place, i in enumerate(order)
            for j in order[place + 1 :]
        ],
    }


def _weighed(redraws: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.asarray(np.tensordot(redraws, counts, 1))


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ------------------------------------------------------------------------------------------------- shown


def write_report(study: Study) -> dict[str, Any]:
    """Writes report.json and report.html into the study's folder; returns the figures."""
    found = report_of(study)
    atomic_write(study.folder / "report.json", json.dumps(found, indent=1, ensure_ascii=False))
    atomic_write(study.folder / "report.html", page(found))
    return found


def text(found: Mapping[str, Any]) -> str:
    """The figures for a terminal."""
    lines = [_summary(found)]
    for question in found["questions"]:
        lines += ["", f"{question['text']} ({question['name']}; agreement {_alpha(question['agreement'])})"]
        lines += _aligned(_score_rows(question))
        lines += ["", *_aligned(_difference_rows(question))]
        lines += ["", *_aligned(_matrix(found["systems"], question))]
    return "\n".join([*lines, "", found["method"]])


def _summary(found: Mapping[str, Any]) -> str:
    words = [
        f"{found['judgements']} judgements of {found['pairs']} pairs by {found['raters']} raters, "
        f"{found['median_seconds']:.1f} s each (median)"
    ]
    if found["pairs_with_fewer"]:
        words.append(f"{found['pairs_with_fewer']} pairs have fewer than wanted")
    if found["checks"]["of"]:
        words.append(f"checks passed: {found['checks']['passed']} of {found['checks']['of']}")
    if found["excluded"]:
        words.append(
            f"{len(found['excluded'])} raters failed theirs and are left out, with {found['excluded_judgements']} judgements"
        )
    if found["left_share"] is not None:
        words.append(f"the left side won {percent(found['left_share'])} of choices")
    return "; ".join(words) + "."


def _alpha(value: float | None) -> str:
    return "unknown: too few answers about the same pairs" if value is None else f"{value:.3f}"


def _interval(row: Mapping[str, Any]) -> str:
    return "one rater: no interval" if row["low"] is None else f"{row['low']:+.2f} to {row['high']:+.2f}"


def _score_rows(question: Mapping[str, Any]) -> list[list[str]]:
    rows = [[one["system"], f"{one['score']:+.2f}", _interval(one)] for one in question["scores"]]
    return [["system", "score", "95 %"], *rows]


def _difference_rows(question: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for one in question["differences"]:
        sure = one["low"] is not None and one["low"] > 0
        rows.append([
            f"{one['better']} over {one['than']}", f"{one['difference']:+.2f}", _interval(one), percent(one["chance"]),
            "yes" if sure else "not shown",
        ])  # fmt: skip
    return [["difference", "score", "95 %", "wins, ties left out", "better"], *rows]


def _matrix(systems: Sequence[str], question: Mapping[str, Any]) -> list[list[str]]:
    wins, ties = question["wins"], question["ties"]

    def cell(i: int, j: int) -> str:
        tied = f" ({ties[i][j]} ties)" if ties[i][j] else ""
        return "" if i == j else f"{wins[i][j]} : {wins[j][i]}{tied}"

    rows = [[one, *(cell(i, j) for j in range(len(systems)))] for i, one in enumerate(systems)]
    return [["won : lost", *systems], *rows]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def page(found: Mapping[str, Any]) -> str:
    """The figures as one HTML file without script or network, in the style of a run's report."""
    head = f'<p class="kind">human study</p><h1>{escape(found["study"])}</h1><p class="summary">{escape(_summary(found))}</p>'
    excluded = _excluded_part(found["excluded"])
    parts = [
        f"<header>{head}</header>",
        *(_question_part(found["systems"], one) for one in found["questions"]),
        excluded,
    ]
    footer = f"<footer>{escape(found['method'])}</footer>"
    return framed(f"Study {found['study']}", "\n".join([*parts, footer]))


def _question_part(systems: Sequence[str], question: Mapping[str, Any]) -> str:
    agreement = f"{question['judgements']} judgements, agreement {_alpha(question['agreement'])}"
    judged = [one for one in question["prompts"] if any(one["wins"]) or one["ties"]]
    prompts = [[one["prompt"] or one["name"], *map(str, one["wins"]), str(one["ties"])] for one in judged]
    return "\n".join([
        f"<h2>{escape(question['text'])}<small>{escape(agreement)}</small></h2>",
        _bars(question["scores"]),
        _titled("Differences", _difference_rows(question)),
        _titled("Who won over whom", _matrix(systems, question)),
        _titled("Prompt by prompt", [["prompt", *systems, "ties"], *prompts]),
    ])  # fmt: skip


def _titled(title: str, rows: Sequence[Sequence[str]]) -> str:
    return f"<h3>{escape(title)}</h3>{table(rows[0], rows[1:])}"


def _excluded_part(excluded: Iterable[Mapping[str, Any]]) -> str:
    rows = [[f"rater {one['rater']}", f"{one['passed']} of {one['checks']}"] for one in excluded]
    return _titled("Raters who are left out", [["rater", "checks passed"], *rows]) if rows else ""


def _bars(scores: Sequence[Mapping[str, Any]]) -> str:
    """Scores as marks within their intervals, on one scale."""
    values = [value for one in scores for value in (one["score"], one["low"], one["high"]) if value is not None]
    low, high = min(values), max(values)
    room = (high - low) or 1.0

    def place(value: float) -> float:
        return 2 + 94 * (value - low) / room

    rows = []
    for one in scores:
        begin, end = (place(one["score"] if one[key] is None else one[key]) for key in ("low", "high"))
        mark = f"left:{place(one['score']):.2f}%;top:0;width:4px;height:100%;position:absolute;background:var(--ink)"
        span = f"margin-left:{begin:.2f}%;width:{max(end - begin, 0.5):.2f}%;background:var(--a)"
        track = f'<span class="track" style="position:relative"><i style="{span}"></i><i style="{mark}"></i></span>'
        rows.append(
            f'<span>{escape(one["system"])}</span>{track}<span class="value">{one["score"]:+.2f} ({_interval(one)})</span>'
        )
    return f'<div class="rows">{"".join(rows)}</div>'
