"""How a run resumes: its store of checkpoints, what is saved beside the tensors, and how all of it is restored.

The rule is here and nowhere else: the newest checkpoint that verifies and was written by the same recipe.
"""

from __future__ import annotations

import logging
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from nexus_scale.config.recipe import Recipe, differences, identity, identity_of, recipe_hash
from nexus_scale.contracts import Engine, Objective, Progress, ReadShard, RunFolder, UserError
from nexus_scale.engine import distributed
from nexus_scale.engine.checkpoint import Best, CheckpointStore, any_damaged, newest, send_elsewhere, undo
from nexus_scale.io.rows import read_rows
from nexus_scale.processes.latents import LatentStats
from nexus_scale.run.runs import accepted_hashes, accepted_recipes

log = logging.getLogger(__name__)


MEASURING = {"validation": "validate", "evaluation": "evaluate", "monitor": "monitor"}
"""Names of files of figures, with the callbacks that write them."""


class KeepBest(BaseModel):
    """The checkpoints to keep for their figures.

    `metric` is a figure of a callback: of validate, `validation/loss` or `validation/<weights>/loss`; of evaluate, as
    `evaluation/frechet`; of monitor. A checkpoint of a step without that figure is never among the best."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str = Field("validation/loss", pattern=f"^({'|'.join(MEASURING)})/")
    mode: Literal["min", "max"] = "min"
    count: int = Field(1, ge=1)


def open_store(recipe: Recipe, run: RunFolder, rank: int, world_size: int) -> CheckpointStore:
    """The store of the run's checkpoints, claimed for this start of the run, as `callbacks.checkpoint` asks for it."""
    asked = recipe.callbacks.get("checkpoint") or {}
    kept: dict[str, Any] = {key: asked[key] for key in ("keep", "keep_every", "busy", "failures") if key in asked}
    if asked.get("keep_best") is not None:
        best = KeepBest.model_validate(asked["keep_best"])
        kept["best"] = Best(lambda: measured(run, best.metric), best.mode, best.count)
    attempt = distributed.shared_token()
    if asked.get("to") and rank == 0:
        send_elsewhere(run.checkpoints, asked["to"])
    distributed.barrier()
    return CheckpointStore(run.checkpoints, rank=rank, world_size=world_size, attempt=attempt, run=run.path, **kept)


def measured(run: RunFolder, metric: str) -> dict[int, float]:
    """A figure by step, `<file>/<name>`: of validation.jsonl, evaluation.jsonl or monitor.jsonl."""
    file, _, name = metric.partition("/")
    rows = read_rows(run.path / f"{file}.jsonl")
    return {row["step"]: row[name] for row in rows if isinstance(row.get(name), float)}


def state_of(
    recipe: Recipe,
    progress: Progress,
    world_size: int,
    choices: Mapping[str, Any],
    latents: LatentStats | None = None,
    frozen: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The values that a checkpoint stores beside its tensors.

    `choices` (made by the run's first start) and `latents` (how they are normalised) have files of their own, and are kept here in case
    those are lost. `frozen` has the fingerprints of frozen networks, whose weights are not stored."""
    return {
        "progress": asdict(progress),
        "recipe_hash": recipe_hash(recipe),
        "recipe": identity(recipe),
        "choices": dict(choices),
        **({} if latents is None else {"latents": {"mean": list(latents.mean), "std": list(latents.std)}}),
        **({"frozen": dict(frozen)} if frozen else {}),
        "workers": world_size,
        **versions(),
    }


def resume(
    run: RunFolder,
    recipe: Recipe,
    engine: Engine,
    objective: Objective,
    progress: Progress,
    *,
    before: int | None = None,
    frozen: Mapping[str, str] | None = None,
) -> None:
    """Restores engine, objective and progress from the newest checkpoint that verifies; without one it changes nothing. A collective.

    Args:
        before: restore a checkpoint of at most this many steps, and withdraw later ones, so that an interrupted run does not resume
            from them.
        frozen: fingerprints of the frozen networks that were loaded, by name.
    Raises:
        UserError: no checkpoint verifies; another recipe wrote it, or this one with other frozen networks; it holds state that this run
            has no place for.
        CheckpointError: it lacks what this run needs.
    """
    checkpoint = newest(run.checkpoints, before=before, run=run.path)
    if checkpoint is None:
        if any_damaged(run.checkpoints):
            raise UserError(
                f"{run.checkpoints}: no checkpoint in this folder verifies; move the folder away to start from step 0",
                code=5,
            )
        if progress.step:
            limit = "" if before is None else f" of at most {before} steps"
            raise UserError(f"{run.checkpoints}: asked to roll back, but there is no checkpoint{limit}", code=5)
        return
    if changed := other_curve(run, recipe, checkpoint.state, str(checkpoint.path)):
        raise UserError(
            f"{checkpoint.path}: was written with a different recipe from {run.recipe}; the difference:\n  "
            + "\n  ".join(changed),
            code=5,
        )
    if changed := other_frozen(recipe, checkpoint.state, frozen or {}):
        raise UserError(
            f"{checkpoint.path}: was trained with different weights in its frozen networks; restore them, or start a new run:\n  "
            + "\n  ".join(changed),
            code=5,
        )
    with checkpoint.claimed() as read:
        engine.load_shards(read)
        for name in recipe.frozen():
            _take_saved(name, checkpoint.names, engine, read)
        if kept := objective.state_dict():
            objective.load_state_dict(
                {key: read(f"objective/{key}", 0, held.numel()).clone().view(held.shape) for key, held in kept.items()}
            )
    if before is not None:
        undo(run.checkpoints, checkpoint.step)
    saved = checkpoint.state["progress"]
    progress.step, progress.draws = saved["step"], saved["draws"]
    progress.skipped = [(first, last) for first, last in saved["skipped"]]
    if engine.rank == 0:
        log.info("resuming after step %d (%s)", progress.step, checkpoint.path)


def other_curve(run: RunFolder, recipe: Recipe, state: Mapping[str, Any], where: str) -> list[str]:
    """How the recipe that wrote a checkpoint differs from this one, as `key: old -> new`; empty if the user allowed the changes.

    Compares values and not hashes: a version that knows one more key would otherwise refuse everything an older version wrote.
    """
    if state["recipe_hash"] in {recipe_hash(recipe), *accepted_hashes(run)}:
        return []
    wrote = identity_of(state["recipe"], where)
    if any(wrote == identity_of(accepted, where) for accepted in accepted_recipes(run)):
        return []
    return differences(wrote, identity(recipe))


def other_frozen(recipe: Recipe, state: Mapping[str, Any], found: Mapping[str, str]) -> list[str]:
    """Frozen networks whose weights have changed since a checkpoint was written, each with the source of its weights."""
    return [
        f"networks.{name}: fingerprint {state['frozen'][name]} then and {digest} now, from {source.path}"
        for name, digest in found.items()
        if state.get("frozen", {}).get(name, digest) != digest and (source := recipe.frozen()[name].init_from)
    ]


def _take_saved(name: str, names: Sequence[str], engine: Engine, read: ReadShard) -> None:
    """A frozen network's weights where an older version saved them with the run."""
    stored = {key.removeprefix(f"{name}/").rpartition(".")[0]: key for key in names if key.startswith(f"{name}/")}
    if stored:
        engine.fill(name, lambda key, start, stop: read(stored[key], start, stop))


def versions() -> dict[str, Any]:
    """Versions of the libraries that a run's bits depend on, and this code's commit if it is a checkout."""
    found = {name: metadata.version(name) for name in ("torch", "deepspeed", "ray", "numpy", "safetensors")}
    try:
        here = Path(__file__).parent
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown (not a git checkout)"
    return {"versions": {"python": platform.python_version(), **found}, "commit": commit}
