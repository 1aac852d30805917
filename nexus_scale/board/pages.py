"""Pages of the board as named parts of HTML; a browser replaces those that have changed. All words from files are escaped."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import xxhash

from nexus_scale.board.studies import Study
from nexus_scale.board.watch import Listed
from nexus_scale.report.charts import COLOURS, number, sparkline
from nexus_scale.report.contents import Contents, Drawn, mark_of, results_of
from nexus_scale.report.curves import overlaid
from nexus_scale.report.evaluations import figures_of
from nexus_scale.report.meanings import meaning_of
from nexus_scale.report.sections import SHOWN, look, sections
from nexus_scale.run.runs import STATES, Summary

Parts = Mapping[str, str]
"""HTML of a page by the parts' names, in order."""

MOST_COMPARED = 8


@dataclass(frozen=True)
class Address:
    """Where the board serves a run's files: pictures and sounds of its samples, with a mark that changes when they do."""

    run: str

    def __call__(self, path: Path) -> str:
        mark = mark_of(path)
        version = "" if mark is None else f"?v={xxhash.xxh32_hexdigest(repr(mark).encode())}"
        return f"/run/{quote(self.run)}/samples/{quote(path.name)}{version}"


def mark(html: str) -> str:
    """A short name of a part's contents."""
    return xxhash.xxh64_hexdigest(html.encode())[:12]


# ------------------------------------------------------------------------------------------------- the list


def list_parts(rows: Sequence[Listed], studies: Sequence[Study], root: Path) -> Parts:
    """All runs of a root, a part each, and its studies."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.summary.state] = counts.get(row.summary.state, 0) + 1
    words = ", ".join(f"{count} {state}" for state, count in sorted(counts.items(), key=lambda one: -one[1]))
    head = (
        f'<header><p class="kind">nexus board</p><h1>{len(rows)} {"run" if len(rows) == 1 else "runs"}</h1>'
        f'<p class="summary">{escape(words) or "No run has been started here yet."} <code>{escape(str(root))}</code></p></header>'
    )
    return {
        "head": head,
        **{f"run-{row.summary.name}": _listed(row) for row in rows},
        **({"studies": _studies(studies)} if studies else {}),
    }


def _listed(row: Listed) -> str:
    run = row.summary
    name = escape(run.name, quote=True)
    link = f"/run/{quote(run.name)}"
    share = min(1.0, run.step / run.steps) if run.steps else 0.0
    facts = [
        ("loss", "training loss, last", "" if run.loss is None else number(run.loss)),
        ("validation", *(("", "") if row.validation is None else (row.validation[0], number(row.validation[1])))),
        ("samples/s", "", "" if row.samples_per_s is None else number(row.samples_per_s)),
        ("incidents", "", str(row.incidents) if row.incidents else ""),
    ]
    cells = "".join(
        f'<span class="fact" title="{escape(title, quote=True)}"><b>{escape(value)}</b> {words}</span>'
        if value
        else '<span class="fact"></span>'
        for words, title, value in facts
    )
    doing = f'<span class="now">{escape(run.doing)}</span>' if run.doing else ""
    incident = ""
    if run.incident is not None and run.state in ("failed", "stalled", "unreadable"):
        incident = (
            f'<span class="now">{escape(str(run.incident["kind"]))}: {escape(str(run.incident["message"]))}</span>'
        )
    return (
        f'<div class="run"><label class="pick"><input type="checkbox" name="run" value="{name}" aria-label="compare {name}"></label>'
        f'<a class="name" href="{link}"><b>{name}</b><small>{escape(row.family)}</small></a>{_state(run)}'
        f'<span class="steps"><span class="track"><i style="width:{100 * share:.1f}%"></i></span>'
        f"<small>{run.step:,} of {run.steps:,}</small></span>{sparkline(row.curve) or '<span class=spark></span>'}"
        f"{cells}{_ago(row.seen)}{doing}{incident}</div>"
    )


def _state(run: Summary) -> str:
    words = STATES.get(run.state, "its folder cannot be read")
    return f'<span class="state {escape(run.state)}" title="{escape(words, quote=True)}">{escape(run.state)}</span>'


def _ago(at: float | None) -> str:
    """A moment; the page's script says how long ago it is."""
    if at is None:
        return '<span class="ago"></span>'
    words = time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
    return f'<time class="ago" data-at="{at:.0f}" title="{words}">{words}</time>'


def _studies(studies: Sequence[Study]) -> str:
    cards = "".join(
        f'<section class="card"><header><h3>{escape(one.name)}</h3><span>{one.answers:,} answers of {one.raters} raters</span></header>'
        f'<p class="note">{escape(" · ".join(one.systems))}</p><p class="note">{escape(", ".join(one.questions))}</p>'
        f'<p class="note"><code>nexus study report {escape(str(one.folder))}</code></p></section>'
        for one in studies
    )
    return f'<h2>Studies</h2><div class="cards">{cards}</div>'


# ------------------------------------------------------------------------------------------------- one run


def run_parts(contents: Contents, summary: Summary) -> Parts:
    """The parts of report.html, with the run's state above them and a slider over its samples."""
    made = sections(contents, results_of(contents, {}), Address(contents.name))
    steps = f"step {summary.step:,} of {summary.steps:,}" if summary.steps else ""
    seen = None if summary.age_s is None else time.time() - summary.age_s
    # Heartbeats come every second: the moment is rounded, or the part would change with each.
    state = (
        f'<p class="live">{_state(summary)} <span>{steps}</span> {_ago(None if seen is None else seen // 30 * 30)}</p>'
    )
    parts = {}
    for name, html in made.items():
        parts[name] = over_time(contents) if name == "drawn" else html
        if name == "head":
            parts["live"] = state
    return parts


def over_time(contents: Contents) -> str:
    """All pictures and sounds of a run's samples behind a slider, the newest shown."""
    if len(contents.drawn) < 2:
        return ""
    source = Address(contents.name)
    steps = "".join(_step(one, source) for one in contents.drawn)
    last = contents.drawn[-1]
    shown = (
        ""
        if last.picture is None
        else f'<img src="{source(last.picture)}" alt="{_captions(last)}" style="image-rendering:{look(last)}">'
    )
    count = len(contents.drawn)
    return (
        f"<h2>Samples over time <small>the same prompts and noise each time</small></h2>"
        f'<div class="over-time card"><label><input type="range" min="0" max="{count - 1}" value="{count - 1}" step="1" '
        f'aria-label="step of the samples"><output>step {last.step}</output></label>'
        f'<div class="shown">{shown}<ul class="tiles sounds"></ul></div><ol hidden>{steps}</ol></div>'
    )


def _step(one: Drawn, source: Address) -> str:
    picture = "" if one.picture is None else f' data-picture="{source(one.picture)}" data-alt="{_captions(one)}"'
    sounds = "".join(f'<li data-sound="{source(path)}">{escape(caption)}</li>' for caption, path in one.sounds)
    return f'<li data-step="{one.step}"{picture}><ul>{sounds}</ul></li>'


def _captions(one: Drawn) -> str:
    return escape(f"Samples after {one.step} steps: " + ", ".join(map(str, one.words["captions"])), quote=True)


# ------------------------------------------------------------------------------------------------- several runs


def compare_parts(runs: Mapping[str, tuple[Contents, Summary]], missing: Sequence[str], *, by_time: bool) -> Parts:
    """Curves of several runs over each other, their figures and scores beside each other, and their newest samples."""
    rows = {
        name: {"metrics": one.metrics, "validation": one.validation, "monitor": one.monitor}
        for name, (one, _) in runs.items()
    }
    charts = "".join(overlaid(rows, by_time=by_time))
    other = urlencode([*(("run", name) for name in runs), *([] if by_time else [("by", "time")])])
    axis = f'by {"time" if by_time else "step"}, <a href="/compare?{escape(other)}">by {"step" if by_time else "time"} instead</a>'
    names = "".join(
        f'<li><i style="background:var(--{_colour(i)})"></i><a href="/run/{quote(name)}">{escape(name)}</a> {_state(summary)}</li>'
        for i, (name, (_, summary)) in enumerate(runs.items())
    )
    gone = f'<p class="note">Not here: {escape(", ".join(missing))}</p>' if missing else ""
    return {
        "head": f'<header><p class="kind">comparison</p><h1>{len(runs)} runs</h1><ul class="key runs">{names}</ul>{gone}</header>',
        "curves": f'<h2>Curves <small>{axis}</small></h2><div class="cards">{charts}</div>' if charts else "",
        "figures": _figures(runs),
        "samples": _beside(runs),
    }


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _figures(runs: Mapping[str, tuple[Contents, Summary]]) -> str:
    """Figures and scores of several runs, a column each; the best of a score whose better direction is known is bold."""
    results = {name: results_of(contents, {}) for name, (contents, _) in runs.items()}
    lines = [
        _line(words, [results[name].get(key) for name in runs], show, _better(key))
        for key, words, show in (*SHOWN, ("steps", "steps", "{:,}".format), ("workers", "workers", str))
    ]
    found = {name: figures_of(contents.evaluations) for name, (contents, _) in runs.items()}
    for figure in dict.fromkeys(key for one in found.values() for key in one):
        values = [found[name].get(figure) for name in runs]
        better = next((one.better for one in values if one is not None), None)
        lines.append(_line(figure, [None if one is None else one.value for one in values], number, better))
    heads = "".join(f"<th>{escape(name)}</th>" for name in runs)
    body = "".join(lines)
    return (
        f'<h2>Figures</h2><section class="card"><div class="scroll"><table class="beside"><tr><th></th>{heads}</tr>{body}</table></div>'
        '<p class="note">Whether a difference is more than chance: <code>nexus compare A B</code></p></section>'
        if body
        else ""
    )


def _better(name: str) -> str | None:
    meaning = meaning_of(name)
    return None if meaning is None else meaning.better


def _line(words: str, values: Sequence[Any], show: Any, better: str | None) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    best = None
    if better and len(known) > 1:
        best = max(known) if better == "higher" else min(known)
    cells = "".join(
        f"<td>{'' if value is None else _bold(escape(str(show(value))), best is not None and value == best)}</td>"
        for value in values
    )
    return f"<tr><th>{escape(words)}</th>{cells}</tr>"


def _bold(words: str, best: bool) -> str:
    return f'<b title="the best of these">{words}</b>' if best else words


def _beside(runs: Mapping[str, tuple[Contents, Summary]]) -> str:
    """The newest picture of each run."""
    shown = [
        f'<figure><img src="{Address(name)(last.picture)}" alt="{_captions(last)}" loading="lazy" style="image-rendering:{look(last)}">'
        f'<figcaption><i style="background:var(--{_colour(i)})"></i>{escape(name)}, step {last.step}</figcaption></figure>'
        for i, (name, (contents, _)) in enumerate(runs.items())
        if contents.pictures and (last := contents.pictures[-1]).picture is not None
    ]
    return f'<h2>Newest samples</h2><div class="strip wide">{"".join(shown)}</div>' if shown else ""


__all__ = ["MOST_COMPARED", "Address", "Parts", "compare_parts", "list_parts", "mark", "run_parts"]
