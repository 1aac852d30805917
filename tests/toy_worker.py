"""What the orchestration tests run on real workers: a sum over ranks, and the ways in which a worker may end."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nexus_scale.contracts import Preempted, UserError


def work(config: dict[str, Any]) -> dict[str, Any]:
    """Sums rank + 1 over all ranks; `config["ends"]` says how rank 1 ends, `folder` takes a file for each start."""
    rank, folder = dist.get_rank(), Path(config["folder"])
    starts = len(list(folder.glob(f"start_{rank}_*")))
    (folder / f"start_{rank}_{starts}").write_text(str(os.getpid()))
    if config.get("ends") == "asleep":
        print("asleep", flush=True)
        time.sleep(600)
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


def _end(how: str | None, starts: int) -> None:
    if how == "killed once" and starts == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "user error":
        raise UserError("colour 7: expected 1 to 6", code=3)
    if how == "preempted":
        raise Preempted(41)
    if how == "bug":
        raise ZeroDivisionError("a bug of ours")
