"""The main job with real processes: every way to start it, and the same final bits whatever was killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nexus_scale import main_job
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.engine.checkpoint import newest
from tests import fuzz
from tests.distributed import nexus, script, until

REPOSITORY = Path(__file__).resolve().parents[2]
NEXUS = [sys.executable, "-m", "nexus_scale.cli"]
STEPS = 240
SETTINGS = [
    f"steps={STEPS}",
    "callbacks.checkpoint.every=40",
    "callbacks.validate.every=100",
    "callbacks.metrics.every=5",
]
TINY = ["mmdit/tiny_openmoji", "--tiny", *SETTINGS]


def start(root: Path, command: list[str]) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "NEXUS_RUNS_ROOT": str(root / "runs"),
        "NEXUS_DATA_ROOT": str(root / "data"),
    }
    return subprocess.Popen(
        command, cwd=root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: subprocess.Popen[str], seconds: float = 300) -> str:
    output, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, output
    return output


def final(root: Path, name: str) -> dict[str, torch.Tensor]:
    checkpoint = newest(RunFolder(root / "runs" / name).checkpoints)
    assert checkpoint is not None and checkpoint.step == STEPS
    return {key: checkpoint.tensor(key) for key in checkpoint.names}


def assert_same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys() and len(a) > 4
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def wait_for(condition: Callable[[], bool], seconds: float, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "deadline passed"
        time.sleep(0.05)


def committed(root: Path, name: str, step: int) -> bool:
    return any(int(p.name[5:]) >= step for p in (root / "runs" / name / "checkpoints").glob("step_" + "[0-9]" * 8))


def pid_of(root: Path, name: str, rank: int) -> int:
    return int(json.loads((root / "runs" / name / "heartbeats" / f"rank{rank}.json").read_text())["pid"])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run with two workers, started as the main job is, and what it printed."""
    root = tmp_path_factory.mktemp("whole")
    output = finish(start(root, [sys.executable, str(REPOSITORY / "launch" / "train_mmdit.py"), "--tiny", *SETTINGS]))
    return root, output


@pytest.mark.slow
@pytest.mark.ray
def test_main_job_trains_and_says_what_came_of_it(whole: tuple[Path, str]) -> None:
    root, output = whole
    run = root / "runs" / "mmdit_tiny_openmoji_tiny"
    last = output.strip().splitlines()[-1]
    assert last.startswith(f"done: {STEPS} steps, loss ") and "samples/s" in last and str(run / "report.html") in last
    results = json.loads((run / "results.json").read_text())
    assert results["steps"] == STEPS and results["workers"] == 2 and results["wall_seconds"] > 0
    assert json.loads((run / "environment.json").read_text())["kernels"]["attention"]["kernel"] == "sdpa"
    assert "<svg" in (run / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.ray
def test_a_killed_worker_and_a_killed_driver_change_no_bit_and_leave_nothing_running(
    whole: tuple[Path, str], tmp_path: Path
) -> None:
    process = start(tmp_path, [*NEXUS, "train", *TINY, "run=mine"])
    wait_for(lambda: committed(tmp_path, "mine", 80), 200, process)
    first = [pid_of(tmp_path, "mine", rank) for rank in (0, 1)]
    os.kill(first[1], signal.SIGKILL)
    wait_for(lambda: not any(pid_of(tmp_path, "mine", rank) in first for rank in (0, 1)), 200, process)
    wait_for(lambda: committed(tmp_path, "mine", 120), 200, process)
    workers = [pid_of(tmp_path, "mine", rank) for rank in (0, 1)]
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their driver"
        time.sleep(0.1)
    finish(start(tmp_path, [*NEXUS, "train", "runs/mine"]))
    assert_same_bits(final(whole[0], "mmdit_tiny_openmoji_tiny"), final(tmp_path, "mine"))
    rows = [json.loads(line)["step"] for line in (tmp_path / "runs/mine/metrics.jsonl").read_text().splitlines()]
    assert rows == sorted(set(rows)), "no row twice"


def nexus_at(root: Path, *arguments: str) -> tuple[int, str]:
    code, output = nexus(root, *arguments, NEXUS_RUNS_ROOT=str(root / "runs"), NEXUS_DATA_ROOT=str(root / "data"))
    assert "Traceback" not in output, output
    return code, output


def test_mistakes_end_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NEXUS_RUNS_ROOT", str(tmp_path / "runs"))
    for arguments, code, words in (
        (["train", "mmdit/tiny_openmojy"], 2, "did you mean"),
        (["train", *TINY, "globl_batch=3"], 2, "did you mean 'global_batch'"),
        (["train", *TINY, "cluster.workers=3"], 2, "does not divide"),
        (
            ["train", "flow_matching/cifar10_ot", "cluster.workers=2"],
            2,
            "takes 128 neighbours of the global batch together, and a micro-batch has 64",
        ),
        (
            ["train", "gan/dcgan_lsun", "cluster.workers=8"],
            2,
            "networks.model: normalises 32 neighbours of the global batch together, and a micro-batch has 16",
        ),
        (
            ["train", "gan/dcgan_lsun", "cluster.workers=[1,8]"],
            2,
            "and a micro-batch has 16",
        ),  # the one that fits all numbers
        (["train", *TINY, "cluster.wrkers=3"], 2, "did you mean 'workers'"),
        (["train", *TINY, "run=../../etc"], 2, "plain name"),
    ):
        got, output = fuzz.nexus(*arguments), capfd.readouterr().err
        assert got == code and words in output and "Traceback" not in output, (arguments, output)
    assert not (tmp_path / "runs").exists()


def test_data_mistakes_and_run_folder_mistakes(tmp_path: Path) -> None:
    absent = ["train", "vae/tiny_openmoji", "prepare=[]", "cluster.workers=0"]
    code, output = nexus_at(tmp_path, *absent)
    assert code == 3 and "openmoji-32/train/images" in output

    in_process = ["train", "mmdit/tiny_openmoji", "--tiny", "cluster.workers=0", "steps=2"]
    code, output = nexus_at(tmp_path, *in_process)
    assert code == 0, output
    code, output = nexus_at(tmp_path, *in_process, "optimizer.lr=0.5")
    assert code == 5 and "optimizer.lr: 0.002 -> 0.5" in output
    code, output = nexus_at(tmp_path, *in_process)
    assert code == 0 and "already trained to step 2" in output

    folder = tmp_path / "runs" / "mmdit_tiny_openmoji_tiny"
    hold = f"""
import time
from pathlib import Path
from nexus_scale import main_job
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.run.runs import locked
with locked(RunFolder(Path({str(folder)!r}))):
    print("held", flush=True)
    time.sleep(100)
"""
    log = tmp_path / "holder.log"
    holder = script(hold, log=log)
    try:
        until(lambda: log.exists() and log.read_text() == "held\n")
        code, output = nexus_at(tmp_path, *in_process)
        assert code == 5 and f'"pid": {holder.pid}' in output
    finally:
        holder.kill()
        holder.join()


def test_elastic_runs_take_the_numbers_of_workers_that_divide_the_batch(tmp_path: Path) -> None:
    def resolved(*overrides: str) -> main_job.Target:
        return main_job.resolve(
            "mmdit/tiny_openmoji", [f"cluster.paths.runs={tmp_path}", "global_batch=12", *overrides], tiny=True
        )

    fixed = resolved("cluster.workers=3")
    assert main_job.sizes_of(fixed) is None and main_job.worker_config(fixed)["cluster"]["micro_batch"] is None
    elastic = resolved("cluster.workers=[1,3]")
    assert main_job.sizes_of(elastic) == [1, 2, 3]
    assert main_job.worker_config(elastic)["cluster"]["micro_batch"] == 2, (
        "one that serves 12, 6 and 4 samples a worker"
    )
    assert main_job.sizes_of(resolved("cluster.workers=[1,6]", "cluster.micro_batch=2")) == [1, 2, 3, 6]
    with pytest.raises(UserError, match=r"numbers that do: \[1, 2, 3, 4, 6, 12\]"):
        resolved("cluster.workers=[7,11]")

    elastic.place.run.path.mkdir(parents=True)
    elastic.place.run.environment.write_text(
        json.dumps({"choices": {"precision": "float32", "micro_batch": 4, "kernels": {}}})
    )
    assert main_job.sizes_of(elastic) == [1, 3], "the run's first start froze its micro-batch"


def test_dry_run_of_the_papers_size(tmp_path: Path) -> None:
    code, output = nexus_at(tmp_path, "train", "mmdit/sd3_2b", "--cluster", "h100x64", "--dry-run")
    assert code == 0 and "(2.03 B)" in output and "micro-batch" in output
