"""Heads of Ray clusters for tests: `ray start --head` with a token, what it consists of, and its end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from nexus_scale.orchestration import security
from nexus_scale.orchestration.cluster import job_status
from tests.distributed import free_port

REPOSITORY = Path(__file__).resolve().parents[1]
PORTS = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "metrics-export-port",
    "ray-client-server-port",
)
RAY = str(Path(sys.executable).with_name("ray"))


@dataclass
class Head:
    """A Ray head with its dashboard, and the root that it gives to runs.

    Attributes:
        address: of the GCS, as RAY_ADDRESS takes it. `dashboard`: where jobs are submitted.
        temp: its folder, which its own processes name on their command lines.
        orphans: what its servers had started when they were killed.
    """

    address: str
    dashboard: str
    runs: Path
    temp: Path
    orphans: list[psutil.Process] = field(default_factory=list)

    def servers(self) -> list[psutil.Process]:
        """GCS, raylet, dashboard and what else `ray start` started; no worker."""
        return [
            process
            for process in psutil.process_iter(["cmdline"])
            if any(str(self.temp) in word for word in process.info["cmdline"] or [])
        ]

    def started(self) -> list[psutil.Process]:
        """What the servers started in turn: workers, the programs of submitted jobs, agents of Ray's own."""
        servers = self.servers()
        below = {child.pid: child for process in servers for child in _children(process)}
        return [child for pid, child in below.items() if pid not in {process.pid for process in servers}]

    def power_off(self) -> None:
        """Ends the servers at once, so that none of them can end, or say anything to, what it started."""
        servers = self.servers()
        self.orphans = self.started()
        for process in servers:
            process.send_signal(signal.SIGSTOP)
        for process in servers:
            process.kill()
        _, alive = psutil.wait_procs(servers, timeout=20)
        assert not alive

    def end(self) -> None:
        """Ends the processes of this head alone: its servers, and what they started."""
        ours = [*self.servers(), *self.started(), *self.orphans]
        for process in ours:
            if process.is_running():
                process.kill()
        _, alive = psutil.wait_procs(ours, timeout=20)
        assert not alive


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:  # it ended meanwhile, and what it had started is somebody else's
        return []


@contextmanager
def ray_head(token: Path, runs: Path, *, dashboard: bool = True, **variables: str) -> Iterator[Head]:
    """`ray start --head` with a token; this process, and what it starts, knows the token while within.

    Args:
        token: file of the token, made where there is none; Ray reads it once in a process, so one serves all heads of a test.
        runs: root of the runs, given to all that runs on the head.
        dashboard: whether jobs can be submitted; a dozen processes.
        variables: others of its environment.
    """
    if not token.exists():
        security.write_token(token)
    temp = Path(tempfile.mkdtemp(prefix="nexus-ray-", dir="/tmp"))  # sockets' paths are limited to 107 characters
    ports = {name: free_port() for name in PORTS}
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "NEXUS_RUNS_ROOT": str(runs),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
        **variables,
    }
    command = [
        RAY,
        "start",
        "--head",
        "--num-cpus=2",
        "--dashboard-host=127.0.0.1",
        f"--temp-dir={temp}",
        "--object-store-memory=200000000",
        f"--include-dashboard={dashboard}",
        "--include-log-monitor=false",  # it would read the files of workers that write none
        "--no-monitor",  # an autoscaler without machines to start
    ]
    command += [f"--{name}={port}" for name, port in ports.items()]
    head = Head(f"127.0.0.1:{ports['port']}", f"http://127.0.0.1:{ports['dashboard-port']}", runs, temp)
    with pytest.MonkeyPatch.context() as patched:
        try:
            subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
            for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
                patched.setenv(name, environment[name])
            yield head
        finally:
            head.end()
            shutil.rmtree(temp, ignore_errors=True)


def finish(job: str, head: Head) -> str:
    """Waits for the job's end and returns what it printed; it must have succeeded."""
    end = time.monotonic() + 400
    while (status := job_status(job, head.dashboard)) not in ("SUCCEEDED", "FAILED", "STOPPED"):
        assert time.monotonic() < end, status
        time.sleep(1)
    command = [RAY, "job", "logs", "--address", head.dashboard, job]
    logs = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert status == "SUCCEEDED", logs.stdout + logs.stderr
    return logs.stdout
