"""What the orchestration tests run on real workers: a sum over ranks, and the ways in which a worker may end."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nexus_scale.contracts import Preempted, UserError
from nexus_scale.io import leaving
from nexus_scale.io.durable import atomic_write


def work(config: dict[str, Any]) -> dict[str, Any]:
    """Sums rank + 1 over all ranks; `config["ends"]` says how rank 1 ends, `folder` takes a file for each start."""
    rank, folder = dist.get_rank(), Path(config["folder"])
    starts = len(list(folder.glob(f"start_{rank}_*")))
    (folder / f"start_{rank}_{starts}").write_text(str(os.getpid()))
    if config.get("ends") == "asleep":
        print("asleep", flush=True)
        time.sleep(600)
    if config.get("ends") == "when asked":
        return _steps(rank, folder, config)
    total = torch.tensor([float(rank + 1)])
    dist.all_reduce(total)
    print(f"rank {rank} of {dist.get_world_size()} sums {total.item():g}")
    if rank == 1:
        _end(config.get("ends"), starts)
    dist.all_reduce(total)  # rank 0 waits here for one that has ended
    return {
        "sum": total.item() / dist.get_world_size(),
        "threads": torch.get_num_threads(),
        "colour": os.environ.get("COLOUR"),
    }


def _steps(rank: int, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Steps until all have been done, or until the run is asked to leave; each is a checkpoint. Rank 0 records who took it,
    and beats."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    step = max((int(path.name[5:]) for path in checkpoints.glob("step_*")), default=0)
    while step < config["steps"]:
        asked = torch.tensor([float(leaving.asked(folder) is not None)])
        dist.all_reduce(asked, dist.ReduceOp.MAX)
        if asked:
            raise Preempted(step)
        step += 1
        dist.barrier()
        if rank == 0:
            (checkpoints / f"step_{step:08d}").touch()
            with (folder / "steps.txt").open("a") as file:
                file.write(f"{step} {dist.get_world_size()} {os.environ['NEXUS_ATTEMPT']} {time.time()}\n")
            atomic_write(
                folder / "heartbeats" / "rank0.json", json.dumps({"step": step, "at": time.time()}), synced=False
            )
        time.sleep(config.get("pause_s", 0.05))
        dist.barrier()
    return {"steps": step, "workers": dist.get_world_size()}


def _end(how: str | None, starts: int) -> None:
    if how == "killed once" and starts == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "user error":
        raise UserError("colour 7: expected 1 to 6", code=3)
    if how == "preempted":
        raise Preempted(41)
    if how == "bug":
        raise ZeroDivisionError(f"a bug of ours, met {starts} times before")
    if how == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
