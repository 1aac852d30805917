"""The head of the cluster dies: what runs on it dies too, what outlives it saves and leaves, and the same command goes on."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from nexus_scale.io import incidents
from nexus_scale.orchestration import head as heads
from nexus_scale.orchestration.cluster import submit
from tests.distributed import free_port, script, until
from tests.heads import REPOSITORY, Head, ray_head
from tests.orchestration.test_orchestration import a_driver
from tests.training_ranks import QUIET, Ranks, assert_same_end, newest_step

# ------------------------------------------------------------------------------------------- the watch itself

SILENT = """
import socket, sys, time
from nexus_scale.orchestration import head
port = int(sys.argv[1])
listening = socket.create_server(("127.0.0.1", port))
server = head.Server("the head", f"127.0.0.1:{port}", patience_s=1.5)
with head.watched([server]), head.last_act(lambda words: print("last act:", words, flush=True)):
    time.sleep(1.5)
    listening.close()
    time.sleep(float(sys.argv[2]))
    listening = socket.create_server(("127.0.0.1", port))
    time.sleep(2.5)
print("out of the watch", flush=True)
listening.close()
time.sleep(2.5)
"""


@pytest.mark.parametrize(("silent_s", "code"), [(0.1, 0), (60, heads.GONE)], ids=["comes back", "is gone"])
def test_a_program_ends_when_its_head_is_silent_for_too_long(tmp_path: Path, silent_s: float, code: int) -> None:
    log = tmp_path / "log"
    begun = time.monotonic()
    program = script(SILENT, str(free_port()), str(silent_s), log=log)
    program.join(30)
    assert program.exitcode == code, log.read_text()
    lines = log.read_text().splitlines()
    if code == 0:
        assert lines == ["out of the watch"], "and what is left is not watched"
    else:
        assert time.monotonic() - begun < 15
        assert lines[0].startswith("last act: the head at 127.0.0.1:"), lines
        assert lines[1].startswith("error: the head at 127.0.0.1:") and "same command" in lines[1]


@pytest.mark.parametrize(
    ("error", "listens"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "refused"), False),
        (TimeoutError("timed out"), False),
        (OSError(errno.EHOSTUNREACH, "no route"), False),
        (OSError(errno.EMFILE, "too many open files"), True),
    ],
    ids=lambda value: value.strerror or str(value) if isinstance(value, OSError) else "",
)
def test_what_says_that_a_server_is_silent(monkeypatch: pytest.MonkeyPatch, error: OSError, listens: bool) -> None:
    def connect(address: tuple[str, int], timeout: float) -> None:
        assert address == ("::1", 6379)
        raise error

    monkeypatch.setattr(socket, "create_connection", connect)
    assert heads._listens("[::1]:6379") == listens


def test_a_head_that_may_come_back_is_waited_for_but_not_as_long_as_ray_does() -> None:
    assert heads.patience_s(False, {}) == pytest.approx(40)
    assert heads.patience_s(False, {"RAY_gcs_rpc_server_reconnect_timeout_s": "9"}) == pytest.approx(6)
    assert heads.patience_s(True, {}) == 3


# ------------------------------------------------------------------------------------------- on a real Ray


@pytest.mark.ray
def test_workers_that_outlive_the_head_save_and_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a program's own Ray is killed, and nothing else: its workers could train on, unseen by all."""
    closed = Path(tempfile.mkdtemp(prefix="n", dir="/tmp"))  # the path of a socket may have 107 characters
    monkeypatch.setenv("RAY_TMPDIR", str(closed))
    with a_driver(tmp_path, "when asked") as (driver, family):
        until(lambda: (tmp_path / "steps.txt").exists())
        (gcs,) = [process for process in family if process.cmdline()[0].endswith("gcs_server")]
        workers = [psutil.Process(int(path.read_text())) for path in tmp_path.glob("start_*")]
        assert list(closed.glob("**/token"))
        gcs.kill()
        said, _ = driver.communicate(timeout=60)
        assert driver.returncode == heads.GONE, said.decode()
        assert not list(closed.glob("**/token")), "its Ray's token goes with it"
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
        for process in family:
            if process.is_running():
                process.kill()  # agents of Ray's own look for their head for a minute more
    shutil.rmtree(closed)
    assert re.match(r"error: the head of the Ray cluster at .* has not answered", said.decode().splitlines()[-1])
    (row,) = [row for row in incidents.read(tmp_path) if row["kind"] == "head_lost"]
    steps = [int(line.split()[0]) for line in (tmp_path / "steps.txt").read_text().splitlines()]
    assert steps[-1] > row["step"], "they trained on until they were asked to leave"
    saved = max(int(path.name[5:]) for path in (tmp_path / "checkpoints").glob("step_*"))
    assert saved == steps[-1], "no step is lost"


STEPS = 60
SETTINGS = [
    f"steps={STEPS}",
    "callbacks.checkpoint.every=20",
    "callbacks.validate=null",
    "callbacks.samples=null",
    "cluster.standby=false",
]
ASLEEP = "rank:1,step:45,phase:data,action:sleep,seconds:600"
"""So that the head dies while the run is between two checkpoints, and the processors are free for what else is started."""


JOB = """
import os, sys, time
from pathlib import Path
from nexus_scale.orchestration.cluster import connected
with connected():
    Path(sys.argv[1]).write_text(str(os.getpid()))
    time.sleep(600)
"""
"""What any program on the head does as long as it is connected; Ray itself lets it live on for a minute."""


@pytest.mark.slow
@pytest.mark.ray
def test_all_that_is_on_a_head_dies_with_it_and_the_same_command_goes_on_under_a_new_one(tmp_path: Path) -> None:
    runs, token = tmp_path / "runs", tmp_path / "token"
    run = runs / "mmdit_tiny_openmoji_tiny"
    with ray_head(token, runs, NEXUS_FAULT=ASLEEP) as head, training(tmp_path, head) as (program, log):
        folder = tmp_path / "job"
        folder.mkdir()
        (folder / "job.py").write_text(JOB)
        entrypoint = [sys.executable, "job.py", str(tmp_path / "pid")]
        submit(entrypoint, address=head.dashboard, working_dir=folder, timeout_s=120)
        until(lambda: (tmp_path / "pid").exists() and newest_step(run) == 40, 120)
        workers = [process for process in head.started() if "ray::Rank" in process.cmdline()[0]]
        assert len(workers) >= 2
        head.power_off()
        assert program.wait(20) == heads.GONE, log.read_text()
        _, alive = psutil.wait_procs([*workers, *processes(tmp_path / "pid")], timeout=20)
        assert not alive, [process.cmdline() for process in alive]
        left = contents(run)
    said = log.read_text().splitlines()
    assert said[-1].startswith("error: Ray's daemon on this machine at ") and "has not answered" in said[-1], said
    assert "Traceback" not in log.read_text()
    assert newest_step(run) == 40
    kinds = [row["kind"] for row in incidents.read(run) if row["kind"] != "straggler"]  # a busy machine may have one
    assert kinds == ["head_lost"]

    with ray_head(token, runs, dashboard=False) as head:
        assert contents(run) == left, "nobody has written since"
        with training(tmp_path, head) as (program, log):
            assert program.wait(120) == 0, log.read_text()
    assert any(line.startswith("resuming after step 40") for line in log.read_text().splitlines()), log.read_text()
    quiet = {**QUIET, "checkpoint": {"every": 20}}
    assert_same_end(Ranks(tmp_path / "whole", 2, steps=STEPS, callbacks=quiet).done().root, run)


@contextmanager
def training(folder: Path, head: Head) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The main job at its tiny size, as a program beside the cluster, and what it prints."""
    environment = {
        **os.environ,
        "RAY_ADDRESS": head.address,
        "NEXUS_RUNS_ROOT": str(head.runs),
        "PYTHONPATH": str(REPOSITORY),
    }
    command = [sys.executable, str(REPOSITORY / "launch" / "train_mmdit.py"), "--tiny", *SETTINGS]
    log = folder / "program.log"
    with log.open("w") as file:
        program = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        yield program, log
    finally:
        program.kill()
        program.wait()


def processes(file: Path) -> list[psutil.Process]:
    """The one whose number a file holds, if it still runs."""
    try:
        return [psutil.Process(int(file.read_text()))]
    except psutil.NoSuchProcess:
        return []


def contents(run: Path) -> dict[str, str]:
    """Every file of the run, with a hash of its bytes."""
    files = sorted(path for path in run.rglob("*") if path.is_file())
    return {str(path.relative_to(run)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}
