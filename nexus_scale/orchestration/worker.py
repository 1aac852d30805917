"""What a worker process runs: one rank of a run."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from nexus_scale.config.recipe import cluster_from, recipe_from
from nexus_scale.contracts import RunFolder
from nexus_scale.generate.trained import make_draw
from nexus_scale.orchestration.compiled import keep_compiled_code_apart, keep_graphs
from nexus_scale.rehearsal.micro_batch import Size
from nexus_scale.train import Place, train


def work(config: dict[str, Any]) -> dict[str, Any]:
    """Trains one rank from the newest checkpoint to the end of the run; a small summary.

    Args:
        config: `recipe` and `cluster` as plain values; `run`, `data_root`, `runs_root` as absolute paths; `sizes`: see `train`.
    Returns:
        steps, seconds, workers, rank.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    here = keep_compiled_code_apart(Path(config["run"]))
    place = Place(RunFolder(Path(config["run"])), Path(config["data_root"]), Path(config["runs_root"]))
    recipe = recipe_from(config["recipe"], f"{config['run']}/recipe.yaml")
    cluster = cluster_from(config["cluster"], f"{config['run']}/cluster.yaml")
    if cluster.compile or cluster.gpus_per_worker:
        keep_graphs(place.runs_root, here)
    sizes = [Size(micro, recompute) for micro, recompute in config.get("sizes", ())]
    return train(recipe, cluster, place, make_draw, sizes)
