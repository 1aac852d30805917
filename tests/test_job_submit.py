"""`ray start --head` with a token, then `ray job submit`: the launcher works inside a job, and strangers are sent away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from distributed import free_port

from nexus_scale.contracts import UserError
from nexus_scale.orchestration import security
from nexus_scale.orchestration.cluster import job_status, submit

REPOSITORY = Path(__file__).parents[1]

JOB = """
import json, os, sys
from pathlib import Path
from nexus_scale.orchestration.cluster import is_submitted_job, roots
from nexus_scale.orchestration.train import launch
from nexus_scale.recipe import Cluster
data, runs = roots(Cluster())
folder = runs / "toy"
folder.mkdir(parents=True)
result = launch("toy_worker:work", {"folder": str(folder)}, workers=2, cpus_per_worker=1, run_folder=folder, start_deadline_s=60)
(folder / "job.json").write_text(json.dumps({"result": result, "submitted": is_submitted_job(), "cwd": os.getcwd()}))
"""


@dataclass(frozen=True)
class Head:
    """A Ray head with its dashboard, and the root that it gives to runs."""

    dashboard: str
    runs: Path


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("ray")
    token = security.write_token(folder / "token")
    temp = Path("/tmp") / f"nexus-ray-{os.getpid()}"  # sockets' paths are limited to 107 characters
    ports = {
        name: free_port() for name in ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port")
    }
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "NEXUS_RUNS_ROOT": str(folder / "runs"),
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")]),
    }
    ray = str(Path(sys.executable).with_name("ray"))
    command = [
        ray,
        "start",
        "--head",
        "--num-cpus=2",
        "--dashboard-host=127.0.0.1",
        f"--temp-dir={temp}",
        "--object-store-memory=200000000",
    ]
    command += [f"--{name}={port}" for name, port in ports.items()]
    patched = pytest.MonkeyPatch()
    try:
        subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            patched.setenv(name, environment[name])
        yield Head(f"http://127.0.0.1:{ports['dashboard-port']}", folder / "runs")
    finally:
        patched.undo()
        _end_all(str(temp))


def _end_all(temp: str) -> None:
    """Ends the processes of this head alone: those that name its folder, and what they started."""
    ours = []
    for process in psutil.process_iter(["cmdline"]):
        if any(temp in word for word in process.info["cmdline"] or []):
            ours += [process, *process.children(recursive=True)]
    for process in ours:
        if process.is_running():
            process.kill()
    _, alive = psutil.wait_procs(ours, timeout=20)
    assert not alive


def finish(job: str, head: Head) -> str:
    """Waits for the job's end and returns what it printed; it must have succeeded."""
    end = time.monotonic() + 400
    while (status := job_status(job, head.dashboard)) not in ("SUCCEEDED", "FAILED", "STOPPED"):
        assert time.monotonic() < end, status
        time.sleep(1)
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "job", "logs", "--address", head.dashboard, job]
    logs = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert status == "SUCCEEDED", logs.stdout + logs.stderr
    return logs.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_trains_on_the_cluster_that_runs_it(head: Head, tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(JOB)
    job = submit([sys.executable, "job.py"], address=head.dashboard, working_dir=tmp_path, timeout_s=120)
    assert "rank 0 of 2 sums 3" in finish(job, head)
    told = json.loads((head.runs / "toy" / "job.json").read_text())
    assert told["result"]["sum"] == 3.0
    assert told["submitted"]
    assert told["cwd"] != str(tmp_path), "a job runs in a copy of the working folder"


@pytest.mark.slow
@pytest.mark.ray
def test_the_main_job_submitted(head: Head) -> None:
    """`ray job submit --working-dir . -- python launch/train_mmdit.py`, at its tiny size."""
    entrypoint = [sys.executable, "launch/train_mmdit.py", "--tiny", "steps=20"]
    job = submit(entrypoint, address=head.dashboard, working_dir=REPOSITORY, timeout_s=120)
    finish(job, head)
    results = json.loads((head.runs / "mmdit_tiny_openmoji" / "results.json").read_text())
    assert results["steps"] == 20 and results["workers"] == 2


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(("method", "path"), [("POST", "/api/jobs/"), ("GET", "/api/jobs/"), ("DELETE", "/api/jobs/x")])
def test_strangers_are_sent_away(head: Head, method: str, path: str) -> None:
    body = json.dumps({"entrypoint": "id"}).encode() if method == "POST" else None
    request = urllib.request.Request(head.dashboard + path, body, {"Content-Type": "application/json"}, method=method)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=30)
    assert caught.value.code == 401
    known = urllib.request.Request(head.dashboard + "/api/jobs/", headers=security.bearer())
    with urllib.request.urlopen(known, timeout=30) as answer:
        assert answer.status == 200


def test_a_job_with_a_secret_is_not_submitted(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="WANDB_API_KEY"):
        submit(
            ["python", "job.py"],
            address="http://127.0.0.1:1",
            working_dir=tmp_path,
            environment={"WANDB_API_KEY": "canary"},
        )
    with pytest.raises(UserError, match="--token"):
        submit(["python", "job.py", "--token", "canary"], address="http://127.0.0.1:1", working_dir=tmp_path)
