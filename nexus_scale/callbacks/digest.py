"""Digests of each step's results, one line per step and rank, which `nexus certify` compares. Off by default."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

from nexus_scale.contracts import Callback, Engine, Objective, Progress, RunFolder, Shard, StepInfo
from nexus_scale.io.rows import encode
from nexus_scale.kernels.update import MOMENTS

FOLDER = "digests"

KINDS = {"fp32": "masters", "ema": "ema", "buffer": "buffers", **dict.fromkeys(MOMENTS, "moments")}
"""What a piece belongs to, by how its name ends; `<net>.optimizer_steps` is `optimizer_steps`, and the objective's own is `objective`."""


class Digest(Callback):
    """Appends to `digests/<attempt>-rank<r>.jsonl` in the run folder. Repeated steps appear again.

    A row has `step`, `draws` (global batches drawn so far), `positions` and `samples` (of this rank's micro-batches, in their
    order), `losses` ((sum, count) by name), XXH3-128 of this rank's `masters`, `moments`, `ema`, `buffers`, `optimizer_steps`,
    `rng` (torch's generators) and, where it keeps one, of the `objective`'s state; and, of the process, `process`, `workers` and `at`.

    It reads all state from the device at every step: for proofs, not for long runs.
    """

    def __init__(self, *, run: RunFolder, objective: Objective):
        self.run, self.objective = run, objective
        self._file = -1

    def before_run(self, engine: Engine, progress: Progress) -> None:
        attempt = os.environ.get("NEXUS_ATTEMPT", "attempt")
        path = self.run.path / FOLDER / f"{attempt}-rank{engine.rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        # A killed process may have left half a line.
        os.write(self._file, b"\n")

    def after_step(self, info: StepInfo) -> None:
        generators = [torch.get_rng_state()]
        if info.engine.device.type == "cuda":
            generators.append(torch.cuda.get_rng_state(info.engine.device))
        kept = self.objective.state_dict()
        row: dict[str, Any] = {
            "step": info.step,
            "draws": info.progress.draws,
            "positions": [int(place) for batch in info.batches for place in batch.positions],
            "samples": [int(sample) for batch in info.batches for sample in batch.samples],
            "losses": {
                name: [float(total), float(count)]
                for name, (total, count) in info.metrics.items()
                if name.rpartition("/")[2] == "loss"
            },
            **digests(info.engine.shards()),
            "rng": hash_of(generators),
            **({"objective": hash_of(kept[name] for name in sorted(kept))} if kept else {}),
            "process": f"{socket.gethostname()}-{os.getpid()}",
            "workers": info.engine.world_size,
            "at": time.time(),
        }
        os.write(self._file, encode(row))

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def digests(shards: Mapping[str, Shard]) -> dict[str, str]:
    """XXH3-128 of each kind of state, its shards in the order of their names."""
    kinds: dict[str, xxhash.xxh3_128] = {}
    for name in sorted(shards):
        shard, ending = shards[name], name.rpartition(".")[2]
        digest = kinds.setdefault(KINDS.get(ending, ending), xxhash.xxh3_128())
        digest.update(f"{name} {shard.start} {shard.shape}".encode())
        digest.update(_bytes(shard.local))
    return {kind: digest.hexdigest() for kind, digest in sorted(kinds.items())}


def hash_of(tensors: Iterable[Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for tensor in tensors:
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Any:
    memory: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(memory)
