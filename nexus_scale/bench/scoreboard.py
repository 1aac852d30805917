"""Families side by side: trained with equal compute on the same data, drawn in few and in many steps, scored by one classifier.

A settings file names recipes, what each is drawn with, and what theory demands of the results. Compute is counted, not timed: FLOPs of a
step's losses, forward and backward, through every network that they call, a frozen teacher too. Runs, data and results stay in one folder;
the same command resumes what is missing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch
import xxhash
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from nexus_scale import main_job
from nexus_scale.bench.claims import Claim, Outcome
from nexus_scale.config.kinds import check_kind
from nexus_scale.config.plain_yaml import read_yaml
from nexus_scale.config.recipe import Cluster, Component, Job, Recipe, find_config, load_recipe, recipe_hash
from nexus_scale.config.registry import explain
from nexus_scale.contracts import Objective, UserError, Word
from nexus_scale.evaluate.scores import Reference, drawn_of, score_settings
from nexus_scale.generate.drawing import check_sampling, drawn_by, refuse, sampler_named
from nexus_scale.generate.trained import Trained
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.rows import read_rows
from nexus_scale.io.stages import read_stages
from nexus_scale.media.files import encode_image
from nexus_scale.media.grid import make_grid
from nexus_scale.media.pictures import to_uint8
from nexus_scale.orchestration.cluster import connected, roots
from nexus_scale.planner.losses import flops_of_step, largest_sample
from nexus_scale.train import make_objective

log = logging.getLogger(__name__)

STRICT = ConfigDict(extra="forbid", frozen=True)


class DrawnWith(BaseModel):
    """How a run is drawn; None: as its recipe says.

    Attributes:
        sampler: a sampler and its settings, as `nexus sample --sampler` takes them.
    """

    model_config = STRICT
    steps: int | None = Field(None, ge=1, le=100_000)
    sampler: str | None = None
    guidance: float | None = Field(None, ge=-1000, le=1000)

    @property
    def asked(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value is not None}

    @property
    def component(self) -> Component | None:
        return None if self.sampler is None else sampler_named(self.sampler, "scoreboard.draws.sampler")

    def check(self, recipe: Recipe, objective: Objective) -> None:
        """Raises a UserError where the recipe cannot be drawn so."""
        words: dict[str, Word] = {"steps": "steps", "sampler": "sampler", "guidance": "guidance"}
        draws = drawn_by(recipe, objective)
        refuse(recipe, draws, {f"scoreboard.draws.{key}": words[key] for key in self.asked})
        if draws.walks:
            check_sampling(recipe, objective, self.steps, self.component)


class Entry(BaseModel):
    """A run of the board.

    Attributes:
        recipe, overrides: what is trained, with `key=value` over the recipe. Its number of steps follows from the compute.
        run: its name, by which later entries begin from it or distil it; None: the recipe's.
        compute: its part of the board's compute: less for what learns from a finished run.
        steps: that it trains for, whatever they cost; None: what the compute allows.
        draws: the ways it is drawn, each a row.
    """

    model_config = STRICT
    recipe: str
    overrides: tuple[str, ...] = ()
    run: str | None = None
    compute: float = Field(1.0, gt=0, le=1000)
    steps: int | None = Field(None, ge=1)
    draws: tuple[DrawnWith, ...] = Field((DrawnWith(),), min_length=1)


class Board(BaseModel):
    """The `scoreboard:` section of a settings file.

    Attributes:
        score: the settings file whose `score:` section names real samples and features.
        teraflops: that each run trains for, of a part of 1.
        cluster: where runs train.
        entries: in the order in which they train.
        claims: what must hold of the rows.
    """

    model_config = STRICT
    score: str
    teraflops: float = Field(gt=0, le=1e12)
    cluster: str = "local_cpu"
    entries: tuple[Entry, ...] = Field(min_length=1)
    claims: tuple[Annotated[Claim, Field(discriminator="claim")], ...] = ()


def read_board(name: str) -> Board:
    """The `scoreboard:` section of a settings file, by path or by name below configs/.

    Raises:
        UserError: no such file or section, an unknown or ill-typed key, two entries of one name, a claim about a run that is none of them.
    """
    values = read_yaml(find_config(name))
    if list(values) != ["scoreboard"]:
        raise UserError(f"{name}: has sections {sorted(map(str, values))}; expected `scoreboard:`")
    check_kind(Board, values["scoreboard"], f"{name}: scoreboard")
    try:
        return Board.model_validate(values["scoreboard"])
    except ValidationError as error:
        raise UserError("\n".join(explain(error, f"{name}: scoreboard"))) from None


# ------------------------------------------------------------------------------------------------- one entry


def resolved(entry: Entry, board: Board, folder: Path, steps: int | None = None) -> main_job.Target:
    """The entry's recipe on the board's cluster, with its run and data in the board's folder. A run that is another entry's is not
    trained by the recipe's own `prepare`."""
    where = [f"cluster.paths.runs={folder / 'runs'}", f"cluster.paths.data={folder / 'data'}"]
    asked = [] if steps is None else [f"steps={steps}"]
    target = main_job.resolve(entry.recipe, [*entry.overrides, *where, *asked], cluster=board.cluster, run=entry.run)
    others = {name_of(other) for other in board.entries}
    left = [job for job in target.recipe.prepare if job.job != "train" or trains(job) not in others]
    return replace(target, recipe=target.recipe.model_copy(update={"prepare": left}))


def checked(entry: Entry, board: Board, folder: Path) -> main_job.Target:
    """`resolved`, and drawn in all of its ways; raises a UserError where it cannot be."""
    target = resolved(entry, board, folder)
    objective = make_objective(target.recipe, None)
    for way in entry.draws:
        way.check(target.recipe, objective)
    return target


@cache
def name_of(entry: Entry) -> str:
    return entry.run or load_recipe(entry.recipe).name


def trains(job: Job) -> str:
    """The run that a `train` job trains."""
    return str(job.options.get("run") or load_recipe(str(job.options["recipe"])).name)


def trained_with(entry: Entry, board: Board, folder: Path) -> tuple[main_job.Target, float]:
    """Trains an entry for its part of the compute or its steps, or to its end where it was begun.

    Returns:
        What was trained, and the teraFLOPs of one of its steps.
    """
    target = resolved(entry, board, folder)
    main_job.prepare(target)  # its data tell what a step costs
    sample = largest_sample(target.recipe, target.place.data_root)
    if sample is None:
        raise UserError(
            f"scoreboard: {entry.recipe} encodes its data while it trains, so its compute cannot be counted"
        )
    step = flops_of_step(target.recipe, sample) / 1e12
    steps = entry.steps or max(1, round(board.teraflops * entry.compute / step))
    log.info("%s: %.3g TFLOPs a step, so %d steps", target.place.run.path.name, step, steps)
    target = resolved(entry, board, folder, steps)
    main_job.train_target(target)
    return target, step


def rows_of(target: main_job.Target, teraflops: float, entry: Entry, reference: Reference) -> list[dict[str, Any]]:
    """A row for each way in which a trained entry is drawn; `strip`, one picture of each group, is an array."""
    trained = Trained(target.place.run, target.place)
    counts = main_job.parameters(target.recipe)
    seconds = {stage.name: stage.seconds for stage in read_stages(target.place.run.path)}
    row = {
        "run": target.place.run.path.name,
        "recipe": entry.recipe,
        "parameters": sum(counts[name] for name in target.recipe.trained()),
        "train_steps": target.recipe.steps,
        "train_teraflops": target.recipe.steps * teraflops,
        "train_seconds": seconds.get(f"train {target.place.run.path.name}"),
    }
    drawn = [_drawn(trained, reference, way) for way in entry.draws]
    most = max(range(len(drawn)), key=lambda i: entry.draws[i].steps or 0)
    wanted = reference.prompts()[1]
    rows = []
    for way, samples in zip(entry.draws, drawn, strict=True):
        scores = reference.scores(samples, wanted)
        features = {key: value for key, value in scores.items() if key.startswith("frechet")}
        rows.append(
            {
                **row,
                "draws": way.asked,
                "accuracy": scores["group_accuracy"] if trained.draws.conditions else None,
                "accuracy_of_real": scores["real_accuracy"],
                **features,
                "distance_to_most_steps": relative_distance(samples, drawn[most]) if len(drawn) > 1 else None,
                "strip": strip_of(samples, wanted),
            }
        )
    return rows


def _drawn(trained: Trained, reference: Reference, way: DrawnWith) -> Tensor:
    return drawn_of(trained, reference, guidance=way.guidance, steps=way.steps, sampler=way.component)


def relative_distance(x: Tensor, y: Tensor) -> float:
    """The distance of samples drawn from the same noise, by the deviation of the second: 0 for a straight path between few steps and
    many, and for a sampler without noise."""
    return float((x - y).square().mean().sqrt() / y.std().clamp(min=1e-12))


def strip_of(samples: Tensor, groups: Tensor) -> Any:
    """The first sample of each group side by side, (H, W, 3) uint8."""
    firsts = [int((groups == group).nonzero()[0, 0]) for group in sorted(set(groups.tolist()))]
    return torch.cat(list(to_uint8(samples[firsts])), dim=1).numpy()


# ------------------------------------------------------------------------------------------------- the board


def scoreboard(
    name: str,
    output: Path | None = None,
    told: Callable[[str], None] = log.info,
) -> tuple[list[dict[str, Any]], list[Outcome]]:
    """Trains what is not trained, draws and scores everything, and judges the claims.

    Args:
        name: a settings file, by path or by name below configs/.
        output: folder of runs, data and results (default: `scoreboard` beside the runs): scoreboard.json, scoreboard.png, rows/.
        told: takes each row as a line, as it comes.
    Returns:
        The rows, with `strip` the path of their picture, and the outcome of each claim.
    Raises:
        UserError: a mistake in the settings, a recipe, or the data.
    """
    board = read_board(name)
    folder = (output or roots(Cluster())[1].parent / "scoreboard").resolve()
    # mistakes are found before anything is trained
    targets = [checked(entry, board, folder) for entry in board.entries]
    names = [target.place.run.path.name for target in targets]
    if twice := sorted({run for run in names if names.count(run) > 1}):
        raise UserError(f"{name}: two entries are the run {twice[0]!r}; give one of them another name with `run:`")
    ways = [[way.asked for way in entry.draws] for entry in board.entries]
    for claim in board.claims:
        claim.check(dict(zip(names, ways, strict=True)), name)
    settings = score_settings(board.score)
    reference: Reference | None = None
    rows: list[dict[str, Any]] = []
    cluster = targets[0].cluster
    with connected(nodes=cluster.nodes) if cluster.max_workers else contextlib.nullcontext():
        for entry in board.entries:
            target, teraflops = trained_with(entry, board, folder)
            if reference is None:
                reference = Reference.read(
                    target.place, settings, Trained(target.place.run, target.place).decoded_shape, folder
                )
            for row in kept_rows(target, teraflops, entry, reference, folder):
                rows.append(row)
                told(line_of(row))
    strips = [Image.open(row["strip"]) for row in rows]
    captions = [", ".join([row["run"], *(f"{key} {value}" for key, value in row["draws"].items())]) for row in rows]
    atomic_write(folder / "scoreboard.png", encode_image(make_grid(strips, columns=1, captions=captions)))
    curves = {run: curve_of(folder / "runs" / run) for run in names}
    outcomes = [claim.outcome(rows, curves) for claim in board.claims]
    atomic_write(
        folder / "scoreboard.json", json.dumps({"rows": rows, "claims": [vars(one) for one in outcomes]}, indent=1)
    )
    return rows, outcomes


def curve_of(run: Path) -> list[dict[str, Any]]:
    """A run's validations by step, each with what was measured of its samples at that step."""
    watched = {row["step"]: row for row in read_rows(run / "monitor.jsonl")}
    return [{**watched.get(row["step"], {}), **row} for row in read_rows(run / "validation.jsonl")]


def kept_rows(
    target: main_job.Target, teraflops: float, entry: Entry, reference: Reference, folder: Path
) -> list[dict[str, Any]]:
    """`rows_of`, with `strip` the path of a picture; kept in the folder, and read from it where the run, how it is drawn and what it is
    scored by are the same."""
    asked = [recipe_hash(target.recipe), [way.asked for way in entry.draws], reference.settings.model_dump(mode="json")]
    name = f"{target.place.run.path.name}-{xxhash.xxh64_hexdigest(json.dumps(asked, sort_keys=True).encode())}"
    path = folder / "rows" / f"{name}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = rows_of(target, teraflops, entry, reference)
        for i, row in enumerate(rows):
            picture, row["strip"] = encode_image(row["strip"]), f"{name}-{i}.png"
            atomic_write(path.with_name(row["strip"]), picture)
        atomic_write(path, json.dumps(rows))
    kept: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return [{**row, "strip": str(path.with_name(Path(row["strip"]).name))} for row in kept]  # the folder may have moved


def line_of(row: dict[str, Any]) -> str:
    """A row in a line, for people."""
    way = ", ".join(f"{key} {value}" for key, value in row["draws"].items()) or "as the recipe says"
    recognised = "" if row["accuracy"] is None else f"{row['accuracy']:.0%} recognised, "
    return (
        f"{row['run']} ({way}): {recognised}Fréchet distance {row['frechet']:.1f} (real {row['frechet_real']:.1f}); "
        f"{row['parameters'] / 1e6:.2f} M parameters, {row['train_steps']} steps, {row['train_teraflops']:.1f} TFLOPs, "
        f"{math.nan if row['train_seconds'] is None else row['train_seconds']:.0f} s"
    )
