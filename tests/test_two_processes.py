"""`pytest -n 2` in a project of its own: a process that dies fails the test that it died in, and no other; Ray stays in one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CONFTEST = """
import os, pathlib, signal
import pytest
from tests.two_processes import RayApart

def pytest_xdist_make_scheduler(config, log):
    return RayApart(config, log)

@pytest.fixture(autouse=True)
def begun(request, worker_id):
    with open(pathlib.Path(__file__).with_name("begun"), "a") as file:
        file.write(f"{request.node.name} {worker_id}\\n")
    if request.node.name in os.environ["KILLED"].split():
        os.kill(os.getpid(), signal.SIGKILL)
"""
FILES = {
    "test_alone.py": "def test_alone(): pass",
    "test_few.py": "def test_few_1(): pass\ndef test_few_2(): pass",
    "test_ray_and_more.py": "import pytest\n"
    "@pytest.mark.ray\ndef test_ray_1(): pass\n"
    "@pytest.mark.ray\n@pytest.mark.parametrize('n', [1, 2])\ndef test_ray_2(n): pass\n"
    "def test_no_ray(): pass",
    "test_ray_too.py": "import pytest\npytestmark = pytest.mark.ray\ndef test_ray_3(): pass",
}
ALL = {
    "test_alone",
    "test_few_1",
    "test_few_2",
    "test_ray_1",
    "test_ray_2[1]",
    "test_ray_2[2]",
    "test_no_ray",
    "test_ray_3",
}


@pytest.mark.parametrize(
    "killed", [set(), {"test_ray_1", "test_alone"}, {"test_few_1", "test_no_ray", "test_ray_3"}, ALL], ids=len
)
def test_a_process_that_dies_fails_one_test_and_the_run_ends(killed: set[str], tmp_path: Path) -> None:
    for name, text in {"conftest.py": CONFTEST, "pytest.ini": "[pytest]\nmarkers = ray", **FILES}.items():
        (tmp_path / name).write_text(text)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "xdist",
            "-n2",
            "-rA",
            "-p",
            "no:cacheprovider",
            "--max-worker-restart",
            "9",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "KILLED": " ".join(killed), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    outcomes = {name: what for what, name in re.findall(r"^(PASSED|FAILED) \S+?::(\S+)", done.stdout, re.MULTILINE)}
    assert outcomes == {name: "FAILED" if name in killed else "PASSED" for name in ALL}, done.stdout + done.stderr
    assert done.returncode == (1 if killed else 0)
    begun = [line.split() for line in (tmp_path / "begun").read_text().splitlines()]
    assert sorted(name for name, _ in begun) == sorted(ALL), "each test began once"
    assert killed or len({worker for name, worker in begun if name.startswith("test_ray")}) == 1, (
        "Ray's share one process"
    )
