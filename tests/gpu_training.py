"""Tiny recipes trained on a device as a user would, for tests that run on a GPU; on a CPU the same lines run as a cheap trial.

`python -m tests.gpu_training DEVICE ENGINE FOLDER RECIPE...` in a process of its own: DeepSpeed chooses its device as it is imported, and
processes that tests fork have chosen the CPU. ENGINE: `local`, `deepspeed`, or one of them with `+compile`, `+graphs` and `+float32`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.distributed import free_port


def trained_on(device: str, engine: str, folder: Path, names: list[str]) -> dict[str, Any]:
    """What `learned` says of each recipe, or `error`: the trace of what it raised, or that it was not reached in time."""
    timeout = 100 + 40 * len(names)
    command = [sys.executable, "-m", "tests.gpu_training", device, engine, str(folder), *names]
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": device}
    report, log = folder / f"{engine}.json", folder / f"{engine}.log"
    with log.open("w") as said:
        try:
            subprocess.run(command, stdout=said, stderr=said, timeout=timeout, env=environment)
        except subprocess.TimeoutExpired:
            said.write(f"not done after {timeout} s")
    found: dict[str, Any] = json.loads(report.read_text()) if report.exists() else {}
    return {**{name: {"error": log.read_text()[-6000:]} for name in names}, **found}


def learned(name: str, device: str, engine: str, folder: Path) -> dict[str, Any]:
    """Three steps in bf16, or as the engine says in float32, on a device, saved, drawn and decoded there, and again from the second step
    on; and three in float32 on the CPU.

    Returns:
        `losses`, `expected`: of each step, on the device and on the CPU; `changed`: tensors of the resumed run with other bits;
        `drawn`: files of samples.
    """
    from tests.config.test_every_recipe import tensors, without_the_last

    precision = "float32" if "float32" in engine.split("+") else "bf16"
    _train(name, folder / "whole", device, engine, precision)
    without_the_last(folder / "whole", folder / "resumed")
    _train(name, folder / "resumed", device, engine, precision)
    _train(name, folder / "cpu", "cpu", "local", "float32")
    one, other = tensors(folder / "whole"), tensors(folder / "resumed")
    assert one.keys() == other.keys() and len(one) > 4
    return {
        "losses": _losses(folder / "whole"),
        "expected": _losses(folder / "cpu"),
        "changed": [key for key in one if not one[key].equal(other[key])],
        "drawn": sorted(str(path.name) for path in (folder / "whole" / "samples").rglob("*") if path.is_file()),
    }


def _losses(run: Path) -> list[dict[str, float]]:
    """Losses and norms of gradients of each step by name."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key.split("/")[-1] in ("loss", "grad_norm")} for row in rows]


def cluster_on(device: str, engine: str, precision: str = "bf16") -> dict[str, Any]:
    """Settings of a cluster of one process, whose kernels repeat to the bit."""
    kind, *more = engine.split("+")
    return {
        "engine": kind,
        "workers": 1 if kind == "deepspeed" else 0,
        "zero_stage": 3 if kind == "deepspeed" else 0,
        "gpus_per_worker": 1 if device == "cuda" else 0,
        "precision": precision,
        "threads_per_worker": 1,
        "compile": "compile" in more,
        "cuda_graphs": "graphs" in more,
        "deterministic": True,
    }


def _train(name: str, root: Path, device: str, engine: str, precision: str) -> None:
    from nexus_scale.config import recipe as recipes
    from nexus_scale.contracts import RunFolder
    from nexus_scale.generate.trained import make_draw
    from nexus_scale.train import Place, train
    from tests.config.test_every_recipe import CALLBACKS

    recipe = recipes.load_recipe(name, {"callbacks": CALLBACKS}, tiny=True)
    cluster = recipes.cluster_from(cluster_on(device, engine, precision), "test")
    train(recipe, cluster, Place(RunFolder(root), root / "data", root.parent), make_draw)


@contextmanager
def never_waiting(device: str) -> Iterator[None]:
    """A context in which a call that makes the host wait for the GPU raises a RuntimeError."""
    if device != "cuda":
        yield
        return
    import torch

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


WAITING = ("dit_zero3", "sd3_zero3", "cogvideox_zero3", "valle_zero3")
"""Cases of `nexus bench gpu` whose steps are watched."""


def waits(device: str, engine: str, cases: Sequence[str] = WAITING) -> dict[str, str]:
    """By case, in miniature: where in two steps the host waits for the device; empty where it does not."""
    import torch

    from nexus_scale.bench.gpu.cases import CASES, LOCAL, ZERO3
    from nexus_scale.bench.gpu.training import Ours

    found = {}
    for name in cases:
        task, settings = CASES[name].task, {**(LOCAL if engine == "local" else ZERO3), "compile": False}
        assert task is not None
        do = Ours(task, settings, torch.device(device), tiny=True).steps_of(2)
        do(2)
        found[name] = ""
        try:
            with never_waiting(device):
                do(2)
        except RuntimeError:
            found[name] = traceback.format_exc(limit=-8)
    return found


def compiled_gradients(device: str, cases: Sequence[str] = WAITING) -> dict[str, dict[str, float]]:
    """By case, in miniature, sharded: the gradients that compiled blocks give some parameter other than the same blocks as they are, and by
    how much, as a part of its norm."""
    return {name: _apart(*(_gradients(name, device, compiled) for compiled in (False, True))) for name in cases}


def _gradients(name: str, device: str, compiled: bool) -> dict[str, Any]:
    import torch

    from nexus_scale.bench.gpu.cases import CASES, ZERO3
    from nexus_scale.bench.gpu.training import Ours, batch_of
    from nexus_scale.kernels.random import ProgressRng

    task, place = CASES[name].task, torch.device(device)
    assert task is not None
    ours = Ours(task, {**ZERO3, "compile": compiled}, place, tiny=True)
    batch = batch_of(ours.fields, 2, place).on(place)
    engine: Any = ours.engine
    (phase,) = ours.objective.phases(0)
    with engine.training(phase.trains):
        rng = ProgressRng(0, 0, phase.name, batch.positions, place)
        engine.backward(phase.trains, ours.objective.loss(phase.name, engine.nets, batch, rng, 0).total, last=True)
    sharded = engine._zero[phase.networks[0]].sharded
    return {
        segment.name: sharded.gradients[flat.begin + segment.offset : flat.begin + segment.stop].float().cpu()
        for flat in sharded.layout
        for segment in flat.segments
    }


def _apart(plain: dict[str, Any], compiled: dict[str, Any]) -> dict[str, float]:
    largest = max(float(value.norm()) for value in plain.values())
    found = {}
    for name, value in plain.items():
        part = float((compiled[name] - value).norm()) / (float(value.norm()) + 1e-4 * largest)
        if not part < GRADIENT:
            found[name] = part
    return found


GRADIENT = 0.1
"""Part of its norm by which a gradient in bf16 may depend on the order of operations, with a ten-thousandth of the largest norm added."""


def prepare_engines() -> None:
    """Has ZeRO-3 shard even networks as small as these, but those that are differentiated twice, and begins with weights that all differ
    from zero: fresh blocks pass their input on, and little would depend on them. Convolutions in float32 take no TF32."""
    import torch

    from nexus_scale import train

    torch.backends.cudnn.allow_tf32 = False
    build = train.build_engine

    def built(nets: Any, averages: Any, settings: Any, *rest: Any) -> Any:
        nets = {name: replace(spec, fill=partial(_stir, spec.fill)) for name, spec in nets.items()}
        twice = any(spec.make().differentiated_twice for spec in nets.values())
        return build(nets, averages, settings if twice else settings.model_copy(update={"whole_numel": 0}), *rest)

    train.build_engine = built  # type: ignore[assignment]


def _stir(fill: Any, network: Any) -> None:
    """Adds N(0, 0.03^2) to all weights, after what else they begin with."""
    import torch

    if fill is not None:
        fill(network)
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.03)


def main() -> None:
    device, engine, folder, *names = sys.argv[1:]
    prepare_engines()
    found: dict[str, Any] = {}
    for name in names:
        try:
            if name in ("waits", "gradients"):
                found[name] = waits(device, engine) if name == "waits" else compiled_gradients(device)
            else:
                found[name] = learned(name, device, engine, Path(folder) / engine / name.replace("/", "_"))
        except Exception:
            found[name] = {"error": traceback.format_exc()}
        Path(folder, f"{engine}.json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # no wait for threads that a library left behind


if __name__ == "__main__":
    main()
