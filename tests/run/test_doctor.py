"""Each check of `nexus doctor` finds what is planted, and is silent where all is well."""

from __future__ import annotations

import http.server
import importlib.metadata
import os
import shutil
import threading
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nexus_scale.kernels import choice, identity
from nexus_scale.run import doctor
from nexus_scale.run.doctor import Finding


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def lock_in(folder: Path, age_s: float) -> Path:
    lock = folder / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (lock.stat().st_mtime - age_s,) * 2)
    return lock


def test_a_lock_whose_owner_is_gone_is_found(tmp_path: Path) -> None:
    lock = lock_in(tmp_path, age_s=3600)
    (finding,) = doctor.stale_locks([tmp_path])
    assert finding.level == "error"
    assert str(lock) in finding.detail
    assert str(lock) in finding.remedy
    assert lock.exists(), "a doctor looks and does not touch"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files cannot be listed without /proc")
def test_a_lock_that_is_held_is_not_stale(tmp_path: Path) -> None:
    lock = lock_in(tmp_path, age_s=3600)
    with lock.open():
        (finding,) = doctor.stale_locks([tmp_path])
    assert finding.level == "note"
    assert str(os.getpid()) in finding.detail


def test_a_fresh_lock_is_left_alone(tmp_path: Path) -> None:
    lock_in(tmp_path, age_s=1)
    assert doctor.stale_locks([tmp_path, tmp_path / "absent"]) == []


def test_without_proc_only_age_counts(tmp_path: Path) -> None:
    lock_in(tmp_path, age_s=600)
    nowhere = tmp_path / "no-proc"
    assert doctor.stale_locks([tmp_path / "py311_cpu"], proc=nowhere) == []
    now = (tmp_path / "py311_cpu/deepspeed_shm_comm/lock").stat().st_mtime + 3600
    assert levels(doctor.stale_locks([tmp_path], now=now, proc=nowhere)) == ["error"]


def test_extension_folders_follow_the_environment(tmp_path: Path) -> None:
    assert doctor.extension_folders({}, tmp_path) == [tmp_path / ".cache/torch_extensions"]
    own = doctor.extension_folders({"TORCH_EXTENSIONS_DIR": "/x"}, tmp_path)
    assert own == [Path("/x"), tmp_path / ".cache/torch_extensions"]


@contextmanager
def dashboard(status: int, body: bytes) -> Iterator[int]:
    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert "Authorization" not in self.headers
            self.send_response(status if self.path == "/api/version" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            return None

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize(
    ("status", "body", "level"),
    [
        (200, b'{"version": "4", "ray_version": "2.60.0"}', "error"),
        (401, b"", "ok"),
        (403, b"", "ok"),
        (200, b"<html>something else</html>", "note"),
        (200, b"[1]", "note"),
        (404, b"", "note"),
    ],
)
def test_an_open_ray_cluster_is_an_error(status: int, body: bytes, level: str) -> None:
    with dashboard(status, body) as port:
        (finding,) = doctor.open_cluster("127.0.0.1", port)
    assert finding.level == level
    assert ("RAY_AUTH_MODE=token" in finding.remedy) == (level == "error")


def test_no_ray_cluster_is_fine() -> None:
    with dashboard(200, b"") as port:
        pass
    (finding,) = doctor.open_cluster("127.0.0.1", port)
    assert finding.level == "ok"


def test_a_token_that_others_can_read_is_found(tmp_path: Path) -> None:
    assert doctor.token_file({}, tmp_path) == []
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.touch(mode=0o600)
    token.chmod(0o644)
    (finding,) = doctor.token_file({}, tmp_path)
    assert (finding.level, finding.remedy) == ("warning", f"chmod 600 {token}")
    token.chmod(0o600)
    assert levels(doctor.token_file({"RAY_AUTH_TOKEN_PATH": str(token)}, tmp_path / "other")) == ["ok"]


@pytest.mark.parametrize(("free_gib", "level"), [(8, "ok"), (3, "warning"), (0.5, "error")])
def test_too_little_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free_gib: float, level: str) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, free_gib * doctor.GIB))
    (finding,) = doctor.space(tmp_path / "not" / "there" / "yet", 5.0, "disk", "free some")
    assert finding.level == level
    assert str(tmp_path) in finding.detail
    assert finding.remedy == ("" if level == "ok" else "free some")


def installed(tmp_path: Path, name: str, version: str, *requires: str) -> importlib.metadata.Distribution:
    folder = tmp_path / f"{name}-{version}.dist-info"
    folder.mkdir()
    lines = [f"Name: {name}", f"Version: {version}", *[f"Requires-Dist: {line}" for line in requires]]
    (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")
    return importlib.metadata.Distribution.at(folder)


def test_torchvision_of_another_torch_is_found(tmp_path: Path) -> None:
    ours = installed(tmp_path, "torch", "2.13.0+cpu")
    vision = installed(tmp_path, "torchvision", "0.27.0", "torch==2.12.0", "numpy")
    (finding,) = doctor.mismatches([ours, vision])
    assert finding.level == "error"
    assert "needs torch==2.12.0, but 2.13.0+cpu is installed" in finding.detail
    matching = installed(tmp_path, "torchvision", "0.28.0", "torch==2.13.0")
    assert doctor.mismatches([ours, matching]) == []


def test_a_package_below_our_floor_is_found(tmp_path: Path) -> None:
    ours = installed(tmp_path, "nexus_scale", "0.1.0", "ray[default]<3,>=2.60", "diffusers>=0.38; extra == 'hf'")
    old, unasked = installed(tmp_path, "ray", "2.54.0"), installed(tmp_path, "diffusers", "0.30.0")
    (finding,) = doctor.mismatches([ours, old, unasked])
    assert "ray" in finding.remedy


def test_this_environment_has_no_mismatch() -> None:
    assert doctor.mismatches(importlib.metadata.distributions()) == []


def test_a_stranger_named_apex_is_found_and_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = {finding.what: finding for finding in doctor.packages()}
    assert found["apex"].level == "warning"
    assert "uninstall apex" in found["apex"].remedy
    assert not canary.exists()


def test_a_genuine_package_is_no_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apex", "flash_attn"):
        genuine = identity.Identity(name, True, True, "as it should be")
        monkeypatch.setattr(identity, f"identify_{name}", lambda genuine=genuine: genuine)
    assert doctor.packages() == []


@pytest.mark.parametrize(("asked", "level"), [("", "ok"), ("2", "ok"), ("64", "warning"), ("many", "warning")])
def test_more_threads_than_cores(asked: str, level: str) -> None:
    assert levels(doctor.threads({"OMP_NUM_THREADS": asked} if asked else {}, cores=2)) == [level]


def test_variables_that_undo_safe_loading() -> None:
    undone = dict.fromkeys(doctor.UNSAFE, "1")
    assert [f.what for f in doctor.unsafe_environment(undone) if f.level == "error"] == list(doctor.UNSAFE)
    assert levels(doctor.unsafe_environment(dict.fromkeys(doctor.UNSAFE, "0") | doctor.SAFE_ENVIRONMENT)) == [
        "ok",
        "ok",
    ]
    assert levels(doctor.unsafe_environment({})) == ["note", "note"]


def test_diagnose_says_which_kernel_serves_and_why(tmp_path: Path) -> None:
    choice.forget()
    found = doctor.diagnose(roots=[tmp_path], shm=tmp_path, home=tmp_path, environ={}, dashboards=[])
    by_name = {finding.what: finding for finding in found}
    for kernel, row in choice.report().items():
        assert by_name[f"kernel {kernel}"].detail == f"{row['kernel']}: {row['why']}"
    assert {"kernel attention", "kernel norm", "kernel adam"} <= set(by_name)
    assert by_name["torch"].detail == importlib.metadata.version("torch")
    assert ("device" in by_name) == (not torch.cuda.is_available())
    assert by_name["ray"].level == "ok"


def test_table_and_worst() -> None:
    found = [
        Finding("ok", "torch", "2.13.0"),
        Finding("error", "disk", "0 GiB", "free some"),
        Finding("note", "x", "y"),
    ]
    assert doctor.worst(found) == "error"
    assert doctor.worst([]) == "ok"
    assert doctor.table(found).splitlines() == [
        "ok       torch  2.13.0",
        "error    disk   0 GiB",
        "                -> free some",
        "note     x      y",
    ]
