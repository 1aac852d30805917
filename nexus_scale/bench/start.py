"""Time from the command to the first optimizer step: ours on a local Ray, torchrun and stock Ray Train with the same worker.

Two gloo ranks of one thread run under ZeRO-3. Each command is a new process, and they take turns, so that what slows the machine down slows
all. A start is mostly imports on all cores: the ratio of a busy machine is near that of an idle one, its seconds are not.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nexus_scale.contracts import UserError

OURS = """
import sys, time, json
from pathlib import Path
from nexus_scale.orchestration.train import launch
folder = Path(sys.argv[1])
launch("nexus_scale.bench.start_worker:work", {"marks": str(folder / "marks.json")}, workers=2, run_folder=folder, threads_per_worker=1)
"""

STOCK = """
import sys
import ray
ray.init(address="local")
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from nexus_scale.bench.start_worker import work
folder = sys.argv[1]
TorchTrainer(
    work,
    train_loop_config={"marks": folder + "/marks.json"},
    scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(name="stock", storage_path=folder),
).fit()
"""


def run(rounds: int = 5, stock: bool = True) -> dict[str, Any]:
    """Seconds of each start, `rounds` times, after one of torchrun that only fills the disk cache.

    Args:
        stock: whether to measure stock Ray Train, too, which takes longest.
    Returns:
        `ratio`: ours over torchrun's, median of the rounds' ratios; `ours` and `peers` with the median seconds from command to
        each stage (`worker`: its function is entered, `imported`, `engine`, `step`) and to the command's `end`.
    """
    commands = {"ours": _ours, "torchrun": _torchrun, **({"ray_train": _stock} if stock else {})}
    _measure(_torchrun)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for turn in range(rounds):
        for name in list(commands) if turn % 2 == 0 else reversed(list(commands)):
            found[name].append(_measure(commands[name]))
    medians = {name: {stage: _median(results, stage) for stage in results[0]} for name, results in found.items()}
    return {
        "name": "start",
        "ratio": _ratio(found["ours"], found["torchrun"]),
        "ours": medians.pop("ours"),
        "peers": medians,
        "stock_ratio": _ratio(found["ray_train"], found["torchrun"]) if stock else None,
        "rounds": rounds,
        "cores": len(os.sched_getaffinity(0)),
        "versions": {name: version(name) for name in ("torch", "deepspeed", "ray")},
    }


def _median(results: list[dict[str, float]], stage: str) -> float:
    return statistics.median(result[stage] for result in results)


def _ratio(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    return statistics.median(a["step"] / b["step"] for a, b in zip(ours, theirs, strict=True))


def _ours(folder: Path) -> list[str]:
    return [sys.executable, "-c", OURS, str(folder)]


def _stock(folder: Path) -> list[str]:
    return [sys.executable, "-c", STOCK, str(folder)]


def _torchrun(folder: Path) -> list[str]:
    worker = Path(__file__).with_name("start_worker.py")
    # --standalone: a free port for the rendezvous.
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(worker),
        str(folder / "marks.json"),
    ]


def _measure(command: Any) -> dict[str, float]:
    """Seconds from the start of a command to each stage.

    Raises:
        UserError: the command failed; carries its last lines.
    """
    with tempfile.TemporaryDirectory(prefix="nexus-start-") as name:
        folder = Path(name)
        begun = time.time()
        done = subprocess.run(
            command(folder), env=environment_of_a_command(), capture_output=True, text=True, timeout=900
        )
        ended = time.time()
        if done.returncode != 0 or not (folder / "marks.json").exists():
            raise UserError(
                "\n".join(["bench start: a command failed:", *(done.stdout + done.stderr).strip().splitlines()[-15:]])
            )
        marks = json.loads((folder / "marks.json").read_text())
        return {**{stage: at - begun for stage, at in marks.items()}, "end": ended - begun}


def environment_of_a_command() -> dict[str, str]:
    """One thread per process, no GPU, this very code, and no token of a cluster that runs already."""
    root = str(Path(__file__).parents[2])  # of a source tree; an installed package is found without it
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")},
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }
