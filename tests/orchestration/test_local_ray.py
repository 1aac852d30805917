"""What a Ray of one's own keeps where, and an address at which no Ray answers: known without starting one."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from nexus_scale.contracts import UserError
from nexus_scale.orchestration import cluster, head, security
from tests import fuzz
from tests.distributed import run_ranks, started


@pytest.fixture
def nothing_made(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As in a process that has no private folder yet; one that the test makes goes with it."""
    monkeypatch.setattr(security, "_made", {})
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    yield
    security.forget_tokens()


def long_folder(tmp_path: Path) -> Path:
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    return folder


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_too_long_for_sockets_is_left_for_a_short_closed_one(
    variable: str,
    nothing_made: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    long = long_folder(tmp_path)
    if variable == "TMPDIR":
        monkeypatch.setattr(tempfile, "tempdir", str(long))
    else:
        monkeypatch.setenv(variable, str(long))
    with caplog.at_level(logging.INFO):
        folder = security.private_folder()
    assert str(long) in caplog.text and str(folder) in caplog.text
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and not list(long.iterdir())
    assert security.private_folder() == folder, "one for the process"
    with socket.socket(socket.AF_UNIX) as sock:  # Ray's longest, at the largest process id
        path = Path(str(security.session_folder()) + security._BELOW)
        path.parent.mkdir(parents=True)
        sock.bind(str(path))
    shutil.rmtree(folder)
    other = security.private_folder()
    assert other.is_dir() and other != folder, "another one, where somebody tidied up"
    security.forget_tokens()
    assert not other.exists()


def test_a_fresh_token_that_is_gone_is_made_again(nothing_made: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    gone = f"/tmp/{security.PREFIX}gone/token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", gone)
    security.use_token()
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(security.private_folder() / "token") and security.bearer()


def test_without_a_short_folder_it_is_said_what_to_set(
    nothing_made: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(security, "_SOCKET_BYTES", 80)
    monkeypatch.setenv("RAY_TMPDIR", str(long_folder(tmp_path)))
    with pytest.raises(UserError, match=r"xxx must be .* set RAY_TMPDIR") as refused:
        security.private_folder()
    assert refused.value.code == 4


def test_folders_of_killed_programs_are_removed_and_no_others(
    nothing_made: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = Path(tempfile.mkdtemp(prefix="n", dir="/tmp"))
    monkeypatch.setenv("RAY_TMPDIR", str(short))
    before = time.time() - 3600
    folders = {name: short / f"{security.PREFIX}{name}" for name in ("abandoned", "used", "young", "foreign")}
    for name, folder in folders.items():
        folder.mkdir()
        (folder / "token").touch()
        if name != "foreign":
            (folder / "lock").touch()
            os.utime(folder / "lock", None if name == "young" else (before, before))
    with (folders["used"] / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = security.private_folder()
    assert made.parent == short
    left = [name for name, folder in folders.items() if folder.exists()]
    shutil.rmtree(short)
    assert left == ["used", "young", "foreign"]


# ------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("address", ["foo", "ray://127.0.0.1:10001", "127.0.0.1", "127.0.0.1:99999", "http://x:1/"])
def test_an_address_that_is_none_is_refused_at_once(address: str) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match="expected host:port") as refused, cluster.connected(address=address):
        pass
    assert refused.value.code == 4 and time.monotonic() - begun < 5


def test_what_does_not_answer_is_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert "timed out" in str(head.silence(address, 0.5))
    assert "refused" in str(head.silence(address, 0.5))
    with socket.create_server(("127.0.0.1", 0)) as other:

        def greet(connection: socket.socket) -> None:
            connection.sendall(b"220 mail")

        thread = threading.Thread(target=lambda: greet(other.accept()[0]))
        thread.start()
        assert "is not Ray's" in str(head.silence(f"127.0.0.1:{other.getsockname()[1]}", 5))
        thread.join()


def test_a_dead_ray_address_ends_a_command_soon_with_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It once took 580 s, without a word."""
    assert cluster.ATTACH_S <= 10
    monkeypatch.setattr(cluster, "ATTACH_S", 1.0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    begun = time.monotonic()
    code, said = fuzz.nexus("train", "mmdit/tiny_openmoji", "--tiny"), capfd.readouterr().err
    assert code == 4 and "no Ray cluster answers at 127.0.0.1:1" in said and "RAY_ADDRESS" in said, said
    assert "Traceback" not in said and time.monotonic() - begun < 30


def endless() -> None:
    with head.deadline(0.2, "it took too long"):
        time.sleep(60)


def test_a_call_that_never_returns_ends_the_program(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = started(endless, log=log)
    process.join(30)
    assert process.exitcode == head.GONE and "error: it took too long" in log.read_text()


# ------------------------------------------------------------------------------------------------- ranks


def listening(rank: int, world_size: int) -> list[str]:
    import torch
    import torch.distributed as dist

    dist.all_reduce(torch.ones(1))
    ips = [c.laddr.ip for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    return [ip.removeprefix("::ffff:") for ip in ips]


def test_ranks_of_one_machine_listen_on_loopback_alone() -> None:
    """Their store and their collectives' sockets; neither asks who comes."""
    both = run_ranks(2, listening)
    assert len(both[0]) > len(both[1]) >= 1, "the first has the store"
    assert {ip for ips in both for ip in ips} <= {"127.0.0.1", "::1"}
