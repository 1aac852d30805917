"""`nexus generate` on one process against a bare loop of the same network: samples per CPU-second.

The job draws all classes of a small image network with guidance and writes shards, manifest and all, from opening the run to the end. The
bare loop has the network, its sampler and its conditions in memory and keeps nothing. Both compute on one thread in one process, in turns,
each going first in every other round.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_pipelines import generate_samples
from nexus_scale.config.plain_yaml import write_yaml
from nexus_scale.config.recipe import Recipe, cluster_from, dump, load_recipe, recipe_from
from nexus_scale.contracts import RunFolder
from nexus_scale.generate.drawing import request_of
from nexus_scale.generate.trained import Trained, make_draw
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.train import Place, train

RECIPE = "dit/tiny_cifar10"
SIDE, BATCH, STEPS, GUIDANCE = 16, 16, 10, 2.0
NETWORK = {"latent_size": SIDE, "hidden_size": 256, "depth": 6, "num_heads": 4}
CLUSTER = {"workers": 0, "threads_per_worker": 1}


def run(rounds: int = 6, samples: int = 320) -> dict[str, Any]:
    """Measures both.

    Args:
        rounds: how often each is timed.
        samples: of each round, 32 of each class unless given. One round of ten comes before, untimed.
    Returns:
        `ratio`: our samples per CPU-second over the bare loop's, each in its best round; `ours` and `peers.bare_loop` with those figures,
        the medians of all rounds, and samples per second of the clock.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(prefix="nexus-bench-") as folder:
            place = _run_folder(Path(folder))
            trained = Trained(place.run, place)
            sides: dict[str, Callable[[int, int], None]] = {
                "ours": lambda number, count: _ours(place, number, count),
                "bare_loop": lambda number, count: _bare(trained, count),
            }
            for name in sides:
                sides[name](rounds, 10)  # untimed
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
            for number in range(rounds):
                for name in sides if number % 2 == 0 else reversed(sides):
                    times[name].append(_timed(sides[name], number, samples))
    finally:
        torch.set_num_threads(threads)
    figures = {name: _figures(measured, samples) for name, measured in times.items()}
    return {
        "name": "generate",
        "ratio": figures["ours"]["samples_per_cpu_second"] / figures["bare_loop"]["samples_per_cpu_second"],
        "ours": figures["ours"],
        "peers": {"bare_loop": figures["bare_loop"]},
        "settings": NETWORK
        | {"samples": samples, "batch": BATCH, "steps": STEPS, "guidance": GUIDANCE, "rounds": rounds, "threads": 1},
        "versions": {"torch": torch.__version__},
    }


def _run_folder(root: Path) -> Place:
    """A run of one step on made-up images."""
    values = dump(load_recipe(RECIPE, tiny=True))
    values["networks"]["model"] |= NETWORK
    values["data"]["synthetic"]["fields"]["image"]["shape"] = [3, SIDE, SIDE]
    values |= {"steps": 1, "callbacks": {"checkpoint": {"every": 1}}}
    recipe: Recipe = recipe_from(values, "bench generate")
    cluster = cluster_from(CLUSTER, "bench generate")
    place = Place(RunFolder(root / "runs" / "network"), root / "data", root / "runs")
    train(recipe, cluster, place, make_draw)
    write_yaml(place.run.recipe, dump(recipe))
    write_yaml(place.run.cluster, dump(cluster))
    return place


def _ours(place: Place, number: int, samples: int) -> None:
    generate_samples.run(
        output=f"samples_{number}", run=place.run.path.name, per_class=samples // 10, steps=STEPS, guidance=GUIDANCE, batch=BATCH,
        shard_samples=samples, workers=0, data_root=place.data_root, runs_root=place.runs_root,
    )  # fmt: skip


@torch.no_grad()
def _bare(trained: Trained, samples: int) -> None:
    asked = request_of(trained.recipe, trained.objective, steps=STEPS, guidance=GUIDANCE)
    request = replace(asked, shape=trained.shape)
    for begin in range(0, samples, BATCH):
        positions = torch.arange(begin, min(begin + BATCH, samples))
        rng = ProgressRng(0, 0, "sample", positions)
        trained.objective.generate(trained.nets, {"label": positions % 10}, request, rng)


def _timed(draw: Callable[[int, int], None], number: int, samples: int) -> tuple[float, float]:
    """CPU and clock seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    draw(number, samples)
    return time.process_time() - cpu, time.perf_counter() - wall


def _figures(measured: list[tuple[float, float]], samples: int) -> dict[str, float]:
    cpu, wall = zip(*measured, strict=True)
    return {
        "samples_per_cpu_second": samples / min(cpu),
        "median_samples_per_cpu_second": samples / statistics.median(cpu),
        "samples_per_second": samples / min(wall),
    }
