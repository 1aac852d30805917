"""What failures cost a run, and how often to save: by formula, and by a simulation of failures one by one.

Source: Young 1974, "A first order approximation to the optimum checkpoint interval"; Daly 2006, "A higher order estimate of the optimum
checkpoint interval for restart dumps", equations 20 (wall time) and 37 (interval).
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_scale.planner.ceilings import RESULTS, Rate

NODE_HOURS_BETWEEN_FAILURES = Rate(
    6340.0,
    "stated",
    "419 unexpected interruptions in 54 days on 16,384 H100s, 2,048 nodes: Llama Team 2024 (arXiv 2407.21783), section 3.3.4",
)


@dataclass(frozen=True)
class Saving:
    """How fast checkpoints are, as this project's benchmarks measured it on the CPU of one machine.

    Attributes:
        blocking: bytes a second of a node while training waits for a save. written, read: of a node, a save behind training, and a load.
        restart: seconds from a failure to the first step, without the load.
        smallest: bytes of what was measured. Less is not taken to be faster.
    """

    blocking: Rate
    written: Rate
    read: Rate
    restart: Rate
    smallest: float

    def block_s(self, node_bytes: float) -> float:
        return max(self.smallest, node_bytes) / self.blocking.value

    def save_s(self, node_bytes: float) -> float:
        return max(self.smallest, node_bytes) / self.written.value

    def recover_s(self, node_bytes: float) -> float:
        return self.restart.value + max(self.smallest, node_bytes) / self.read.value


def measured_saving(folder: Path = RESULTS) -> Saving:
    """From the committed results of `nexus bench checkpoint` and `nexus bench start`: a worker with a GPU has no spare, so that its
    restart is a start."""
    saved, started = (
        json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("checkpoint", "start")
    )
    size = saved["settings"]["bytes"]

    def rate(seconds: float) -> Rate:
        return Rate(size / seconds, "measured", f"nexus bench checkpoint, {saved['date']}: {saved['machine']}")

    ours: dict[str, Any] = saved["ours"]
    return Saving(
        rate(ours["blocking"]),
        rate(ours["total"]),
        rate(ours["load_2_to_1"]),
        Rate(started["ours"]["step"], "measured", f"nexus bench start, {started['date']}: {started['machine']}"),
        size,
    )


@dataclass(frozen=True)
class Faults:
    """Seconds. mean_s: between failures of the whole cluster. block_s: that a save stops training for. recover_s: from a failure until it
    trains again."""

    mean_s: float
    block_s: float
    recover_s: float


def young(faults: Faults) -> float:
    """Seconds of training between saves, to first order."""
    return math.sqrt(2 * faults.block_s * faults.mean_s)


def daly(faults: Faults) -> float:
    """Seconds of training between saves, to higher order."""
    part = faults.block_s / (2 * faults.mean_s)
    if part >= 1:
        return faults.mean_s
    return young(faults) * (1 + math.sqrt(part) / 3 + part / 9) - faults.block_s


def slowdown(interval: float, faults: Faults) -> float:
    """Wall time over training time where one saves every `interval` seconds of training, expected over failures at random."""
    mean = faults.mean_s
    exponent = (interval + faults.block_s) / mean
    if exponent > 500:
        return math.inf
    return mean / interval * math.exp(min(500.0, faults.recover_s / mean)) * math.expm1(exponent)


def simulate(training_s: float, interval: float, faults: Faults, seed: int) -> float:
    """Wall seconds of a run, failure by failure: times between failures are exponential, and a recovery may fail in turn."""
    rng = random.Random(seed)
    wall = done = 0.0
    next_failure = rng.expovariate(1 / faults.mean_s)

    def survives(seconds: float) -> bool:
        nonlocal wall, next_failure
        if wall + seconds <= next_failure:
            wall += seconds
            return True
        wall = next_failure
        next_failure = wall + rng.expovariate(1 / faults.mean_s)
        return False

    while done < training_s:
        part = min(interval, training_s - done)
        if survives(part + faults.block_s):
            done += part
            continue
        while not survives(faults.recover_s):
            pass
    return wall
