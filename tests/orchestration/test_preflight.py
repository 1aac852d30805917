"""What must hold on all machines before a run on several: each planted difference is found and named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nexus_scale.contracts import UserError
from nexus_scale.orchestration.preflight import Seen, _offset, compare

REPOSITORY = Path(__file__).parents[2]
GOOD = Seen("a" * 56, "one", "nonce", True, 10 * 2**30, {"python": "3.11.4", "torch": "2.13.0"}, "c0de")
OTHER = replace(GOOD, node="b" * 56, host="two", clock_s=0.4)


def test_machines_that_agree_pass(tmp_path: Path) -> None:
    compare([GOOD, OTHER], "nonce", tmp_path, 2**30)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"marker": None}, 5, "does not see"),
        ({"marker": "another run's"}, 5, "does not see"),
        ({"writable": False}, 5, "cannot write"),
        ({"versions": {"python": "3.11.4", "torch": "2.12.1"}}, 4, "torch 2.12.1, one has 2.13.0"),
        ({"versions": {"python": "3.11.4"}}, 4, "torch absent"),
        ({"code": "beef"}, 4, "other source"),
        ({"clock_s": -3.5}, 4, "-3.5 s off"),
        ({"free_bytes": 2**20}, 6, "0.00 GiB free"),
    ],
)
def test_a_difference_is_named_with_its_machine(change: dict[str, Any], code: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="machine two") as caught:
        compare([GOOD, replace(OTHER, **change)], "nonce", tmp_path, 2**30)
    assert caught.value.code == code and words in str(caught.value)


def test_a_clock_is_off_only_as_far_as_the_call_proves() -> None:
    assert _offset(10.0, 12.0, 14.0) == 0
    assert _offset(10.0, 17.0, 14.0) == 3
    assert _offset(10.0, 7.0, 14.0) == -3


DRIVER = """
import sys
from pathlib import Path
from nexus_scale.contracts import UserError
from nexus_scale.orchestration.cluster import connected
from nexus_scale.orchestration.preflight import check_machines
with connected(address=sys.argv[1]):
    try:
        print("agree:", len(check_machines(None, Path(sys.argv[2]), needed_bytes=1, timeout_s=120)))
    except UserError as error:
        print("differ:", error)
"""


@pytest.mark.slow
@pytest.mark.ray
def test_two_raylets_agree_until_one_runs_other_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    from nexus_scale.orchestration import security

    folder = tempfile.mkdtemp(prefix="nx-", dir="/tmp")  # the path of a socket may have 107 characters
    other = tmp_path / "other"
    shutil.copytree(REPOSITORY / "nexus_scale", other / "nexus_scale", ignore=shutil.ignore_patterns("__pycache__"))
    (other / "nexus_scale" / "__init__.py").write_text('"""Changed by hand on one machine."""\n')
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    security.use_token()

    def preflight() -> str:
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, cluster.address, str(tmp_path / "run")],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1)
        assert "agree: 2" in preflight()
        monkeypatch.setenv("PYTHONPATH", str(other))
        cluster.add_node(num_cpus=1)
        assert "runs other source of nexus_scale" in preflight()
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
