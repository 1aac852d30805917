"""The parts of a run's page, as HTML: for the report, which holds its pictures itself, and for the board, which links to them.

Everything that comes from data or recipes is escaped.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from nexus_scale.callbacks.metrics import duration
from nexus_scale.io import incidents, stages
from nexus_scale.report.charts import bars, gibibytes, number, percent, stacked
from nexus_scale.report.contents import Contents, Drawn
from nexus_scale.report.curves import curves
from nexus_scale.report.evaluations import evaluation_section
from nexus_scale.report.meanings import MEANINGS, PLAIN, beside_of, explained

Source = Callable[[Path], str]
"""The address of a picture or sound: its bytes (`embedded`), or where the board serves it."""

MOST_PICTURES = 12
"""Largest number of pictures; of more, an even selection is shown, with a note."""

MOST_INCIDENTS = 100

NARROW_TILE, WIDE_TILE = 92, 230
"""Pixels of the page: the least widths of tiles, by what stands below them and how large they are."""

MOST_ACROSS = 6
"""Figures in a row at the top of the page."""

PIXELATED_BELOW = 200
"""Pixels. Larger samples are smoothed where the page shrinks them."""


def sections(contents: Contents, results: Mapping[str, Any], source: Source) -> dict[str, str]:
    """All parts of the page by name, in order; of those that a run has nothing for, an empty text."""
    return {
        "head": head(contents, results),
        "figures": figures(results),
        "samples": last_samples(contents, source),
        "scores": score_section(contents),
        "evaluations": evaluation_section(contents.evaluations),
        "drawn": samples_in_time(contents, source),
        "nearest": nearest_training_samples(contents, source),
        "curves": curves(contents.metrics, contents.validation, contents.monitor, contents.evaluated),
        "time": time_section(contents, results),
        "incidents": incident_section(contents),
        "ran": what_ran(contents),
    }


def embedded(path: Path) -> str:
    """A file as a `data:` address."""
    kind = {".png": "image/png", ".wav": "audio/wav"}[path.suffix]
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"


def head(contents: Contents, results: Mapping[str, Any]) -> str:
    objective = contents.recipe.get("objective") or {}
    networks = [spec for spec in (contents.recipe.get("networks") or {}).values() if isinstance(spec, dict)]
    parts = [spec.get("name") for spec in networks] + [
        objective.get("name") if isinstance(objective, dict) else objective
    ]
    family = " · ".join(str(part) for part in parts if part)
    words = []
    if results["steps"] is not None:
        batch = contents.recipe.get("global_batch")
        words.append(f"{results['steps']} steps" + (f" of {batch} samples" if batch else ""))
    if results["workers"] is not None:
        words.append(f"{_words(results['workers'])} worker{'' if results['workers'] == 1 else 's'}")
    precision = (contents.environment.get("choices") or {}).get("precision") or contents.cluster.get("precision")
    if precision:
        words.append(str(precision))
    if results["wall_seconds"] is not None:
        words.append(duration(results["wall_seconds"]))
    return (
        f'<header><p class="kind">{escape(family) or "training run"}</p><h1>{escape(contents.name)}</h1>'
        f'<p class="summary">{escape(", ".join(words)) or "Nothing has been measured yet."}</p></header>'
        + ("" if contents.doing is None else under_way(contents.doing))
    )


def under_way(doing: stages.Doing) -> str:
    """What the run does besides training, and how far it is."""
    filled = "" if doing.share is None else f'<i style="width:{100 * doing.share:.1f}%"></i>'
    return f'<p class="doing"><span>{escape(stages.words_of(doing))}</span><span class="track">{filled}</span></p>'


SHOWN: Sequence[tuple[str, str, Callable[[Any], str]]] = (
    ("group_accuracy", "samples of the prompted group", percent),
    ("real_accuracy", "the same classifier on real images", percent),
    ("wer", "words heard wrong", percent),
    ("similarity", "likeness to the voice", number),
    ("validation_loss_ratio", "validation loss over zero's", number),
    ("frechet", "Fréchet distance of samples", number),
    ("loss", "training loss, last", number),
    ("samples_per_s", "samples per second", number),
    ("wall_seconds", "time in all", duration),
    ("effective_training_time", "effective training time", percent),
    ("peak_memory_bytes", "peak memory", gibibytes),
)
"""Figures of results.json at the top of the page: name, words, how the value is written."""


def figures(results: Mapping[str, Any]) -> str:
    cells = [
        f"<div><b>{show(results[key])}</b><span>{words}</span></div>"
        for key, words, show in SHOWN
        if results.get(key) is not None
    ]
    rows = -(-len(cells) // MOST_ACROSS)
    # As many in each row as in the others, so that no row ends in a gap.
    across = -(-len(cells) // rows) if rows else 1
    return f'<div class="figures" style="--across:{across}">{"".join(cells)}</div>' if cells else ""


def last_samples(contents: Contents, source: Source) -> str:
    """The newest picture, cut into tiles with their captions by style alone; or the newest sounds."""
    if contents.sounds:
        tiles = "".join(
            f"<li><audio controls preload=none src='{source(path)}'></audio><p>{escape(caption)}</p></li>"
            for caption, path in contents.sounds
        )
        seen = _picture(contents.pictures[-1], source) if contents.pictures else ""
        return f'<h2>Samples</h2><ul class="tiles" style="--least:{WIDE_TILE}px">{tiles}</ul>{seen}'
    if not contents.pictures:
        return ""
    newest = contents.pictures[-1]
    heading = f"<h2>Samples <small>after {newest.step} steps</small></h2>"
    if not {"columns", "width", "height", "pad"} <= set(newest.words):
        return heading + _picture(newest, source)
    return heading + _tiles(newest, source)


def _tiles(drawn: Drawn, source: Source) -> str:
    assert drawn.picture is not None
    width, height = drawn.size
    w, h, pad, columns = (int(drawn.words[key]) for key in ("width", "height", "pad", "columns"))
    items = []
    captions = [str(caption) for caption in drawn.words["captions"]]
    for i, caption in enumerate(captions):
        # A background position in percent refers to the difference between picture and box.
        x = 100 * (pad + i % columns * (w + pad)) / max(1, width - w)
        y = 100 * (pad + i // columns * (h + pad)) / max(1, height - h)
        label = escape(caption, quote=True)
        items.append(
            f'<li><div class="tile" role="img" aria-label="{label}" style="background-position:{x:.3f}% {y:.3f}%"></div><p>{label}</p></li>'
        )
    # Captions are shown whole: five lines or so of the longest, if the page has room.
    room = max(map(len, captions), default=0) * 6.4 / 5
    least = min(WIDE_TILE, max(NARROW_TILE, room, min(w, 180) * max(1.0, w / h)))
    style = (
        f"--least:{least:.0f}px;--shape:{w}/{h};--size:{100 * width / w:.3f}% {100 * height / h:.3f}%;"
        f"--look:{look(drawn)};--sheet:url({source(drawn.picture)})"
    )
    return f'<ul class="tiles" style="{style}">{"".join(items)}</ul>'


def look(drawn: Drawn) -> str:
    """How a browser shows these samples larger or smaller than they are, for `image-rendering`."""
    return "pixelated" if int(drawn.words.get("width", drawn.size[0])) < PIXELATED_BELOW else "auto"


def samples_in_time(contents: Contents, source: Source) -> str:
    count = len(contents.pictures)
    if count < 2:
        return ""
    chosen = (
        sorted({round(i * (count - 1) / (MOST_PICTURES - 1)) for i in range(MOST_PICTURES)})
        if count > MOST_PICTURES
        else range(count)
    )
    note = (
        "" if len(chosen) == count else f'<p class="note">{len(chosen)} of {count} pictures; all are in samples/.</p>'
    )
    heading = "Learning to sound" if contents.sounds else "Learning to draw"
    return (
        f"<h2>{heading} <small>the same prompts and noise each time</small></h2>"
        f'<div class="strip">{"".join(_picture(contents.pictures[i], source) for i in chosen)}</div>{note}'
    )


def nearest_training_samples(contents: Contents, source: Source) -> str:
    """The newest samples that lie nearest to training samples, each beside its own: what memorisation looks like."""
    if not contents.nearest:
        return ""
    newest = contents.nearest[-1]
    said = f"after {newest.step} steps; to the right of each sample the training sample that it is nearest to"
    return f"<h2>Nearest training samples <small>{said}</small></h2>{_tiles(newest, source)}"


def _picture(drawn: Drawn, source: Source) -> str:
    assert drawn.picture is not None
    alt = escape(f"Samples after {drawn.step} steps: " + ", ".join(map(str, drawn.words["captions"])), quote=True)
    image = f'<img src="{source(drawn.picture)}" alt="{alt}" style="image-rendering:{look(drawn)}">'
    return f"<figure>{image}<figcaption>step {drawn.step}</figcaption></figure>"


def score_section(contents: Contents) -> str:
    """Scores, each explained; groups and confusion; and how it was scored."""
    cards = "".join(_scored(scores) for scores in (contents.scores, *contents.more_scores))
    return f'<h2>Scores</h2><div class="cards">{cards}</div>' if cards else ""


def _scored(scores: Mapping[str, Any]) -> str:
    scores, cards = dict(scores), []
    groups = {name: value for name, value in (scores.get("groups") or {}).items() if value is not None}
    if len(groups) > 1:
        scores["chance"] = 1 / len(groups)
    known = [name for name in MEANINGS if isinstance(scores.get(name), int | float)]
    told = {"groups", "confusion", "counts", "chance", *known}
    told |= {key for name in known for key in beside_of(name, scores)}
    rest = {key: value for key, value in scores.items() if key not in told and not isinstance(value, bool)}
    how = {_named(key): PLAIN[key][1](value) if key in PLAIN else value for key, value in rest.items()}
    if known or how:
        cards.append(_card("What was measured", "".join(explained(name, scores) for name in known) + _how(how)))
    if scores.get("counts") is False:
        words = "The classifier knows too few of the real samples, so its score of the drawn ones does not count."
        cards.append(_card("The score does not count", f'<p class="note">{words}</p>'))
    if groups:
        note = (
            f"Share of each group's samples that the classifier finds in it; guessing finds {percent(1 / len(groups))}."
        )
        cards.append(_card("Found in their group", f'{bars(groups, percent, 1.0)}<p class="note">{note}</p>'))
    if scores.get("confusion"):
        note = "A row is what was asked for, a column what the classifier took it for: the more on the diagonal, the better."
        matrix = f'<div class="scroll">{_matrix(scores["confusion"])}</div><p class="note">{note}</p>'
        cards.append(_card("Prompted, found as", matrix))
    return "".join(cards)


def _how(values: Mapping[str, Any]) -> str:
    """How it was scored, and scores without a meaning of their own."""
    parts = "".join(f"<li>{escape(name)} <b>{escape(_words(value))}</b></li>" for name, value in values.items())
    return f'<div class="score"><ul>{parts}</ul></div>' if parts else ""


def _named(key: str) -> str:
    return PLAIN[key][0] if key in PLAIN else key.replace("_", " ")


def _card(title: str, body: str, words: str = "") -> str:
    beside = f"<span>{words}</span>" if words else ""
    return f'<section class="card"><header><h3>{escape(title)}</h3>{beside}</header>{body}</section>'


def _matrix(confusion: Mapping[str, Any]) -> str:
    """`labels` and `matrix`: [prompted][found as] counts, each shaded by its share of the row. Names of columns stand upright."""
    names, rows = [str(name) for name in confusion["labels"]], confusion["matrix"]
    body = []
    for name, row in zip(names, rows, strict=True):
        total = sum(row) or 1
        cells = "".join(
            f'<td style="background:color-mix(in srgb, var(--a) {60 * value / total:.0f}%, transparent)">{int(value)}</td>'
            for value in row
        )
        body.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    top = "".join(f"<th><span>{escape(name)}</span></th>" for name in names)
    return f'<table class="matrix"><tr><th></th>{top}</tr>{"".join(body)}</table>'


def time_section(contents: Contents, results: Mapping[str, Any]) -> str:
    cards = []
    if contents.account is not None and contents.account.effective is not None:
        kept = contents.account
        words = f"{percent(results['effective_training_time'])} productive of {duration(kept.wall)}"
        words += f", attempts: {kept.attempts}" + (f", paused for {duration(kept.away)}" if kept.away >= 1 else "")
        spent = stacked({name: seconds for name, seconds in kept.parts.items() if seconds > 0})
        cards.append(
            f'<section class="card"><header><h3>Effective training time</h3><span>{words}</span></header>{spent}</section>'
        )
    by_stage: dict[str, float] = {}
    for stage in results["stages"]:
        by_stage[stage["name"]] = by_stage.get(stage["name"], 0.0) + stage["seconds"]
    if by_stage:
        body = bars(by_stage, duration)
        cards.append(
            f'<section class="card"><header><h3>By stage</h3><span>{duration(sum(by_stage.values()))}</span></header>{body}</section>'
        )
    inside = contents.inside
    if inside:
        ordered = dict(sorted(inside.items(), key=lambda item: -item[1]))
        total = duration(sum(inside.values()))
        cards.append(
            f'<section class="card"><header><h3>Inside training</h3><span>{total}</span></header>{stacked(ordered)}</section>'
        )
    return f'<h2>Time</h2><div class="cards">{"".join(cards)}</div>' if cards else ""


def incident_section(contents: Contents) -> str:
    """The newest incidents as a table, newest first."""
    if not contents.incidents:
        return ""
    shown = list(reversed(contents.incidents))[:MOST_INCIDENTS]
    rows = "".join(
        f"<tr><td>{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(float(row['at'])))}</td>"
        f"<td>{escape(str(row['kind']))}</td><td>{escape(_words(row.get('step', '')))}</td>"
        f"<td>{escape(_words(row.get('rank', '')))}</td><td>{escape(str(row['message']))}</td></tr>"
        for row in shown
    )
    rest = len(contents.incidents) - len(shown)
    note = f'<p class="note">{rest} older ones are in {incidents.FILE}.</p>' if rest else ""
    return (
        f"<h2>Incidents <small>{len(contents.incidents)}</small></h2>"
        '<section class="card"><div class="scroll"><table><tr><th>at</th><th>kind</th><th>step</th><th>rank</th><th>what</th></tr>'
        f"{rows}</table></div>{note}</section>"
    )


def what_ran(contents: Contents) -> str:
    environment = contents.environment
    versions = {
        **(environment.get("versions") or {}),
        **{key: environment[key] for key in ("commit", "device") if key in environment},
    }
    cards = []
    if versions:
        cards.append(f'<section class="card"><header><h3>Versions</h3></header>{_table(versions)}</section>')
    kernels = environment.get("kernels")
    if isinstance(kernels, dict) and kernels:
        table = {
            name: f"{made.get('kernel')} ({made['why']})" if isinstance(made, dict) and made.get("why") else made
            for name, made in kernels.items()
        }
        cards.append(f'<section class="card"><header><h3>Kernels</h3></header>{_table(table)}</section>')
    choices = environment.get("choices")
    if isinstance(choices, dict):
        shown = {key: value for key, value in choices.items() if key not in ("kernels", "trials")}
        if shown:
            cards.append(
                f'<section class="card"><header><h3>Chosen at the first start</h3></header>{_table(shown)}</section>'
            )
    if contents.texts:
        files = "".join(
            f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>"
            for name, text in contents.texts.items()
        )
        cards.append(f'<section class="card">{files}</section>')
    return f'<h2>What ran</h2><div class="cards">{"".join(cards)}</div>' if cards else ""


def _table(values: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(_words(value))}</td></tr>" for key, value in values.items()
    )
    return f"<table>{rows}</table>"


def _words(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    if isinstance(value, list | tuple):
        return " to ".join(map(str, value)) if len(value) == 2 else ", ".join(map(str, value))
    return "not set" if value is None else str(value)
