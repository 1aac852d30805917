"""What `nexus evaluate` found of a run, as a part of its page: each figure with its interval, its floor and its ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, FiniteFloat

from nexus_scale.io.plain_json import read_json_or
from nexus_scale.report.charts import number
from nexus_scale.report.meanings import meaning_of

FOLDER, FILE = "evaluations", "evaluation.json"


class Figure(BaseModel):
    """A figure of evaluation.json, as far as it is shown. `floor`: what real samples reach; `ceiling`: noise, or chance."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    value: FiniteFloat
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None
    samples: int | None = None
    real: int | None = None
    floor: FiniteFloat | None = None
    ceiling: FiniteFloat | None = None
    better: Literal["lower", "higher"] | None = None


class Evaluated(BaseModel):
    """evaluation.json, as far as it is shown."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    of: dict[str, Any] = {}
    suite: dict[str, Any] = {}
    figures: dict[str, Figure] = {}
    left_out: dict[str, str] = {}
    warnings: list[str] = []


def read_evaluations(folder: Path) -> list[Evaluated]:
    """All evaluations in a run's folder of them, by the names of theirs: suite and step."""
    read = (read_json_or(path, Evaluated, None) for path in sorted(folder.glob(f"*/{FILE}")))
    return [one for one in read if one is not None]


def evaluation_section(evaluations: Sequence[Evaluated]) -> str:
    """A card for each evaluation, the newest first."""
    cards = "".join(_card(one) for one in reversed(evaluations))
    return f'<h2>Evaluations <small>nexus evaluate</small></h2><div class="cards one">{cards}</div>' if cards else ""


def _card(one: Evaluated) -> str:
    title = str(one.suite.get("name", "evaluation"))
    step = one.of.get("step")
    words = "" if step is None else f"step {step}"
    rows = "".join(_row(name, figure) for name, figure in one.figures.items())
    head = "<tr><th>figure</th><th>value</th><th>interval</th><th>real against real</th><th>noise or chance</th><th>samples</th></tr>"
    left = {name: f"left out: {name}: {why}" for name, why in one.left_out.items()}
    notes = "".join(f'<p class="note">{escape(words)}</p>' for words in [*left.values(), *one.warnings])
    return (
        f'<section class="card"><header><h3>{escape(title)}</h3><span>{escape(words)}</span></header>'
        f'<div class="scroll"><table class="evaluation">{head}{rows}</table></div>{notes}</section>'
    )


def _row(name: str, figure: Figure) -> str:
    meaning = meaning_of(name.rpartition("/")[2])
    said = [] if meaning is None else [meaning.words]
    if figure.better is not None:
        said.append(f"{figure.better.capitalize()} is better.")
    interval = "" if figure.low is None or figure.high is None else f"{number(figure.low)} to {number(figure.high)}"
    count = (
        "" if figure.samples is None else f"{figure.samples:,}" + (f" / {figure.real:,} real" if figure.real else "")
    )
    cells = (
        f"<b>{number(figure.value)}</b>", interval, _or_nothing(figure.floor), _or_nothing(figure.ceiling), count,
    )  # fmt: skip
    title = escape(name if meaning is None else f"{meaning.title} ({name})")
    return f"<tr><th>{title}<p>{escape(' '.join(said))}</p></th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def _or_nothing(value: float | None) -> str:
    return "" if value is None else number(value)


def figures_of(evaluations: Sequence[Evaluated]) -> Mapping[str, Figure]:
    """The newest value of each figure, by its name."""
    return {name: figure for one in evaluations for name, figure in one.figures.items()}
