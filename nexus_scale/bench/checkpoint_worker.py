"""One rank of `nexus bench checkpoint`: saves or loads, in turns with plain operations on the same bytes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nexus_scale.config.schema import AdamW
from nexus_scale.contracts import Engine, Network, Shard
from nexus_scale.engine import EngineSettings, NetSpec, build_engine, distributed
from nexus_scale.engine.base import part_of
from nexus_scale.engine.checkpoint import CheckpointStore, newest
from nexus_scale.engine.checkpoint.manifest import folder_name
from nexus_scale.engine.tensor_file import CHUNK_BYTES, bytes_of

WIDTH = 1024
BYTES_PER_PARAMETER = 12  # float32 masters and two moments


class Layers(Network):
    """Square matrices, for their bytes."""

    def __init__(self, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(depth))

    def init_weights(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=WIDTH**-0.5)

    def blocks(self) -> list[nn.Module]:
        return list(self.layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def timed(action: Callable[[], Any]) -> float:
    """Seconds from when all ranks have arrived until all have finished. A collective."""
    distributed.barrier()
    begin = time.perf_counter()
    action()
    distributed.barrier()
    return time.perf_counter() - begin


def blocked(action: Callable[[], Any]) -> float:
    """Seconds for which the slowest rank was blocked. A collective."""
    distributed.barrier()
    begin = time.perf_counter()
    action()
    mine = torch.zeros(distributed.world_size(), dtype=torch.float64)
    mine[distributed.rank()] = time.perf_counter() - begin
    return float(distributed.sum_over_ranks(mine).max())


def write_raw(path: Path, data: memoryview) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for start in range(0, len(data), CHUNK_BYTES):
        os.write(handle, data[start : start + CHUNK_BYTES])
    os.fsync(handle)
    os.close(handle)


def read_raw(files: list[Path], offset: int, out: memoryview) -> None:
    """Bytes [offset, offset + len(out)) of the files laid end to end."""
    for file in files:
        size = file.stat().st_size
        if offset < size and out:
            with open(file, "rb", buffering=0) as source:
                source.seek(offset)
                part = out[: size - offset]
                out = out[len(part) :]
                while part:
                    part = part[source.readinto(part) :]
        offset = max(0, offset - size)


def forget(folder: Path) -> None:
    """Drops the files from the page cache, as when a run resumes on another machine."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def engine_of(depth: int) -> Engine:
    settings = EngineSettings(
        engine="deepspeed", precision="float32", micro_batch=1, accumulation=1, steps=10, seed=0, device=torch.device("cpu")
    )  # fmt: skip
    return build_engine({"model": NetSpec(make=lambda: Layers(depth), optimizer=AdamW(lr=1e-4))}, {}, settings)


def step(engine: Engine, number: int) -> None:
    with engine.training("model"):
        engine.backward("model", engine.nets["model"](torch.ones(1, WIDTH)).square().mean(), last=True)
        engine.step("model", number)


def stock_engine(depth: int) -> Any:
    """DeepSpeed's own engine over the same network, after a step."""
    import deepspeed

    network = Layers(depth)
    engine, *_ = deepspeed.initialize(
        model=network,
        optimizer=torch.optim.AdamW(network.parameters(), lr=1e-4),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    engine.backward(engine(torch.ones(1, WIDTH)).square().mean())
    engine.step()
    return engine


def measure_saves(config: dict[str, Any]) -> dict[str, Any]:
    """Seconds of a copy of the bytes, a raw write, our save, dcp.async_save and DeepSpeed's save_checkpoint, in each round."""
    import torch.distributed.checkpoint as dcp

    folder, rounds = Path(config["folder"]), config["rounds"]
    engine = engine_of(config["depth"])
    step(engine, 0)
    rank = engine.rank
    store = CheckpointStore(folder / "ours", rank=rank, world_size=engine.world_size, attempt="bench", keep=1)
    source = torch.cat([shard.local.reshape(-1).view(torch.uint8) for shard in engine.shards().values()])
    target = torch.empty_like(source)
    plain = {f"{name}@{rank}": shard.local for name, shard in engine.shards().items()}
    zero: Any = stock_engine(config["depth"]) if config["peers"] else None
    figures: dict[str, list[float]] = {}

    def save(number: int) -> None:
        store.save(number, engine.shards(), {"progress": {"step": number}})

    def committed(number: int) -> Path:
        return folder / "ours" / folder_name(number)

    writing: list[Any] = []
    apart: Any = (
        torch.distributed.new_group()
    )  # its thread's collectives, among this thread's own, would wait for one another

    def save_dcp() -> None:
        writing.append(dcp.async_save(plain, checkpoint_id=folder / "dcp", process_group=apart))

    for number in range(1, rounds + 2):  # the first round only warms up: buffers are made, files of the cache are found
        found = {"memcpy": blocked(lambda: target.copy_(source))}
        found["raw_write"] = timed(lambda: write_raw(folder / f"raw{rank}", bytes_of(source)))
        (folder / f"raw{rank}").unlink()
        begin = time.perf_counter()
        found["ours_blocking"] = blocked(partial(save, number))
        while rank == 0 and store.writing and not committed(number).exists():
            time.sleep(0.0005)
        found["ours_total"] = time.perf_counter() - begin  # the one before it goes after that, as raw's file does
        store.wait()
        found["ours_total_and_pruned"] = time.perf_counter() - begin
        if config["peers"]:
            begin = time.perf_counter()
            found["dcp_async_save_blocking"] = blocked(save_dcp)
            writing.pop().result()
            distributed.barrier()
            found["dcp_async_save_total"] = time.perf_counter() - begin
            found["deepspeed_save_checkpoint"] = timed(
                partial(zero.save_checkpoint, folder / "deepspeed", tag=f"step{number}")
            )
            if rank == 0:
                shutil.rmtree(folder / "dcp")
                if number <= rounds:
                    shutil.rmtree(folder / "deepspeed")
        distributed.barrier()
        if number > 1:
            for name, seconds in found.items():
                figures.setdefault(name, []).append(seconds)
    return {"bytes": source.numel() * engine.world_size, "seconds": figures}


def measure_loads(config: dict[str, Any]) -> dict[str, Any]:
    """Each round: a raw read of this rank's share of the bytes, and our verified load of its part of every tensor, from a cold
    page cache; afterwards a save by this number of ranks, where `next` names a folder for it."""
    source, rounds = Path(config["source"]), config["rounds"]
    rank, world_size = distributed.rank_and_world_size()
    state: dict[str, Shard] = {}
    first = newest(source)
    assert first is not None
    for name in first.names:
        start, stop = part_of(torch.Size(first.shape(name)).numel(), rank, world_size)
        if stop > start:
            state[name] = Shard(first.read(name, start, stop), start, first.shape(name))
    files = sorted(Path(first.path).glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    begin, end = part_of(total, rank, world_size)
    raw = torch.empty(end - begin, dtype=torch.uint8)
    raw.zero_()

    def load() -> None:
        found = newest(source)
        assert found is not None
        with found.claimed() as read:
            for name, shard in state.items():
                shard.local.copy_(read(name, shard.start, shard.start + shard.local.numel()))

    figures: dict[str, list[float]] = {"raw_read": [], "load": []}
    for number in range(rounds + 1):
        for name, action in (("raw_read", lambda: read_raw(files, begin, bytes_of(raw))), ("load", load)):
            distributed.barrier()
            if rank == 0:
                forget(source)
            seconds = timed(action)
            if number:
                figures[name].append(seconds)
    if config.get("next"):
        store = CheckpointStore(Path(config["next"]), rank=rank, world_size=world_size, attempt="bench")
        store.save(first.step, state, first.state)
        store.wait()
    return {"bytes": total, "seconds": figures}


def main() -> None:
    config = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    distributed.init("cpu", timeout_s=600)
    found = {"saves": measure_saves, "loads": measure_loads}[config["what"]](config)
    if distributed.rank() == 0:
        Path(config["result"]).write_text(json.dumps(found))
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # no wait for threads that a library left behind


if __name__ == "__main__":
    main()
