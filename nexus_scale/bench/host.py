"""What an engine costs the host: a step of many small layers, so small that the CPU time is that of Python, hooks and launches.

28 DiT blocks of width 64 (300 parameters, 2 M values), two samples of 16 tokens, float32, one thread, with clipping, AdamW and an
average. On a GPU the same calls stand between the kernels: what a step costs here, the device waits for there, or never sees. ZeRO-3 is
measured three times: with each block a message of its own, as large ones are; sharded as a large network of so small blocks is, which
share messages; and as the engine chooses by itself for a network that is small as a whole. Beside the engines stand a bare PyTorch loop,
and of two ranks one with a flat all-reduce by hand, DistributedDataParallel, and FSDP2. All take turns in the same processes, each going
first in every other round.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.config.schema import AdamW, Average
from nexus_scale.contracts import Batch, Loss, Nets, Network, Objective, Phase, Progress, Rng
from nexus_scale.engine import build_engine, distributed
from nexus_scale.engine.settings import EngineSettings, NetSpec
from nexus_scale.models.diffusion.dit import DiT
from nexus_scale.trainer import Trainer

LR, CLIP, DECAY = 1e-3, 1.0, 0.9999
DEADLINE_S = 900.0

ZERO3: dict[str, dict[str, int]] = {
    "zero3_block_by_block": {"whole_numel": 0, "message_numel": 0},
    "zero3_sharded": {"whole_numel": 0},
    "zero3_as_chosen": {},
}
TARGETS = {"zero3_over_local": 1.3, "two_ranks_over_bare": 1.5}
"""Ratios wanted, at most."""


@dataclass(frozen=True)
class Size:
    """Sizes of the network that is trained. `latent`: height and width, a quarter of its square in tokens."""

    depth: int = 28
    width: int = 64
    latent: int = 8
    batch: int = 2

    def make(self) -> Network:
        return DiT(hidden_size=self.width, depth=self.depth, num_heads=4, latent_size=self.latent, num_classes=10)

    def batch_of(self, rank: int) -> Batch:
        """A rank's samples, always the same ones."""
        rng = torch.Generator().manual_seed(rank)
        shape = (self.batch, 4, self.latent, self.latent)
        fields = {
            "x": torch.randn(shape, generator=rng),
            "t": torch.rand(self.batch, generator=rng),
            "label": torch.randint(10, (self.batch,), generator=rng),
            "target": torch.randn(self.batch, 8, *shape[2:], generator=rng),
        }
        positions = torch.arange(self.batch) + rank * self.batch
        return Batch(fields, positions, positions)


def _fill(network: nn.Module) -> None:
    """Weights that all differ from zero: fresh blocks pass their input on, and nothing behind them would learn."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.05, generator=rng)


def _loss(network: Any, fields: Mapping[str, Tensor]) -> Tensor:
    return F.mse_loss(network(fields["x"], fields["t"], {"label": fields["label"]}), fields["target"])


class _Regression(Objective):
    """The mean squared error between the network's output and the target. `last`: the newest, unread."""

    needs, fields = ("model",), ("x", "t", "label", "target")
    last = torch.zeros(())

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("main", trains="model"),)

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        total = _loss(nets["model"], batch.fields)
        self.last = total.detach()
        return Loss(total)


def run(rounds: int = 10, compiled: bool = False, steps_per_round: int = 5, size: Size | None = None) -> dict[str, Any]:
    """CPU time of a step of one rank and of two, and its ratios.

    Args:
        rounds: turns of each side, after one that is not counted.
        compiled: the blocks are compiled on all sides.
        size: of the network, for tests.
    Returns:
        `ratio`: one rank's ZeRO-3, block by block, over the local engine. `ratios`: those of each way of ZeRO-3, of one rank over the
        local engine, of two ranks over the bare loop with a flat all-reduce. `one_rank` and `two_ranks`: medians of
        milliseconds of CPU a step by side, of two ranks their mean, and `loss`, the last one, which tells that all sides learn alike.
    Raises:
        RuntimeError: a process failed; its trace is in the log of errors.
    """
    size = size or Size()
    one, two = (_processes(n, size, compiled, rounds, steps_per_round) for n in (1, 2))
    ms_one, ms_two = ({name: side["cpu_ms"] for name, side in sides.items()} for sides in (one, two))
    ratios = {
        "zero3_over_local": {way: ms_one[way] / ms_one["local"] for way in ZERO3},
        "two_ranks_over_bare": {way: ms_two[way] / ms_two["bare"] for way in ZERO3},
    }
    return {
        "name": "host",
        "ratio": ratios["zero3_over_local"]["zero3_block_by_block"],
        "ratios": ratios,
        "wanted": TARGETS,
        "one_rank": one,
        "two_ranks": two,
        "settings": asdict(size)
        | {
            "compiled": compiled,
            "rounds": rounds,
            "steps_per_round": steps_per_round,
            "threads": 1,
            "cpu": torch.backends.cpu.get_cpu_capability(),
        },
        "versions": {"torch": torch.__version__, "deepspeed": version("deepspeed")},
    }


# ---------------------------------------------------------------------------------------------- processes


def _processes(world_size: int, *work: Any) -> dict[str, dict[str, float]]:
    """Each side's figures, the mean of all ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="nexus-bench-") as folder:
        ranks = [
            context.Process(target=_rank, args=(rank, world_size, port, folder, *work)) for rank in range(world_size)
        ]
        try:
            for rank in ranks:
                rank.start()
            deadline = time.monotonic() + DEADLINE_S
            while any(rank.is_alive() for rank in ranks):
                if any(rank.exitcode not in (None, 0) for rank in ranks) or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        if codes := [rank.exitcode for rank in ranks if rank.exitcode]:
            raise RuntimeError(f"bench host: a process of {world_size} ended with code {codes[0]}")
        said = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world_size)]
    first: dict[str, dict[str, float]] = said[0]
    return {
        side: {key: statistics.mean(each[side][key] for each in said) for key in figures}
        for side, figures in first.items()
    }


def _rank(
    rank: int, world_size: int, port: int, folder: str, size: Size, compiled: bool, rounds: int, per_round: int
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )  # fmt: skip
    torch.set_num_threads(1)
    distributed.init("cpu", timeout_s=DEADLINE_S)
    sides = _sides(rank, world_size, size, compiled)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    losses: dict[str, float] = {}
    for number in range(rounds + 1):
        for name in sides if number % 2 == 0 else reversed(sides):
            cpu, wall = time.process_time(), time.perf_counter()
            losses[name] = sides[name](per_round)
            spent[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    figures = {
        name: {
            "cpu_ms": statistics.median(cpu for cpu, _ in rows[1:]) / per_round * 1e3,
            "wall_ms": statistics.median(wall for _, wall in rows[1:]) / per_round * 1e3,
            "loss": losses[name],
        }
        for name, rows in spent.items()
    }
    (Path(folder) / f"{rank}.json").write_text(json.dumps(figures))
    distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # without gloo's threads, which DeepSpeed keeps and which abort one exit in ten


# -------------------------------------------------------------------------------------------------- sides

Turn = Callable[[int], float]
"""A function that takes so many steps and returns the last loss."""


def _sides(rank: int, world_size: int, size: Size, compiled: bool) -> dict[str, Turn]:
    batch = size.batch_of(rank)
    ours = partial(_ours, size, batch, compiled)
    bare = partial(_bare, size, batch, compiled)
    zero3 = {way: ours("deepspeed", **settings) for way, settings in ZERO3.items()}
    if world_size == 1:
        return {"local": ours("local"), **zero3, "bare": bare(lambda network: network)}
    reduced = bare(lambda network: network, _all_reduce)
    return {"replicated": ours("replicated"), **zero3, "bare": reduced, "ddp": bare(_ddp), "fsdp2": bare(_fsdp2)}


def _ours(size: Size, batch: Batch, compiled: bool, engine: str, **settings: int) -> Turn:
    computing = EngineSettings.model_validate(
        {"engine": engine, "micro_batch": size.batch, "steps": 10**6, "compile": compiled, **settings}
    )
    spec = NetSpec(make=size.make, optimizer=AdamW(lr=LR, clip_grad_norm=CLIP), fill=_fill)
    made = build_engine({"model": spec}, {"ema": Average(average_of="model", decay=DECAY)}, computing)
    objective = _Regression()
    trainer = Trainer(
        steps=10**6, seed=0, objective=objective, engine=made, next_batches=lambda: [batch], callbacks=[],
        progress=Progress(), stage=lambda stage: None,
    )  # fmt: skip

    def turn(steps: int) -> float:
        trainer.advance(trainer.progress.step + steps)
        return float(objective.last)

    return turn


def _bare(
    size: Size,
    batch: Batch,
    compiled: bool,
    wrap: Callable[[nn.Module], nn.Module],
    reduce: Callable[[list[nn.Parameter]], None] | None = None,
) -> Turn:
    made = size.make()
    _fill(made)
    if compiled:
        for block in made.blocks():
            block.compile()
    network = wrap(made)
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    values = [_local(parameter.detach()) for parameter in parameters]
    average = [value.clone() for value in values]

    def turn(steps: int) -> float:
        for _ in range(steps):
            loss = _loss(network, batch.fields)
            loss.backward()
            if reduce is not None:
                reduce(parameters)
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch._foreach_lerp_(average, values, 1 - DECAY)
        return float(loss.detach())

    return turn


@torch.no_grad()
def _all_reduce(parameters: list[nn.Parameter]) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])


def _ddp(network: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(network)


def _fsdp2(network: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    assert isinstance(network, Network)
    for block in network.blocks():
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)
    return network


def _local(value: Tensor) -> Tensor:
    """What this rank holds of a parameter."""
    held: Tensor = value.to_local() if hasattr(value, "to_local") else value
    return held
