"""`report.html` of a run: one file that needs no network and no script; and `results.json` with the same figures.

Shows whatever the run folder has. Everything that comes from data or recipes is escaped; the page's own policy forbids scripts.
"""

from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Annotated, Any

from pydantic import BaseModel, Field, FiniteFloat, ValidationError

from nexus_scale.callbacks.goodput import Account, account
from nexus_scale.callbacks.metrics import duration
from nexus_scale.config.plain_yaml import parse_yaml
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.io import incidents
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_json import is_number, read_json_or
from nexus_scale.io.rows import read_rows
from nexus_scale.report.charts import Line, bars, chart, gibibytes, number, percent, stacked
from nexus_scale.report.curves import curves, newest

__all__ = ["Line", "chart", "write_report"]

log = logging.getLogger(__name__)

MOST_PICTURES = 12
"""Largest number of pictures; of more, an even selection is shown, with a note."""

MOST_INCIDENTS = 100


# ------------------------------------------------------------------------------------------------ contents


@dataclass(frozen=True)
class Contents:
    """The contents of a run folder that its report shows; missing parts are empty."""

    name: str
    metrics: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    monitor: list[dict[str, Any]]
    recipe: dict[str, Any]
    cluster: dict[str, Any]
    environment: dict[str, Any]
    scores: dict[str, Any]
    stages: list[dict[str, Any]]
    pictures: list[tuple[dict[str, Any], bytes]]
    sounds: list[tuple[str, bytes]]
    texts: dict[str, str]
    account: Account | None = None
    incidents: Sequence[Mapping[str, Any]] = ()


class Stage(BaseModel):
    """An entry of stages.json."""

    name: str
    seconds: FiniteFloat = Field(ge=0, lt=1e12)


class Confusion(BaseModel):
    """The confusion in scores.json: `matrix[prompted][found as]`, counts."""

    labels: list[str]
    matrix: list[list[Annotated[int, Field(ge=0, lt=2**53)]]]


_Pixels = Annotated[int, Field(ge=0, lt=2**24)]


class Described(BaseModel):
    """`samples/step_<n>.json`: what the picture or sounds of the same name show."""

    step: Annotated[int, Field(ge=0, lt=2**53)]
    captions: list[str]
    audio: list[str] | None = None
    columns: Annotated[int, Field(ge=1, lt=2**24)] | None = None
    width: Annotated[int, Field(ge=1, lt=2**24)] | None = None
    height: Annotated[int, Field(ge=1, lt=2**24)] | None = None
    pad: _Pixels | None = None


def read_contents(run: RunFolder) -> Contents:
    """The contents of a run folder. Raises UserError if it does not exist."""
    if not run.path.is_dir():
        raise UserError(f"{run.path}: not a run folder; expected runs/<name>", code=5)
    files = (run.recipe, run.cluster)
    texts = {path.name: _text(path) for path in files if path.is_file()}
    pictures, sounds = [], []
    read = ((path, read_json_or(path, Described, None)) for path in sorted(run.samples.glob("step_*.json")))
    described = [(path, words.model_dump(exclude_none=True)) for path, words in read if words is not None]
    for path, words in described:
        image = path.with_suffix(".png")
        if size := _size_of(image):
            pictures.append(({**words, "size": size}, image.read_bytes()))
    for path, words in described[-1:]:
        for caption, file in zip(words["captions"], words.get("audio", []), strict=False):
            sound = path.parent / (Path(file).name or "none")
            if sound.is_file():
                sounds.append((caption, sound.read_bytes()))
    return Contents(
        name=run.path.name,
        metrics=_numbers(read_rows(run.metrics)),
        validation=_numbers(read_rows(run.path / "validation.jsonl")),
        monitor=_numbers(read_rows(run.path / "monitor.jsonl")),
        recipe=_yaml(run.recipe, texts),
        cluster=_yaml(run.cluster, texts),
        environment=_mappings(read_json_or(run.environment, dict[str, Any], {}), "versions", "kernels", "choices"),
        scores=_scores(read_json_or(run.path / "scores.json", dict[str, Any], {})),
        stages=[stage.model_dump() for stage in read_stages(run)],
        pictures=pictures,
        sounds=sounds,
        texts=texts,
        account=account(run),
        incidents=incidents.read(run.path),
    )


def read_stages(run: RunFolder) -> list[Stage]:
    """The run's record of its stages; empty if there is none."""
    return read_json_or(run.path / "stages.json", list[Stage], [])


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def _size_of(picture: Path) -> tuple[int, int] | None:
    """Width and height of a picture; None if it is missing or cannot be shown."""
    from PIL import Image, UnidentifiedImageError

    if not picture.is_file():
        return None
    try:
        with Image.open(picture, formats=("PNG",)) as image:
            return image.size
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        log.warning("%s: left out of the report: %s", picture, error)
        return None


def _numbers(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a curve, reduced to values that can be drawn."""
    return [{key: value for key, value in row.items() if is_number(value) and abs(value) < 1e30} for row in rows]


def _mappings(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """The values without those of these names that are not mappings."""
    return {key: value for key, value in values.items() if key not in names or isinstance(value, Mapping)}


def _scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The scores that can be shown: numbers, text, groups and confusion."""
    shares = ("group_accuracy", "real_accuracy", "wer", "similarity")
    kept = {
        key: value
        for key, value in scores.items()
        if is_number(value) or (isinstance(value, str | bool) and key not in shares)
    }
    groups, confusion = scores.get("groups"), scores.get("confusion")
    if isinstance(groups, dict):
        kept["groups"] = {str(name): value for name, value in groups.items() if is_number(value)}
    try:
        table = Confusion.model_validate(confusion)
        if len(table.labels) == len(table.matrix):
            kept["confusion"] = table.model_dump()
    except ValidationError:
        log.debug("scores.json has no confusion that can be drawn")
    return kept


def _yaml(path: Path, texts: Mapping[str, str]) -> dict[str, Any]:
    if path.name not in texts:
        return {}
    try:
        found = parse_yaml(texts[path.name], str(path))
    except UserError as error:
        log.warning("%s", error)
        return {}
    return _mappings(found, "networks") if isinstance(found, dict) else {}


def results_of(contents: Contents, given: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a run. Missing ones are null, so that every run has the same names."""
    last = contents.metrics[-1] if contents.metrics else {}
    validation = contents.validation[-1] if contents.validation else {}
    stages: list[dict[str, Any]] = [
        {"name": str(stage["name"]), "seconds": float(stage["seconds"])} for stage in contents.stages
    ]
    memory = [row["memory_peak_bytes"] for row in contents.metrics if row.get("memory_peak_bytes")]
    results: dict[str, Any] = {
        "run": contents.name,
        "steps": last.get("step"),
        "workers": contents.environment.get("workers", contents.cluster.get("workers")),
        "loss": newest(contents.metrics, "loss"),
        "validation_loss": validation.get("loss"),
        "validation_loss_ratio": validation.get("ratio"),
        "frechet": newest(contents.monitor, "frechet"),
        "diversity": newest(contents.monitor, "diversity"),
        "group_accuracy": contents.scores.get("group_accuracy"),
        "real_accuracy": contents.scores.get("real_accuracy"),
        "wer": contents.scores.get("wer"),
        "similarity": contents.scores.get("similarity"),
        "samples_per_s": newest(contents.metrics, "samples_per_s"),
        "wall_seconds": sum(float(stage["seconds"]) for stage in stages) if stages else last.get("seconds"),
        "peak_memory_bytes": int(max(memory)) if memory else None,
        "stages": stages,
        **goodput_of(contents),
    }
    return {**results, **given}


def goodput_of(contents: Contents) -> dict[str, Any]:
    """Effective training time, seconds of everything else, and incidents by kind."""
    kept = contents.account
    kinds = [str(row["kind"]) for row in contents.incidents]
    return {
        "effective_training_time": None if kept is None else kept.effective,
        "time": None if kept is None else {name: round(seconds, 3) for name, seconds in kept.parts.items()},
        "attempts": None if kept is None else kept.attempts,
        "incidents": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
    }


# ------------------------------------------------------------------------------------------------ sections


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
    )


def figures(results: Mapping[str, Any]) -> str:
    shown = [
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
    ]
    cells = [
        f"<div><b>{show(results[key])}</b><span>{words}</span></div>"
        for key, words, show in shown
        if results.get(key) is not None
    ]
    return f'<div class="figures">{"".join(cells)}</div>' if cells else ""


def last_samples(contents: Contents) -> tuple[str, str]:
    """The newest picture, cut into tiles with their captions by the style sheet alone; and that style."""
    if contents.sounds:
        tiles = "".join(
            f"<li><audio controls src='data:audio/wav;base64,{_base64(data)}'></audio><p>{escape(caption)}</p></li>"
            for caption, data in contents.sounds
        )
        seen = _picture(*contents.pictures[-1]) if contents.pictures else ""
        return f'<h2>Samples</h2><ul class="tiles" style="--w:240px">{tiles}</ul>{seen}', ""
    if not contents.pictures:
        return "", ""
    words, png = contents.pictures[-1]
    captions = [str(caption) for caption in words["captions"]]
    heading = f"<h2>Samples <small>after {words['step']} steps</small></h2>"
    if not {"columns", "width", "height", "pad"} <= set(words):
        return heading + _picture(words, png), ""
    width, height = words["size"]
    w, h, pad, columns = (int(words[key]) for key in ("width", "height", "pad", "columns"))
    items = []
    for i, caption in enumerate(captions):
        # A background position in percent refers to the difference between picture and box.
        x = 100 * (pad + i % columns * (w + pad)) / max(1, width - w)
        y = 100 * (pad + i // columns * (h + pad)) / max(1, height - h)
        label = escape(caption, quote=True)
        items.append(
            f'<li><div class="tile" role="img" aria-label="{label}" style="background-position:{x:.3f}% {y:.3f}%"></div><p>{label}</p></li>'
        )
    style = (
        f".tile {{ aspect-ratio: {w} / {h}; background-size: {100 * width / w:.3f}% {100 * height / h:.3f}%; "
        f"background-image: url(data:image/png;base64,{_base64(png)}); }}"
    )
    return f'{heading}<ul class="tiles">{"".join(items)}</ul>', style


def samples_in_time(contents: Contents) -> str:
    if len(contents.pictures) < 2:
        return ""
    count = len(contents.pictures)
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
        f'<div class="strip">{"".join(_picture(*contents.pictures[i]) for i in chosen)}</div>{note}'
    )


def _picture(words: Mapping[str, Any], png: bytes) -> str:
    alt = escape(f"Samples after {words['step']} steps: " + ", ".join(map(str, words["captions"])), quote=True)
    image = f'<img src="data:image/png;base64,{_base64(png)}" alt="{alt}">'
    return f"<figure>{image}<figcaption>step {int(words['step'])}</figcaption></figure>"


def score_section(contents: Contents) -> str:
    scores = contents.scores
    cards = []
    if isinstance(scores.get("groups"), dict):
        groups = {name: value for name, value in scores["groups"].items() if value is not None}
        cards.append(
            f'<section class="card"><header><h3>Found in their group</h3></header>{bars(groups, percent, 1.0)}</section>'
        )
    confusion = scores.get("confusion")
    if isinstance(confusion, dict):
        cards.append(
            f'<section class="card"><header><h3>Prompted, found as</h3></header><div class="scroll">{_matrix(confusion)}</div></section>'
        )
    plain = {
        key: value
        for key, value in scores.items()
        if isinstance(value, int | float | str) and not isinstance(value, bool)
    }
    if plain:
        cards.append(f'<section class="card"><header><h3>All scores</h3></header>{_table(plain)}</section>')
    return f'<h2>Scores</h2><div class="cards">{"".join(cards)}</div>' if cards else ""


def _matrix(confusion: Mapping[str, Any]) -> str:
    """`labels` and `matrix`: [prompted][found as] counts, each shaded by its share of the row."""
    names, rows = [str(name) for name in confusion["labels"]], confusion["matrix"]
    body = []
    for name, row in zip(names, rows, strict=True):
        total = sum(row) or 1
        cells = "".join(
            f'<td style="background:color-mix(in srgb, var(--a) {60 * value / total:.0f}%, transparent)">{int(value)}</td>'
            for value in row
        )
        body.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")
    top = "".join(f'<th title="{escape(name, quote=True)}">{escape(name[:7])}</th>' for name in names)
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
    stages: dict[str, float] = {}
    for stage in results["stages"]:
        stages[stage["name"]] = stages.get(stage["name"], 0.0) + stage["seconds"]
    if stages:
        body = bars(stages, duration)
        cards.append(
            f'<section class="card"><header><h3>By stage</h3><span>{duration(sum(stages.values()))}</span></header>{body}</section>'
        )
    inside: dict[str, float] = {}
    for row in contents.metrics:
        for key, value in row.items():
            if key.startswith("time/") and value:
                inside[key.removeprefix("time/")] = inside.get(key.removeprefix("time/"), 0.0) + value
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


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


# ------------------------------------------------------------------------------------------------ the file


def write_report(run: RunFolder, *, given: Mapping[str, Any] | None = None) -> Path:
    """Writes a run's `report.html` and `results.json` from its folder, each atomically.

    Args:
        given: figures that the folder does not know, or knows less well: `wall_seconds`, `peak_memory_bytes`, `workers`, or new ones.
    Returns:
        where the report lies.
    """
    contents = read_contents(run)
    results = results_of(contents, given or {})
    samples, tile_style = last_samples(contents)
    sections = [
        head(contents, results),
        figures(results),
        samples,
        score_section(contents),
        samples_in_time(contents),
        curves(contents.metrics, contents.validation, contents.monitor),
        time_section(contents, results),
        incident_section(contents),
        what_ran(contents),
        "<footer>Figures of this page: results.json. All rows: metrics.jsonl and validation.jsonl in the run folder.</footer>",
    ]
    template = Template((Path(__file__).parent / "report_template.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(contents.name), tile_style=tile_style, body="\n".join(part for part in sections if part)
    )
    atomic_write(run.report, page.encode())
    atomic_write(run.results, json.dumps(results, indent=1).encode() + b"\n")
    return run.report
