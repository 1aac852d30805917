"""The trainer's step with all default callbacks, against a bare PyTorch loop on the same model and data, in one process.

There are two workloads: the quickstart's MMDiT, and twenty layers of width 64, whose step is so short that every microsecond around it
shows. The trainer reads shards through the loader and draws keyed noise; the bare loop takes rows of tensors in memory and draws from
torch's generator. Beside them run the same loop through Hugging Face accelerate, and the trainer on ZeRO-3 with one rank. All take turns
in one process; the time is CPU time of all threads.
"""

from __future__ import annotations

import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale import train
from nexus_scale.callbacks.made import make_callbacks
from nexus_scale.callbacks.watchdog import StageClock
from nexus_scale.config import recipe as recipes
from nexus_scale.config.plain_yaml import read_yaml
from nexus_scale.config.schema import AdamW, Average
from nexus_scale.contracts import Batch, Loss, Nets, Network, Objective, Phase, Progress, Rng, RunFolder
from nexus_scale.data.dataset import Dataset, Source
from nexus_scale.data.loader import Loader
from nexus_scale.data.manifest import Field
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.engine import build_engine, distributed
from nexus_scale.engine.checkpoint import CheckpointStore
from nexus_scale.engine.settings import WHOLE_NUMEL, EngineSettings, NetSpec
from nexus_scale.models.diffusion.mmdit import MMDiT
from nexus_scale.objectives.denoising import Denoising

SAMPLES = 512
LR, BETAS, CLIP, DECAY = 1e-3, (0.9, 0.99), 1.0, 0.999


class Layers(Network):
    """Twenty linear layers of width 64 with GELU between them: (B, 64) -> (B, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(20))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.gelu(layer(x))
        return x

    def init_weights(self) -> None:
        for layer in self.layers:
            layer.reset_parameters()  # type: ignore[operator]

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)


class Regression(Objective):
    """The mean squared error between the network's output and its input."""

    needs, fields = ("model",), ("x",)

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("main", trains="model"),)

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        total = F.mse_loss(nets["model"](batch["x"]), batch["x"])
        return Loss(total, {"loss": total.detach()})

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        x = batch["x"]
        return {"loss": (nets["model"](x) - x).square().mean(1), "loss_zero": x.square().mean(1)}


@dataclass(frozen=True)
class Workload:
    """What all sides train. `fields`: arrays of SAMPLES rows; `bare_loss`: the bare loop's loss of a batch."""

    name: str
    make: Callable[[], Network]
    objective: Objective
    fields: dict[str, np.ndarray]
    batch: int
    bare_loss: Callable[[nn.Module, dict[str, Tensor]], Tensor]
    averaged: bool
    clip: float | None
    text_tokens: int | None = None


def workloads() -> list[Workload]:
    rng = np.random.default_rng(0)
    cls, checked = recipes.network_class(recipes.load_recipe("mmdit/tiny_openmoji").trained()["model"])
    channels, size = checked["latent_channels"], checked["latent_size"]
    tokens = 16
    latents = {
        "moments": rng.standard_normal((SAMPLES, 2 * channels, size, size)).astype(np.float16),
        "text": rng.standard_normal((SAMPLES, tokens, checked["text_dim"])).astype(np.float16),
        "pooled": rng.standard_normal((SAMPLES, checked["pooled_dim"])).astype(np.float16),
    }

    def flow_loss(net: nn.Module, rows: dict[str, Tensor]) -> Tensor:
        mean, logvar = rows["moments"].float().chunk(2, 1)
        x0 = mean + torch.exp(0.5 * logvar) * torch.randn_like(mean)
        eps, t = torch.randn_like(x0), torch.sigmoid(torch.randn(len(x0)))
        keep = (torch.rand(len(x0)) >= 0.1).float()
        text, pooled = rows["text"].float() * keep[:, None, None], rows["pooled"].float() * keep[:, None]
        a = t[:, None, None, None]
        return F.mse_loss(net((1 - a) * x0 + a * eps, t, {"text": text, "pooled": pooled}), eps - x0)

    mmdit = Workload(
        "mmdit",
        lambda: cls(**checked),
        Denoising(condition_drop=0.1),
        latents,
        128,
        flow_loss,
        averaged=True,
        clip=CLIP,
        text_tokens=tokens,
    )
    vectors = {"x": rng.standard_normal((SAMPLES, 64)).astype(np.float32)}
    layers = Workload(
        "layers",
        Layers,
        Regression(),
        vectors,
        256,
        lambda net, rows: F.mse_loss(net(rows["x"]), rows["x"]),
        averaged=False,
        clip=None,
    )
    assert issubclass(cls, MMDiT)
    return [mmdit, layers]


def run(rounds: int = 10, steps_per_round: int | None = None) -> dict[str, Any]:
    """CPU time of a step on both workloads, and its ratio to the bare loop's.

    Args:
        rounds: turns of each side, after one that is not counted.
        steps_per_round: by default 20 of the MMDiT and 100 of the layers.
    Returns:
        `ratio`: ours over the bare loop on the MMDiT; `workloads` with the `ratio` and the milliseconds of CPU per step of each side.
    """
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for workload in workloads():
            per_round = steps_per_round or (20 if workload.name == "mmdit" else 100)
            results[workload.name] = _compare(workload, Path(folder) / workload.name, rounds, per_round)
    first = results["mmdit"]
    return {
        "name": "step",
        "ratio": first["ratio"],
        "ours": first["ours"],
        "peers": first["peers"],
        "workloads": results,
        "settings": {"rounds": rounds, "threads": threads, "cpu": torch.backends.cpu.get_cpu_capability()},
        "versions": {
            "torch": torch.__version__,
            "accelerate": version("accelerate"),
            "deepspeed": version("deepspeed"),
        },
    }


def _compare(workload: Workload, folder: Path, rounds: int, per_round: int) -> dict[str, Any]:
    _write_data(workload, folder / "data")
    closers: list[Callable[[], None]] = []
    sides: dict[str, Callable[[int], None]] = {
        "ours": _trainer(workload, folder, "local", closers),
        "bare": _bare(workload, None),
        "accelerate": _accelerate(workload),
        "zero3_one_rank": _trainer(workload, folder, "deepspeed", closers),
    }
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    try:
        for i in range(rounds + 1):
            for name in sides if i % 2 == 0 else reversed(sides):
                cpu, wall = time.process_time(), time.perf_counter()
                sides[name](per_round)
                spent[name].append(
                    ((time.process_time() - cpu) / per_round * 1e3, (time.perf_counter() - wall) / per_round * 1e3)
                )
    finally:
        for close in closers:
            close()
    figures = {
        name: {
            "cpu_ms": statistics.median(c for c, _ in rows[1:]),
            "wall_ms": statistics.median(w for _, w in rows[1:]),
            "cpu_ms_min": min(c for c, _ in rows[1:]),
        }
        for name, rows in spent.items()
    }
    ours = figures.pop("ours")
    return {
        "ratio": ours["cpu_ms"] / figures["bare"]["cpu_ms"],
        "ours": ours,
        "peers": figures,
        "steps_per_round": per_round,
    }


# ------------------------------------------------------------------------------------------------- the sides


def _write_data(workload: Workload, folder: Path) -> None:
    fields = [
        Field(name, f"{name}.npy", str(array.dtype), (None, *array.shape[2:]) if name == "text" else array.shape[1:])
        for name, array in workload.fields.items()
    ]
    for number, begin in enumerate(range(0, SAMPLES, SAMPLES // 4)):
        with ShardWriter(folder / f"{number:05d}.tar", fields) as writer:
            for row in range(begin, begin + SAMPLES // 4):
                writer.write(f"{row:06d}", {name: array[row] for name, array in workload.fields.items()})
    finish_folder(folder)


def _trainer(workload: Workload, folder: Path, kind: str, closers: list[Callable[[], None]]) -> Callable[[int], None]:
    if kind == "deepspeed" and not torch.distributed.is_initialized():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        distributed.init("cpu")
    dataset = Dataset.open([Source([folder / "data"], 1.0)], text_tokens=workload.text_tokens)
    optimizer = AdamW(lr=LR, betas=BETAS, clip_grad_norm=workload.clip)
    averages = {"ema": Average(average_of="model", decay=DECAY)} if workload.averaged else {}
    settings = EngineSettings(
        engine=kind,
        micro_batch=workload.batch,
        accumulation=1,
        steps=10**6,
        seed=0,
        whole_numel=0 if kind == "deepspeed" else WHOLE_NUMEL,
    )
    clock, progress, run = StageClock(), Progress(), RunFolder(folder / kind)
    run.path.mkdir(parents=True)
    engine = build_engine({"model": NetSpec(make=workload.make, optimizer=optimizer)}, averages, settings, clock)
    loader = Loader(
        dataset,
        seed=0,
        global_batch=workload.batch,
        micro_batch=workload.batch,
        rank=0,
        world_size=1,
        progress=progress,
        stage=clock,
    )
    store = CheckpointStore(run.checkpoints, rank=0, world_size=1, attempt="bench")
    services = {
        "run": run, "stage": clock, "context": {}, "objective": workload.objective, "checkpoints": store, "draw": None, "record": {},
        "validation": lambda count: dataset.fixed(count, rank=0, world_size=1, batch=workload.batch),
        "state": dict, "global_batch": workload.batch, "seed": 0, "steps": 10**6, "averages": tuple(averages), "peak_flops": None,
        "flops_per_sample": 0.0, "tokens_per_sample": 0.0,
    }  # fmt: skip
    wanted = read_yaml(recipes.find_config("_base/callbacks.yaml"))["callbacks"]
    callbacks = make_callbacks({**wanted, "metrics": {**wanted["metrics"], "progress": False}}, services)
    trainer = train.Trainer(
        steps=10**6, seed=0, objective=workload.objective, engine=engine, next_batches=loader.next_batches, callbacks=callbacks,
        progress=progress, stage=clock,
    )  # fmt: skip
    for callback in callbacks:
        callback.before_run(engine, progress)
    closers += [*(callback.close for callback in callbacks), loader.close, store.close]

    def turn(steps: int) -> None:
        trainer.advance(progress.step + steps)

    return turn


def _bare(workload: Workload, prepare: Any) -> Callable[[int], None]:
    torch.manual_seed(0)
    net = workload.make()
    net.init_weights()
    optimizer: Any = torch.optim.AdamW(net.parameters(), lr=LR, betas=BETAS, weight_decay=0.0, fused=True)
    backward: Callable[[Tensor], None] = lambda loss: loss.backward()  # noqa: E731 - one line says it
    clip: Callable[..., Any] = nn.utils.clip_grad_norm_
    if prepare is not None:
        net, optimizer = prepare.prepare(net, optimizer)
        backward, clip = prepare.backward, prepare.clip_grad_norm_
    parameters = list(net.parameters())
    average = [p.detach().clone() for p in parameters]
    data = {name: torch.from_numpy(array) for name, array in workload.fields.items()}

    def turn(steps: int) -> None:
        for _ in range(steps):
            chosen = torch.randint(SAMPLES, (workload.batch,))
            loss = workload.bare_loss(net, {name: rows[chosen] for name, rows in data.items()})
            backward(loss)
            if workload.clip is not None:
                clip(parameters, workload.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if workload.averaged:
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - DECAY)

    return turn


def _accelerate(workload: Workload) -> Callable[[int], None]:
    from accelerate import Accelerator

    return _bare(workload, Accelerator(cpu=True))
