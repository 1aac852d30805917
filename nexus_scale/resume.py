"""Where a run goes on: the store of its checkpoints, what is saved beside the tensors, and how all of it comes back.

Decided here and nowhere else: the newest checkpoint that verifies, of the same recipe.
"""

from __future__ import annotations

import logging
import platform
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from nexus_scale.contracts import Engine, Objective, Progress, RunFolder, UserError
from nexus_scale.engine import distributed
from nexus_scale.engine.checkpoint import CheckpointStore, newest
from nexus_scale.recipe import Recipe, identity, recipe_hash

log = logging.getLogger(__name__)


def open_store(recipe: Recipe, run: RunFolder, rank: int, world_size: int) -> CheckpointStore:
    asked = recipe.callbacks.get("checkpoint") or {}
    kept = {key: asked[key] for key in ("keep", "keep_every") if key in asked}
    return CheckpointStore(
        run.checkpoints, rank=rank, world_size=world_size, attempt=distributed.shared_token(), **kept
    )


def state_of(recipe: Recipe, progress: Progress, world_size: int) -> dict[str, Any]:
    return {
        "progress": asdict(progress),
        "recipe_hash": recipe_hash(recipe),
        "recipe": identity(recipe),
        "workers": world_size,
        **versions(),
    }


def go_on(run: RunFolder, recipe: Recipe, engine: Engine, objective: Objective, progress: Progress) -> None:
    checkpoint = newest(run.checkpoints)
    if checkpoint is None:
        if run.checkpoints.is_dir() and any(run.checkpoints.glob("*.corrupt-*")):
            raise UserError(
                f"{run.checkpoints}: no checkpoint there verifies; move the folder away to start from step 0", code=5
            )
        if progress.step:
            raise RuntimeError("asked to roll back before any checkpoint was written")
        return
    if checkpoint.state["recipe_hash"] != recipe_hash(recipe):
        raise UserError(f"{checkpoint.path}: was written by another recipe than {run.recipe}", code=5)
    engine.load_pieces(checkpoint.read)
    kept = objective.state_dict()
    if kept:
        objective.load_state_dict({key: checkpoint.tensor(f"objective/{key}") for key in kept})
    saved = checkpoint.state["progress"]
    progress.step, progress.draws = saved["step"], saved["draws"]
    progress.skipped = [(first, last) for first, last in saved["skipped"]]
    if engine.rank == 0:
        log.info("goes on after step %d (%s)", progress.step, checkpoint.path)


def versions() -> dict[str, Any]:
    """Versions of what the bits of a run depend on, and the commit of this code where it is a checkout."""
    found = {name: metadata.version(name) for name in ("torch", "deepspeed", "ray", "numpy", "safetensors")}
    try:
        here = Path(__file__).parent
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown (not a git checkout)"
    return {"versions": {"python": platform.python_version(), **found}, "commit": commit}
