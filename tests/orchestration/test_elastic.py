"""Any number of workers that the batch allows: the arithmetic, and three raylets of which one is killed, comes back, and is drained."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from nexus_scale.io import incidents, leaving
from nexus_scale.orchestration import elastic

REPOSITORY = Path(__file__).parents[2]


def test_the_largest_number_that_divides_and_fits() -> None:
    sizes = elastic.allowed_sizes(12, 1, 6, micro_batch=None)
    assert sizes == [1, 2, 3, 4, 6]
    assert [elastic.largest(sizes, room) for room in (0, 1, 5, 6, 100)] == [0, 1, 4, 6, 6]
    assert elastic.allowed_sizes(12, 1, 6, micro_batch=2) == [1, 2, 3, 6]
    assert elastic.allowed_sizes(7, 2, 6, micro_batch=None) == []


@pytest.mark.parametrize(("batch", "least", "most"), [(12, 1, 3), (12, 1, 6), (256, 32, 64), (48, 2, 8), (7, 1, 7)])
def test_one_micro_batch_serves_at_every_number_of_workers(batch: int, least: int, most: int) -> None:
    micro = elastic.common_micro_batch(batch, least, most)
    sizes = elastic.allowed_sizes(batch, least, most, micro)
    assert sizes == elastic.allowed_sizes(batch, least, most, None)
    assert any((batch // size) % (2 * micro) for size in sizes), "the double would not serve"


def test_room_counts_whole_workers_and_what_the_run_itself_holds() -> None:
    nodes = {"a": {"CPU": 1.0, "GPU": 0.0}, "b": {"CPU": 8.0, "GPU": 3.0}, "c": {}}
    need = {"CPU": 2.0, "GPU": 1.0}
    assert elastic.room_for_workers(nodes, [], need) == 3
    assert elastic.room_for_workers(nodes, ["a", "a", "c"], need) == 6
    assert elastic.room_for_workers(nodes, ["gone"], need) == 3


# ------------------------------------------------------------------------------------------- on a cluster of three

DRIVER = """
import logging, sys
from pathlib import Path
from nexus_scale.contracts import Preempted, UserError
from nexus_scale.orchestration.train import launch
logging.basicConfig(level=logging.INFO, format="%(message)s")
folder, address, least = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
config = {"folder": str(folder), "ends": "when asked", "steps": 10**6, "pause_s": 0.1}
try:
    launch("toy_worker:work", config, workers=(least, 3) if least < 3 else 3, run_folder=folder, address=address, timeout_s=60,
           start_deadline_s=float(sys.argv[4]))
except Preempted as left:
    print("left", left.step)
    sys.exit(75)
except UserError as error:
    print(error)
    sys.exit(error.code)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head and two more nodes of one CPU each, in a folder of its own, so that nobody else attaches to them; tests leave three."""
    from ray.cluster_utils import Cluster

    from nexus_scale.orchestration import security

    folder = tempfile.mkdtemp(prefix="nx-", dir="/tmp")  # the path of a socket may have 107 characters
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
            patch.delenv(name, raising=False)
        security.use_token()
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        try:
            for _ in range(2):
                nodes.add_node(num_cpus=1)
            yield nodes
        finally:
            nodes.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def kill_with_children(node: Any) -> None:
    """What a power cut does to a machine: the raylet and all that it started, at once."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    family = [*raylet.children(recursive=True), raylet]
    for process in family:
        process.send_signal(signal.SIGSTOP)  # so that none can say goodbye
    for process in family:
        process.kill()


@contextmanager
def a_driver(folder: Path, address: str, least: int, deadline_s: float) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])}
    with (folder / "driver.log").open("w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(folder), address, str(least), str(deadline_s)],
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield driver
        finally:
            driver.kill()
            driver.wait()


def steps(folder: Path) -> list[tuple[int, int]]:
    """(step, workers) in the order in which they were done."""
    path = folder / "steps.txt"
    rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [(int(row[0]), int(row[1])) for row in rows]


def wait_for(condition: Callable[[], bool], seconds: float, driver: subprocess.Popen[str], folder: Path) -> float:
    begun = time.monotonic()
    while not condition():
        said = (folder / "driver.log").read_text()
        assert driver.poll() is None, said
        assert time.monotonic() - begun < seconds, said
        time.sleep(0.2)
    return time.monotonic() - begun


@pytest.mark.slow
@pytest.mark.ray
def test_a_fixed_number_without_a_spare_ends_by_the_deadline_with_a_clear_error(cluster: Any, tmp_path: Path) -> None:
    with a_driver(tmp_path, cluster.address, least=3, deadline_s=30) as driver:
        wait_for(lambda: steps(tmp_path)[-1:] > [(3, 3)], 240, driver, tmp_path)
        kill_with_children(lost := cluster.list_all_nodes()[-1])
        assert driver.wait(240) == 4, (tmp_path / "driver.log").read_text()
    said = (tmp_path / "driver.log").read_text()
    assert "3 workers" in said and "Traceback" not in said.splitlines()[-1], said
    cluster.remove_node(lost, allow_graceful=False)
    cluster.add_node(num_cpus=1)


@pytest.mark.slow
@pytest.mark.ray
def test_a_lost_machine_is_done_without_and_taken_back(cluster: Any, tmp_path: Path) -> None:
    with a_driver(tmp_path, cluster.address, least=1, deadline_s=120) as driver:
        wait_for(lambda: steps(tmp_path)[-1:] > [(3, 3)], 240, driver, tmp_path)
        kill_with_children(cluster.list_all_nodes()[-1])
        seconds = wait_for(lambda: steps(tmp_path)[-1][1] == 2, 240, driver, tmp_path)
        print(f"a machine was lost; the next step with two workers came after {seconds:.1f} s")

        back = cluster.add_node(num_cpus=1)
        seconds = wait_for(lambda: steps(tmp_path)[-1][1] == 3, 240, driver, tmp_path)
        print(f"it came back; the next step with three workers came after {seconds:.1f} s")

        before = steps(tmp_path)[-1][0]
        drain = [
            sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, "--node-id", back.node_id,
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "--deadline-remaining-seconds", "120",
        ]  # fmt: skip
        subprocess.run(drain, check=True, capture_output=True, timeout=120)
        wait_for(lambda: steps(tmp_path)[-1][1] == 2, 240, driver, tmp_path)

        leaving.ask(tmp_path, "enough")
        assert driver.wait(120) == leaving.LEFT, (tmp_path / "driver.log").read_text()
    done = [step for step, _ in steps(tmp_path)]
    assert sorted(set(done)) == list(range(1, max(done) + 1)), "no step is left out"
    assert [step for step in done if step >= before] == list(range(before, max(done) + 1)), "a notice costs no step"
    rows = incidents.read(tmp_path)
    assert [(row["before"], row["workers"]) for row in rows if row["kind"] == "resized"] == [(3, 2), (2, 3), (3, 2)]
    assert sum(row["kind"] == "node_lost" for row in rows) >= 1
    assert any(row["kind"] == "preempted" and "taken away" in row["message"] for row in rows)
