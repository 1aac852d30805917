"""Time from the death of a worker to the next optimizer step: ours and stock Ray Train with the same worker function.

Two gloo ranks of one thread run under ZeRO-3, with the same checkpoints on both sides. Rank 1 kills itself (SIGKILL) some seconds into
training, so that the supervision alone is measured. Both are new commands and take turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nexus_scale.bench.start import environment_of_a_command
from nexus_scale.contracts import UserError

EVERY = 10
"""Steps between checkpoints."""

KILL_AT = 305
PAUSE_S = 0.1
"""A pause after each step, so that the worker dies some 35 s after the first one: as in a long run, not during the start."""

OURS = """
import json, sys
from pathlib import Path
from nexus_scale.orchestration.train import launch
folder = Path(sys.argv[1])
launch(
    "nexus_scale.bench.start_worker:work_until_killed", json.loads(sys.argv[2]), workers=2, run_folder=folder, threads_per_worker=1
)
"""

STOCK = """
import json, sys
import ray
ray.init(address="local")
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from nexus_scale.bench.start_worker import work_until_killed
TorchTrainer(
    work_until_killed,
    train_loop_config=json.loads(sys.argv[2]),
    scaling_config=ScalingConfig(num_workers=2),
    run_config=RunConfig(name="stock", storage_path=sys.argv[1], failure_config=FailureConfig(max_failures=3)),
).fit()
"""


def run(rounds: int = 3, stock: bool = True) -> dict[str, Any]:
    """Seconds of recovery of both, `rounds` times each, in turns.

    Returns:
        `ratio`: ours over stock Ray Train's, median of the rounds' ratios; `ours` and `peers`: median seconds from the kill to each
        stage of the new rank 0 (`worker`: its function is entered, `imported`, `engine`, `loaded`, `step`), `steps_per_s` and
        the largest `lost_steps`; `checkpoint_interval` in steps.
    """
    commands = {"ours": OURS, **({"ray_train": STOCK} if stock else {})}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for turn in range(rounds):
        for name in list(commands) if turn % 2 == 0 else reversed(list(commands)):
            found[name].append(_measure(commands[name]))
    figures = {name: _summary(results) for name, results in found.items()}
    ratios = [a["step"] / b["step"] for a, b in zip(found["ours"], found["ray_train"], strict=True)] if stock else []
    return {
        "name": "recovery",
        "ratio": statistics.median(ratios) if ratios else None,
        "ours": figures.pop("ours"),
        "peers": figures,
        "checkpoint_interval": EVERY,
        "rounds": rounds,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "deepspeed", "ray")},
    }


def _summary(results: list[dict[str, float]]) -> dict[str, float]:
    medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
    return {**medians, "lost_steps": max(result["lost_steps"] for result in results)}


def _measure(command: str) -> dict[str, float]:
    """Seconds from the kill to each stage of the restart, and how many steps were done twice.

    Raises:
        UserError: the command failed, or recovered from nothing; carries its last lines.
    """
    with tempfile.TemporaryDirectory(prefix="nexus-recovery-") as name:
        folder = Path(name)
        config = {"folder": name, "steps": KILL_AT + 25, "every": EVERY, "kill_at": KILL_AT, "pause_s": PAUSE_S}
        done = subprocess.run(
            [sys.executable, "-c", command, name, json.dumps(config)],
            env=environment_of_a_command(),
            capture_output=True,
            text=True,
            timeout=900,
        )
        starts = [json.loads(line) for line in _lines(folder / "starts.jsonl")]
        if done.returncode != 0 or len(starts) != 2:
            said = (done.stdout + done.stderr).strip().splitlines()[-15:]
            raise UserError("\n".join([f"bench recovery: {len(starts)} starts, expected 2:", *said]))
        killed = float((folder / "killed.txt").read_text())
        steps = [(float(at), int(step)) for at, step in (line.split() for line in _lines(folder / "steps.txt"))]
    before = [step for at, step in steps if at <= killed]
    first = next(step for at, step in steps if at > killed)
    return {
        **{stage: at - killed for stage, at in starts[1].items()},
        "lost_steps": max(before) - first + 1,
        "steps_per_s": (len(before) - 1) / (killed - steps[0][0]),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
