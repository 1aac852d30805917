"""Saves and loads of checkpoints, against plain copies, writes and reads of the same bytes, and beside torch's and DeepSpeed's own.

Two ranks under ZeRO-3 save their state; one rank loads it and saves again; four ranks load that. Each round measures all in turns, and the
figures are medians of the rounds' ratios, because what slows the machine down slows both sides.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nexus_scale.bench.checkpoint_worker import BYTES_PER_PARAMETER, WIDTH
from nexus_scale.contracts import UserError

TARGETS = {"blocking_over_memcpy": 1.1, "total_over_raw": 1.25, "load_over_raw": 1.5}
DEADLINE_S = 3600


def run(rounds: int = 7, mebibytes: int = 512, peers: bool = True, folder: str | None = None) -> dict[str, Any]:
    """Ratios of saves and loads to the plain operations and to the peers.

    Args:
        rounds: after one that only warms up.
        mebibytes: the least state, of all ranks together.
        peers: whether to measure dcp.async_save, and DeepSpeed's save_checkpoint with ds_to_universal, too.
        folder: on the disk to be measured; by default the system's temporary folder.
    Returns:
        `ratio`: seconds until our save is committed over those of dcp.async_save (of a raw write, without peers).
        `blocking_over_memcpy`: seconds for which a save blocks training, over one copy of its bytes in memory.
        `total_over_raw`: seconds until the save is committed, over a raw write and fsync of its bytes. Neither counts the removal of
        the previous file, which stands in `ours`.
        `load_over_raw`: seconds of verified loads that reshard 2 -> 1 and 1 -> 4 ranks, from a cold page cache, over raw reads by as
        many ranks. `targets`; `ours` and `peers` with median seconds.
    """
    depth = -(-mebibytes * 2**20 // (WIDTH * WIDTH * BYTES_PER_PARAMETER))
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        saves = _ranks(2, root, what="saves", folder=name, depth=depth, rounds=rounds, peers=peers)
        universal = _universal(root) if peers else None
        first, second = str(root / "ours"), str(root / "one")
        to_one = _ranks(1, root, what="loads", source=first, next=second, rounds=rounds)
        to_four = _ranks(4, root, what="loads", source=second, rounds=rounds)
    seconds = saves["seconds"]
    loads = [sum(pair) for pair in zip(to_one["seconds"]["load"], to_four["seconds"]["load"], strict=True)]
    reads = [sum(pair) for pair in zip(to_one["seconds"]["raw_read"], to_four["seconds"]["raw_read"], strict=True)]
    median = {key: statistics.median(values) for key, values in seconds.items()}
    return {
        "name": "checkpoint",
        "ratio": _ratio(seconds["ours_total"], seconds["dcp_async_save_total" if peers else "raw_write"]),
        "blocking_over_memcpy": _ratio(seconds["ours_blocking"], seconds["memcpy"]),
        "total_over_raw": _ratio(seconds["ours_total"], seconds["raw_write"]),
        "load_over_raw": _ratio(loads, reads),
        "targets": TARGETS,
        "ours": {
            "blocking": median["ours_blocking"],
            "total": median["ours_total"],
            "total_and_pruned": median["ours_total_and_pruned"],
            "load_2_to_1": statistics.median(to_one["seconds"]["load"]),
            "load_1_to_4": statistics.median(to_four["seconds"]["load"]),
        },
        "bare": {
            "memcpy": median["memcpy"],
            "write_and_fsync": median["raw_write"],
            "read_by_1": statistics.median(to_one["seconds"]["raw_read"]),
            "read_by_4": statistics.median(to_four["seconds"]["raw_read"]),
        },
        "peers": {
            "dcp_async_save": {
                "blocking": median["dcp_async_save_blocking"],
                "total": median["dcp_async_save_total"],
            },
            "deepspeed": {
                "save_checkpoint": median["deepspeed_save_checkpoint"],
                "ds_to_universal": universal,
            },
        }
        if peers
        else {},
        "settings": {"bytes": saves["bytes"], "ranks": 2, "rounds": rounds, "threads_per_rank": 1},
        "versions": {name: version(name) for name in ("torch", "deepspeed")},
    }


def _ratio(ours: list[float], bare: list[float]) -> float:
    return statistics.median(mine / theirs for mine, theirs in zip(ours, bare, strict=True))


def _ranks(world_size: int, root: Path, **config: Any) -> dict[str, Any]:
    """Rank 0's result of checkpoint_worker on so many ranks."""
    result = root / "result.json"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = root / "log.txt"
    with log.open("w") as said:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "nexus_scale.bench.checkpoint_worker", json.dumps({**config, "result": str(result)})],
                env={
                    **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                },
                stdout=said,
                stderr=said,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        try:
            for process in processes:
                process.wait(timeout=DEADLINE_S)
        finally:
            for process in processes:
                process.kill()
                process.wait()
    if any(process.returncode for process in processes):
        raise UserError(
            f"bench checkpoint: {config['what']} on {world_size} ranks failed:\n{log.read_text()[-4000:]}", code=1
        )
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def _universal(root: Path) -> float:
    """Seconds of DeepSpeed's conversion, which another number of ranks needs to load its checkpoint."""
    (saved,) = (path for path in (root / "deepspeed").iterdir() if path.is_dir())
    # It reads DeepSpeed's pickles, which this benchmark has just written; all our other processes refuse such files.
    trusting = {name: value for name, value in os.environ.items() if name != "TORCH_FORCE_WEIGHTS_ONLY_LOAD"}
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(saved), "--output_folder",
         str(root / "universal"), "--num_extract_workers", "2", "--num_merge_workers", "2"],
        capture_output=True, text=True, timeout=DEADLINE_S, env={**trusting, "DS_ACCELERATOR": "cpu"},
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"bench checkpoint: ds_to_universal failed:\n{done.stderr[-2000:]}", code=1)
    return time.perf_counter() - begin
