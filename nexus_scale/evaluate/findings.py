"""What an evaluation finds: figures with intervals, and the rows and features that they are of, to compare with others' later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.evaluate.measures import Better, better_of, finite_rows
from nexus_scale.io.durable import atomic_write, replacing
from nexus_scale.io.plain_json import read_json
from nexus_scale.metrics.statistics import Measure, Resampling

FILE, TENSORS, PICTURE = "evaluation.json", "evaluation.safetensors", "evaluation.png"
ROWS, DRAWN, REAL = "rows:", "drawn:", "real:"
"""How names of tensors begin: of a figure's values (N,), and of drawn and real features (N, D)."""


class Figure(BaseModel):
    """A figure as evaluation.json has it.

    Attributes:
        low, high: its interval; `error`: standard.
        samples, real: how many drawn and how many real samples it is of.
        floor: of real samples against real ones, what a perfect model would reach; ceiling: of noise, or by chance. None: there is none.
        better: lower or higher.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)
    value: float
    low: float
    high: float
    error: float
    samples: int
    real: int | None = None
    floor: float | None = None
    ceiling: float | None = None
    better: Better | None = None


@dataclass
class Findings:
    """What a section found.

    Attributes:
        prompts: fingerprint of what was asked for; paired: of that and of the noise, the same for the same rows. None: not known.
        left_out: figures that could not be had, with the reason.
    """

    prompts: str | None = None
    paired: str | None = None
    figures: dict[str, Figure] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    features: dict[str, dict[str, str]] = field(default_factory=dict)
    references: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    pictures: list[Tensor] = field(default_factory=list)


def figures_of_set(
    found: Findings,
    features: str,
    measure: Measure,
    drawn: Tensor,
    real: Tensor,
    resampling: Resampling,
    floor: tuple[Tensor, Tensor] | None,
    ceiling: tuple[Tensor, Tensor] | None,
) -> None:
    """Adds figures of a set of features (M, D) against real ones (N, D); `floor`, `ceiling`: pairs of sets that they are had of."""
    least, most = (None if pair is None else measure(*pair) for pair in (floor, ceiling))
    for name, estimate in resampling.figures(measure, drawn, real).items():
        whole = f"{features}/{name}"
        found.figures[whole] = Figure(
            **asdict(estimate), samples=len(drawn), real=len(real), better=better_of(whole),
            floor=None if least is None else least[name], ceiling=None if most is None else most[name],
        )  # fmt: skip
    found.tensors |= {f"{DRAWN}{features}": drawn, f"{REAL}{features}": real}


def figure_of_rows(
    found: Findings,
    name: str,
    values: Tensor,
    resampling: Resampling,
    floor: float | None = None,
    ceiling: float | None = None,
) -> None:
    """Adds a mean over samples (N,), of those that are not nan."""
    if finite_rows(values) < 2:
        found.left_out[name] = f"{finite_rows(values)} samples have it; expected 2 at least"
        return
    found.figures[name] = Figure(
        **asdict(resampling.mean(values)),
        samples=finite_rows(values),
        floor=floor,
        ceiling=ceiling,
        better=better_of(name),
    )
    found.tensors[ROWS + name] = values.float()


class Evaluation(BaseModel):
    """evaluation.json.

    Attributes:
        of: what was evaluated: `name`, and of a run `step` and the weights' name.
        suite: `name`, `fingerprint`, `settings`.
        references, features: by folder and by name, each with a fingerprint.
        prompts, paired: see `Findings`, by section.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)
    of: dict[str, Any]
    suite: dict[str, Any]
    figures: dict[str, Figure]
    references: dict[str, dict[str, Any]]
    features: dict[str, dict[str, str]]
    prompts: dict[str, str | None]
    paired: dict[str, str | None]
    left_out: dict[str, str]
    warnings: list[str]
    seconds: float

    def table(self) -> str:
        """The figures as lines of text."""
        head = ("figure", "value", "interval", "floor", "ceiling", "better", "samples")
        rows = [head]
        for name, one in self.figures.items():
            count = f"{one.samples}" if one.real is None else f"{one.samples} / {one.real} real"
            rows.append(
                (name, _short(one.value), f"{_short(one.low)} to {_short(one.high)}", _short(one.floor), _short(one.ceiling),
                 one.better or "", count)
            )  # fmt: skip
        return "\n".join(
            [lined_up(rows), *(f"left out: {name}: {why}" for name, why in self.left_out.items()), *self.warnings]
        )


def lined_up(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of text in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def write(folder: Path, evaluation: Evaluation, tensors: Mapping[str, Tensor]) -> None:
    """Writes the result into a folder: what was found first, what says so last."""
    from safetensors.torch import save_file

    with replacing(folder / TENSORS) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()} or {"none": torch.zeros(1)}, partial)
    atomic_write(folder / FILE, evaluation.model_dump_json(indent=1))


def read(folder: Path) -> tuple[Evaluation, dict[str, Tensor]]:
    """An evaluation and its tensors.

    Raises:
        UserError: there is none in the folder, or it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = read_json(folder / FILE, Evaluation)
        if found is None:
            raise UserError(f"{folder}: has no {FILE}; make one: nexus evaluate RUN --suite SUITE", code=5)
        return found, load_file(folder / TENSORS)
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(f"{folder}: is damaged ({error}); evaluate again", code=5) from None


def as_json(evaluation: Evaluation) -> str:
    return json.dumps(evaluation.model_dump(mode="json"), indent=1)
