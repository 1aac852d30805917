"""`ray start --head` with a token, then `ray job submit`: the launcher works inside a job, and strangers are sent away."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexus_scale.contracts import UserError
from nexus_scale.orchestration import security
from nexus_scale.orchestration.cluster import submit
from tests.heads import REPOSITORY, Head, finish, ray_head

JOB = """
import json, os, sys
from pathlib import Path
from nexus_scale.orchestration.cluster import is_submitted_job, roots
from nexus_scale.orchestration.train import launch
from nexus_scale.config.recipe import Cluster
data, runs = roots(Cluster())
folder = runs / "toy"
folder.mkdir(parents=True)
result = launch("toy_worker:work", {"folder": str(folder)}, workers=2, cpus_per_worker=1, run_folder=folder, start_deadline_s=60)
(folder / "job.json").write_text(json.dumps({"result": result, "submitted": is_submitted_job(), "cwd": os.getcwd()}))
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("ray")
    with ray_head(folder / "token", folder / "runs") as started:
        yield started


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
    results = json.loads((head.runs / "mmdit_tiny_openmoji_tiny" / "results.json").read_text())
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
