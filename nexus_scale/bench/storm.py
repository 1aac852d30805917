"""A storm of kills: one worker of a real run dies at a random moment of every three minutes; how much of the time still trains?

The run is `nexus train` on the tiny recipe, two ZeRO-3 workers on this machine. A poll of its heartbeats, ten times a second, is the
measure: time in which the run passed a step that it had never passed before is productive; the rest went to starts, recoveries and
steps that were done again.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nexus_scale.bench.start import environment_of_a_command
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.io import incidents, leaving
from nexus_scale.report.page import write_report

WINDOW_MINUTES = 3.0
POLL_S = 0.1
EVERY = 50
"""Steps between checkpoints."""

MTBF_S = 54 * 24 * 3600 / 419
"""Between two unexpected interruptions of 16,384 GPUs: 419 in 54 days (Llama Team 2024, section 3.3.4)."""

INTERVAL_S = 300.0
"""Between checkpoints, for the same cluster."""

SETTINGS = (
    "steps=10000000",  # the storm ends it
    f"callbacks.checkpoint={{every: {EVERY}, keep: 2}}",
    "callbacks.metrics={every: 50}",
    f"callbacks.watchdog={{beat_seconds: {POLL_S}}}",
    "callbacks.validate=null",
    "callbacks.samples=null",
    "cluster.max_failures=1000",
)


@dataclass
class Account:
    """What the heartbeats told. `kills`: (time, step at it); `recovered`: seconds from each to the first step of the new rank 0."""

    furthest: int = 0
    productive_s: float = 0.0
    recovered: list[float] = field(default_factory=list)
    kills: list[tuple[float, int]] = field(default_factory=list)
    _pid: int | None = None
    _dying: int | None = None
    _killed: float | None = None
    _first: int | None = None
    _last: float | None = None

    def see(self, now: float, pid: int, step: int) -> None:
        """One poll of rank 0's heartbeat, at `now` seconds."""
        if pid == self._dying:
            return  # survives a killed peer for a moment
        if pid != self._pid:
            self._pid, self._first, self._last = pid, step, None
        elif self._killed is not None and self._first is not None and step > self._first:
            self.recovered.append(now - self._killed)
            self._killed = None
        if step > self.furthest:
            if self._last is not None:
                self.productive_s += now - self._last
            self.furthest = step
        self._last = now

    def kill(self, now: float, step: int) -> None:
        self.kills.append((now, step))
        self._killed, self._dying = now, self._pid

    @property
    def training(self) -> bool:
        """Whether the last kill is over and done with, and a checkpoint is there to go on from."""
        return self._killed is None and self.furthest >= 2 * EVERY


def run(minutes: float = 30.0, window_minutes: float = WINDOW_MINUTES, seed: int = 0) -> dict[str, Any]:
    """Runs the storm.

    Args:
        minutes: how long, from the command on.
        window_minutes: one kill at a random moment of each.
    Returns:
        `effective_training_time` (productive over wall, of all and of what came after the first step), `recovery_s` and
        `lost_steps` (median and worst), `kills`, `at_cluster_scale`: 1 - (interval/2 + restart)/MTBF with the restart measured here.
    """
    draw = random.Random(seed)
    count = int(minutes / window_minutes)
    times = [60 * window_minutes * (number + draw.random()) for number in range(count)]
    with tempfile.TemporaryDirectory(prefix="nexus-storm-") as name:
        folder = Path(name)
        storm = RunFolder(folder / "storm")
        with (folder / "output.txt").open("w+") as output:
            command = [
                sys.executable,
                "-m",
                "nexus_scale.cli",
                "train",
                "mmdit/tiny_openmoji",
                "--tiny",
                "run=storm",
                *SETTINGS,
            ]
            environment = environment_of_a_command() | {"NEXUS_RUNS_ROOT": name, "NEXUS_DATA_ROOT": f"{name}/data"}
            begun = time.monotonic()
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
            try:
                account, first = _watch(process, storm, times, begun, 60 * minutes, draw)
                wall = time.monotonic() - begun
                leaving.ask(storm.path, "the storm is over")
                process.wait(timeout=300)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait(timeout=60)
            output.seek(0)
            said = output.read()
        if process.returncode not in (0, leaving.LEFT):
            raise UserError("\n".join(["bench storm: the run failed:", *said.strip().splitlines()[-15:]]), code=1)
        write_report(storm)
        results = json.loads(storm.results.read_text())
        lost = _lost(storm, account)
        told = incidents.read(storm.path)
    restart = statistics.median(account.recovered) if account.recovered else None
    return {
        "name": "storm",
        "minutes": minutes,
        "kills": len(account.kills),
        "steps": account.furthest,
        "effective_training_time": account.productive_s / wall,
        "effective_after_first_step": account.productive_s / (wall - first),
        "effective_by_the_runs_own_account": results.get("effective_training_time"),
        "seconds_to_first_step": first,
        "recovery_s": _spread(account.recovered),
        "lost_steps": _spread([float(steps) for steps in lost]),
        "checkpoint_interval": EVERY,
        "at_cluster_scale": None
        if restart is None
        else {
            "mtbf_s": MTBF_S,
            "interval_s": INTERVAL_S,
            "restart_s": restart,
            "effective_training_time": 1 - (INTERVAL_S / 2 + restart) / MTBF_S,
        },
        "incidents": {kind: sum(row["kind"] == kind for row in told) for kind in sorted({row["kind"] for row in told})},
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "deepspeed", "ray")},
    }


def _watch(
    process: subprocess.Popen[bytes],
    storm: RunFolder,
    times: list[float],
    begun: float,
    seconds: float,
    draw: random.Random,
) -> tuple[Account, float]:
    """Polls and kills until so many seconds are over.

    Returns:
        the account, and the seconds from the command to the first step.
    """
    account, pending, first = Account(), list(times), 0.0
    while (now := time.monotonic() - begun) < seconds and process.poll() is None:
        beats = _beats(storm)
        if 0 in beats:
            account.see(now, *beats[0])
            first = first or (now if account.furthest else 0.0)
        # A kill that is due while the one before is not over waits for a run that trains.
        if pending and now >= pending[0] and account.training and len(beats) > 1:
            pending.pop(0)
            pid = beats[draw.choice(sorted(beats))][0]
            account.kill(now, beats[0][1])
            os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    return account, first


def _beats(storm: RunFolder) -> dict[int, tuple[int, int]]:
    """(pid, step) by rank, of processes that live."""
    found = {}
    for path in storm.path.glob("heartbeats/rank*.json"):
        beat = json.loads(path.read_text())
        if Path(f"/proc/{beat['pid']}").exists():
            found[int(beat["rank"])] = (int(beat["pid"]), int(beat["step"]))
    return found


def _lost(storm: RunFolder, account: Account) -> list[int]:
    """Steps done again after each kill: from where the run was to where the workers said that they go on."""
    said = "".join(path.read_text(errors="replace") for path in sorted(storm.path.glob("attempts/*/rank_0.log")))
    resumed = [int(step) for step in re.findall(r"goes on after step (\d+)", said)]
    return [max(0, step - to) for (_, step), to in zip(account.kills, resumed, strict=False)]


def _spread(values: list[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "worst": max(values)} if values else None
