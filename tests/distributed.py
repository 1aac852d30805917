"""Processes for tests, forked from one that has imported everything: ranks that speak gloo over a fresh port, and commands."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any


def free_port() -> int:
    """One that nobody listens at, below those that the kernel hands out by itself: none of these is taken before it is used."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("none of 100 ports between 20000 and 32000 is free")


def forked() -> ForkServerContext:
    """Makes processes in a fraction of a second: forked from a server without threads, which has imported `tests.preloaded`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def become(environment: Mapping[str, str], log: Path) -> None:
    """Gives a forked process the environment of its own that a started one would have, and its output a file."""
    os.environ.clear()
    os.environ.update(environment)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def environment_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    """This process's, with a rank's place in its group, as torchrun would set it."""
    return {
        **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
    }  # fmt: skip


def _enter(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    environment: Mapping[str, str],
    folder: str,
    args: tuple[Any, ...],
) -> None:
    out = Path(folder) / f"rank{rank}"
    become(environment, out.with_suffix(".out"))
    try:
        import torch

        from nexus_scale.engine import distributed

        torch.set_num_threads(1)
        distributed.init("cpu", timeout_s=60)
        result = {"value": fn(rank, world_size, *args)}
        text = json.dumps(result)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        out.with_suffix(".error").write_text(traceback.format_exc())
        os._exit(1)
    out.with_suffix(".json").write_text(text)
    os._exit(0)  # no wait for threads that a library left behind


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 300) -> list[Any]:
    """Runs module-level `fn(rank, world_size, *args)` in processes that form a gloo group.

    Returns:
        Each rank's result, by rank; results must be JSON values.
    Raises:
        AssertionError: a rank failed (with its traceback), died (with its last words), or the deadline passed; the others are
            killed.
    """
    context = forked()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            context.Process(
                target=_enter, args=(fn, rank, world_size, environment_of(rank, world_size, port), folder, args)
            )
            for rank in range(world_size)
        ]
        try:
            for process in ranks:
                process.start()
            deadline = time.monotonic() + timeout
            while any(process.is_alive() for process in ranks):
                if any(process.exitcode not in (None, 0) for process in ranks):
                    time.sleep(1.0)  # the first to fail breaks its peers' collectives: let all say what they saw
                    break
                assert time.monotonic() < deadline, (
                    f"ranks {[r for r, p in enumerate(ranks) if p.is_alive()]} still ran after {timeout} s"
                )
                time.sleep(0.02)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()
        said = {}
        for rank in range(world_size):
            error, output = (Path(folder) / f"rank{rank}{kind}" for kind in (".error", ".out"))
            said[rank] = error.read_text() if error.exists() else output.read_text(errors="replace")[-4000:]
        codes = [process.exitcode for process in ranks]
        assert not any(codes), f"exit codes {codes}\n" + "\n".join(
            f"--- rank {rank}\n{text}" for rank, text in said.items()
        )
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text())["value"] for rank in range(world_size)]


def started(
    fn: Callable[..., Any], *args: Any, log: Path, environment: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """A process that runs `fn(*args)`, found by its module as in `run_ranks`, and ends with code 0, 1, or that of its SystemExit.

    Args:
        log: takes what it prints.
        environment: all of its variables; this process's unless given.
    """
    process = forked().Process(target=_started, args=(fn, args, dict(environment or os.environ), log))
    process.start()
    return process


def _started(fn: Callable[..., Any], args: tuple[Any, ...], environment: Mapping[str, str], log: Path) -> None:
    become(environment, log)
    code: Any = 0
    try:
        fn(*args)
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # no wait for threads that a library left behind


def script(code: str, *arguments: str, log: Path) -> ForkServerProcess:
    """`python -c code arguments...`, as `started`."""
    return started(_script, code, arguments, log=log)


def _script(code: str, arguments: tuple[str, ...]) -> None:
    sys.argv[:] = ["-c", *arguments]
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})  # a test's own


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    """Waits for it; AssertionError after so many seconds, which no machine that works needs."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.005)


def _nexus(arguments: tuple[str, ...], cwd: Path) -> None:
    from nexus_scale import cli

    os.chdir(cwd)
    sys.argv[:] = ["nexus", *arguments]
    cli.main()


def nexus(cwd: Path, *arguments: str, timeout: float = 120, **environment: str) -> tuple[int, str]:
    """`nexus ...` in a process of its own, in the folder `cwd`.

    Returns:
        its exit code and all that it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = started(_nexus, arguments, cwd.resolve(), log=log, environment={**os.environ, **environment})
        process.join(timeout)
        code = process.exitcode
        process.kill()
        process.join()
        said = log.read_text()
    assert code is not None, f"nexus {arguments} still ran after {timeout:g} s\n{said}"
    return code, said


@contextlib.contextmanager
def nexus_started(
    cwd: Path, *arguments: str, log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[ForkServerProcess]:
    """`nexus ...` in a process of its own, in the folder `cwd`; it is killed at the end where it still runs."""
    process = started(_nexus, arguments, cwd.resolve(), log=log, environment=environment)
    try:
        yield process
    finally:
        process.kill()
        process.join()
