"""Real ranks for tests: processes that speak gloo over a fresh port."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _enter(fn: Callable[..., Any], rank: int, world_size: int, port: int, folder: str, args: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    out = Path(folder) / f"rank{rank}"
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
        AssertionError: a rank failed (with its traceback), died, or the deadline passed; the others are killed.
    """
    context = multiprocessing.get_context("spawn")
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            context.Process(target=_enter, args=(fn, rank, world_size, port, folder, args))
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
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads
        said = {
            rank: file.read_text()
            for rank in range(world_size)
            if (file := Path(folder) / f"rank{rank}.error").exists()
        }
        codes = [process.exitcode for process in ranks]
        assert not any(codes), f"exit codes {codes}\n" + "\n".join(
            f"--- rank {rank}\n{text}" for rank, text in said.items()
        )
        return [json.loads((Path(folder) / f"rank{rank}.json").read_text())["value"] for rank in range(world_size)]
