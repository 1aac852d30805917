"""A storm of kills: in every three minutes one worker of a real run is killed at a random moment. How much of the time is still training?

The run is `nexus train` on the tiny recipe, with two ZeRO-3 workers on this machine. Its heartbeats are polled ten times a second. Time in
which the run reaches a new step is productive; the rest goes to starts, recoveries and repeated steps.
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
    """What the heartbeats say. `kills`: (time, step); `recovered`: seconds from each kill to the first step of the new rank 0."""

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
            return  # a rank outlives a killed peer for a moment
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
        """Whether the run has recovered from the last kill, and has a checkpoint to resume from."""
        return self._killed is None and self.furthest >= 2 * EVERY


def run(minutes: float = 30.0, window_minutes: float = WINDOW_MINUTES, seed: int = 0) -> dict[str, Any]:
    """What a storm leaves of the training time.

    Args:
        minutes: how long, from the command on.
        window_minutes: each has one kill, at a random moment.
    Returns:
        `effective_training_time` (productive over wall time, of all and of what follows the first step), `recovery_s` and
        `lost_steps` (median and worst), `kills`, `at_cluster_scale`: 1 - (interval/2 + restart)/MTBF with the restart measured here.
    """
    with tempfile.TemporaryDirectory(prefix="nexus-storm-") as name:
        storm = RunFolder(Path(name) / "storm")
        account, first, wall = _stormed(storm, minutes, window_minutes, random.Random(seed))
        write_report(storm)
        results = json.loads(storm.results.read_text())
        lost = _lost(storm, account)
        told = incidents.read(storm.path)
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
        "at_cluster_scale": _at_cluster_scale(account.recovered),
        "incidents": {kind: sum(row["kind"] == kind for row in told) for kind in sorted({row["kind"] for row in told})},
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("torch", "deepspeed", "ray")},
    }


def _stormed(
    storm: RunFolder, minutes: float, window_minutes: float, draw: random.Random
) -> tuple[Account, float, float]:
    """Trains and kills: the account, the seconds to the first step, and those in all.

    Raises:
        UserError: the run failed; carries its last lines.
    """
    times = [60 * window_minutes * (number + draw.random()) for number in range(int(minutes / window_minutes))]
    root = str(storm.path.parent)
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
    environment = environment_of_a_command() | {"NEXUS_RUNS_ROOT": root, "NEXUS_DATA_ROOT": f"{root}/data"}
    with (storm.path.parent / "output.txt").open("w+") as output:
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
    return account, first, wall


def _at_cluster_scale(recovered: list[float]) -> dict[str, float] | None:
    """Effective training time on 16,384 GPUs, if a restart took as long there as here."""
    if not recovered:
        return None
    restart = statistics.median(recovered)
    effective = 1 - (INTERVAL_S / 2 + restart) / MTBF_S
    return {"mtbf_s": MTBF_S, "interval_s": INTERVAL_S, "restart_s": restart, "effective_training_time": effective}


def _watch(
    process: subprocess.Popen[bytes],
    storm: RunFolder,
    times: list[float],
    begun: float,
    seconds: float,
    draw: random.Random,
) -> tuple[Account, float]:
    """Polls and kills for so many seconds: the account, and the seconds from the command to the first step."""
    account, pending, first = Account(), list(times), 0.0
    while (now := time.monotonic() - begun) < seconds and process.poll() is None:
        beats = _beats(storm)
        if 0 in beats:
            account.see(now, *beats[0])
            first = first or (now if account.furthest else 0.0)
        # A kill that is due before the run has recovered from the last one waits.
        if pending and now >= pending[0] and account.training and len(beats) > 1:
            pending.pop(0)
            pid = beats[draw.choice(sorted(beats))][0]
            account.kill(now, beats[0][1])
            os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    return account, first


def _beats(storm: RunFolder) -> dict[int, tuple[int, int]]:
    """(pid, step) of the living processes, by rank."""
    found = {}
    for path in storm.path.glob("heartbeats/rank*.json"):
        beat = json.loads(path.read_text())
        if Path(f"/proc/{beat['pid']}").exists():
            found[int(beat["rank"])] = (int(beat["pid"]), int(beat["step"]))
    return found


def _lost(storm: RunFolder, account: Account) -> list[int]:
    """Steps repeated after each kill: from the step at the kill back to the step that the workers resumed from."""
    said = "".join(path.read_text(errors="replace") for path in sorted(storm.path.glob("attempts/*/rank_0.log")))
    resumed = [int(step) for step in re.findall(r"resuming after step (\d+)", said)]
    return [max(0, step - to) for (_, step), to in zip(account.kills, resumed, strict=False)]


def _spread(values: list[float]) -> dict[str, float] | None:
    return {"median": statistics.median(values), "worst": max(values)} if values else None
