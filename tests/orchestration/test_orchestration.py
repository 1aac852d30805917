"""Workers on a real local Ray: placed, joined, killed, restarted, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from nexus_scale.config.recipe import Cluster
from nexus_scale.contracts import Preempted, UserError
from nexus_scale.io import incidents, leaving
from nexus_scale.orchestration import security
from nexus_scale.orchestration.cluster import Connection, check_resources, connected, roots
from nexus_scale.orchestration.train import launch

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def local_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    """One cluster for all tests of this file; the launcher uses it, as it is in this process. TMPDIR is too long for its sockets."""
    long = tmp_path_factory.mktemp("a_folder_of_which_the_name_alone_is_longer_than_half_of_a_path_of_a_socket")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_TMPDIR", raising=False)
        patch.setattr(tempfile, "tempdir", str(long))
        with connected() as connection:
            yield connection
            session = security.session_folder()
            assert session.is_dir() and not session.is_relative_to(long)
    assert not list(session.glob("session_*/sockets")), "sockets go with the cluster"


def start(folder: Path, **changes: Any) -> dict[str, Any]:
    config = {"folder": str(folder), "ends": changes.pop("ends", None)}
    options: dict[str, Any] = {
        "workers": 2,
        "cpus_per_worker": 0.5,
        "start_deadline_s": 60,
        "timeout_s": 60,
        "threads_per_worker": 1,
    }
    return launch("toy_worker:work", config, run_folder=folder, **(options | changes))


def starts(folder: Path, rank: int) -> int:
    return len(list(folder.glob(f"start_{rank}_*")))


def test_a_local_cluster_has_one_node() -> None:  # first, as no Ray may run in this process yet
    with pytest.raises(UserError, match="nodes 2"), connected(nodes=2):
        pass


def test_two_workers_join_and_rank_zero_is_heard(
    local_ray: Connection, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = start(tmp_path, environment={"COLOUR": "blue"})
    assert result == {"sum": 3.0, "threads": 1, "colour": "blue"}
    heard = capsys.readouterr().out
    assert "rank 0 of 2 sums 3" in heard
    assert "rank 1" not in heard
    (attempt,) = [path for path in (tmp_path / "attempts").iterdir() if (path / "rank_1.log").exists()]
    assert "rank 1 of 2 sums 3" in (attempt / "rank_1.log").read_text()


def test_a_name_is_never_used_twice(local_ray: Connection, tmp_path: Path) -> None:
    start(tmp_path)
    start(tmp_path)
    assert starts(tmp_path, 0) == 2


def test_a_killed_worker_is_restarted(local_ray: Connection, tmp_path: Path) -> None:
    assert start(tmp_path, ends="killed once", max_failures=1)["sum"] == 3.0
    assert starts(tmp_path, 0) == starts(tmp_path, 1) == 2


def test_a_users_mistake_comes_home_and_is_not_retried(local_ray: Connection, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="colour 7: expected 1 to 6") as caught:
        start(tmp_path, ends="user error", max_failures=3)
    assert caught.value.code == 3
    assert starts(tmp_path, 1) == 1


def test_a_run_that_was_asked_to_leave_says_after_which_step(local_ray: Connection, tmp_path: Path) -> None:
    with pytest.raises(Preempted) as caught:
        start(tmp_path, ends="preempted", max_failures=3)
    assert caught.value.step == 41
    assert starts(tmp_path, 1) == 1


def test_the_same_bug_at_the_same_step_is_not_tried_a_third_time_and_comes_home_with_its_traceback(
    local_ray: Connection, tmp_path: Path
) -> None:
    told = r"same error came twice at step 0(.|\n)*in _end(.|\n)*ZeroDivisionError: a bug of ours"
    with pytest.raises(RuntimeError, match=told):
        start(tmp_path, ends="bug", max_failures=5)
    assert starts(tmp_path, 1) == 2
    kinds = [row["kind"] for row in incidents.read(tmp_path)]
    assert kinds == ["worker_failed", "restarted", "worker_failed", "gave_up"]


def test_out_of_memory_is_the_users_to_mend_and_not_tried_again(local_ray: Connection, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rank \d ran out of memory: CUDA out of memory") as caught:
        start(tmp_path, ends="out of memory", max_failures=5)
    assert caught.value.code == 4 and "Traceback" not in str(caught.value)
    assert starts(tmp_path, 1) == 1


def test_a_process_that_is_killed_again_and_again_is_retried_to_the_bound(
    local_ray: Connection, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match="failed 3 times without a new checkpoint"):
        start(tmp_path, ends="killed", max_failures=2, backoff_s=0.1)
    assert starts(tmp_path, 1) == 3
    lost = [row for row in incidents.read(tmp_path) if row["kind"] == "worker_lost"]
    assert len(lost) == 3 and {row["rank"] for row in lost} == {1}
    attempts = [json.loads(path.read_text()) for path in sorted((tmp_path / "attempts").glob("*/attempt.json"))]
    assert len(attempts) == 3
    for attempt in attempts:
        assert attempt["workers"] == 2 and attempt["outcome"] == "failed" and attempt["end"] > attempt["begin"]
    assert {row["attempt"] for row in lost} == {attempt["attempt"] for attempt in attempts}


def test_too_few_cpus_are_refused_before_any_worker_starts(local_ray: Connection, tmp_path: Path) -> None:
    there = len(os.sched_getaffinity(0))
    begun = time.monotonic()
    with pytest.raises(UserError, match=rf"1 node with {there} CPUs and 0 GPUs") as caught:
        start(tmp_path, workers=there + 1, cpus_per_worker=1, start_deadline_s=60)
    assert caught.value.code == 4
    assert time.monotonic() - begun < 30, "a cluster that cannot grow is refused at once"
    assert starts(tmp_path, 0) == 0


def test_a_cluster_that_may_grow_is_waited_for_until_the_deadline(local_ray: Connection) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"within 1\.5 s") as caught:
        check_resources(2, cpus=1, gpus=1, deadline_s=1.5, grows=True)
    assert caught.value.code == 4
    assert 1.5 <= time.monotonic() - begun < 15


def test_the_local_cluster_is_out_of_reach_for_other_users_and_machines(local_ray: Connection) -> None:
    """Its folder is closed, and every server that it, its workers and this program have listens on loopback alone."""
    assert stat.S_IMODE(security.private_folder().stat().st_mode) == 0o700
    me = psutil.Process()
    names = set()
    for process in [me, *me.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):  # a worker that ends
            listening = [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
            names |= {process.name() for _ in listening}
            assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}, process.cmdline()
    assert {"gcs_server", "raylet"} <= names


def test_the_local_cluster_asks_for_a_token_that_only_this_user_can_read(local_ray: Connection) -> None:
    import ray

    assert security.auth_mode() == "token"
    assert stat.S_IMODE(os.stat(os.environ["RAY_AUTH_TOKEN_PATH"]).st_mode) == 0o600
    stranger = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | {"RAY_AUTH_MODE": "disabled"}
    listing = "import sys; from ray._raylet import GcsClient; print(GcsClient(address=sys.argv[1]).get_all_node_info(timeout=10))"
    address = ray.get_runtime_context().gcs_address
    anonymous = subprocess.run(
        [sys.executable, "-c", listing, address], env=stranger, capture_output=True, text=True, timeout=120
    )
    known = subprocess.run([sys.executable, "-c", listing, address], capture_output=True, text=True, timeout=120)
    assert known.returncode == 0, known.stderr
    assert anonymous.returncode != 0, anonymous.stdout


DRIVER = """
import sys
from pathlib import Path
from nexus_scale.contracts import Preempted
from nexus_scale.orchestration.train import launch
folder, ends = Path(sys.argv[1]), sys.argv[2]
config = {"folder": str(folder), "ends": ends, "steps": 10**6}
try:
    launch("toy_worker:work", config, workers=2, cpus_per_worker=0.5, run_folder=folder)
except Preempted as left:
    print(left.step)
    sys.exit(75)
"""


@contextlib.contextmanager
def a_driver(folder: Path, ends: str) -> Iterator[tuple[subprocess.Popen[bytes], list[psutil.Process]]]:
    """A program that runs two workers, once both have started, and all of its processes."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    environment["PYTHONPATH"] = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(folder), ends],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        end = time.monotonic() + 240
        while (starts(folder, 0) and starts(folder, 1)) == 0:
            assert driver.poll() is None, driver.stdout.read().decode() if driver.stdout else ""
            assert time.monotonic() < end, "the workers did not start"
            time.sleep(0.2)
        family = psutil.Process(driver.pid).children(recursive=True)
        workers = {int(path.read_text()) for path in folder.glob("start_*")}
        assert workers <= {process.pid for process in family}
        yield driver, family
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive
    finally:
        driver.kill()


def test_a_terminated_driver_lets_its_workers_save_and_leave(tmp_path: Path) -> None:
    with a_driver(tmp_path, "when asked") as (driver, _):
        end = time.monotonic() + 60
        while not (tmp_path / "steps.txt").exists():
            assert time.monotonic() < end
            time.sleep(0.1)
        driver.send_signal(signal.SIGTERM)
        said, _ = driver.communicate(timeout=60)
        assert driver.returncode == leaving.LEFT, said.decode()
    done = int((tmp_path / "steps.txt").read_text().splitlines()[-1].split()[0])
    assert said.decode().splitlines()[-1] == str(done), "no step is lost"


def test_a_second_signal_ends_the_driver_at_once_and_leaves_no_process_behind(tmp_path: Path) -> None:
    with a_driver(tmp_path, "asleep") as (driver, _):
        driver.send_signal(signal.SIGTERM)
        end = time.monotonic() + 60
        while leaving.asked(tmp_path) is None:
            assert time.monotonic() < end
            time.sleep(0.1)
        assert driver.poll() is None, "it waits for the workers"
        driver.send_signal(signal.SIGTERM)
        said, _ = driver.communicate(timeout=60)
        assert driver.returncode == 128 + signal.SIGTERM, said.decode()


# ------------------------------------------------------------------------------------------- without Ray


@pytest.mark.parametrize("name", ["WANDB_API_KEY", "GITHUB_TOKEN", "my_secret", "DB_PASSWORD"])
def test_a_secret_is_refused_by_name_and_not_repeated(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=name) as caught:
        start(tmp_path, environment={name: "canary-7231"})
    assert "canary" not in str(caught.value)
    with pytest.raises(UserError, match=name):
        security.refuse_secrets({}, ["python", "train.py", f"{name}=canary-7231"])


def test_counts_of_tokens_are_no_secret() -> None:
    security.refuse_secrets(
        {"OMP_NUM_THREADS": "1"}, ["configs/key_frames.yaml", "data.text_tokens=16", "steps=3", "--debug"]
    )


def test_an_open_cluster_of_several_nodes_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    security.refuse_open_cluster(1, "disabled", {})
    security.refuse_open_cluster(3, "token", {})
    with pytest.raises(UserError, match="3 nodes and no token") as caught:
        security.refuse_open_cluster(3, "disabled", {})
    assert caught.value.code == 4
    security.refuse_open_cluster(3, "disabled", {security.ALLOW_OPEN_CLUSTER: "1"})
    assert "can run commands" in caplog.text


def test_roots_of_a_local_run_and_of_a_submitted_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable in ("NEXUS_DATA_ROOT", "NEXUS_RUNS_ROOT", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(variable, raising=False)
    assert roots(Cluster()) == (tmp_path / "data", tmp_path / "runs")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    home = tmp_path / "home" / "nexus_scale"
    assert roots(Cluster()) == (home / "data", home / "runs")
    monkeypatch.setenv("NEXUS_RUNS_ROOT", "/shared/runs")
    assert roots(Cluster()) == (home / "data", Path("/shared/runs"))
    assert roots(Cluster.model_validate({"paths": {"runs": "/other"}}))[1] == Path("/other")
