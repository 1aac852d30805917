"""The optimizer's pass in bytes a second, and blocks with hand-written kernels against the same blocks as inductor fuses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nexus_scale.bench.gpu.cases import DIT, LOCAL, SD3, ZERO3, Task
from nexus_scale.bench.gpu.measuring import Emit
from nexus_scale.bench.gpu.profile import profiled
from nexus_scale.bench.gpu.training import Ours, cheaply
from nexus_scale.config.recipe import Computing, cluster_from
from nexus_scale.config.schema import AdamW, Average
from nexus_scale.contracts import Network, UserError
from nexus_scale.engine import build_engine
from nexus_scale.engine.settings import EngineSettings, NetSpec
from nexus_scale.kernels import choice, trial, updates
from nexus_scale.kernels.timing import median_ms
from nexus_scale.models.layers.linear import Linear

FLOOR = 38
"""Bytes a parameter at least: gradient in float32 or bf16 read, master, two moments and an average read and written, the bf16 copy written:
4 + 4 * 8 + 2, as ZeRO-3 and accumulation have it."""


def fused(device: torch.device, *, tiny: bool, compiled: bool, emit: Emit) -> None:
    """Block kernels by themselves, Triton's and inductor's, at the shapes of `trial.RATES`: GB/s by the bytes that are needed."""
    choice.choose({}, device)
    shapes = (("modulation", (4, 16)), ("rope", (4, 2, 8, 1, 1))) if tiny else trial.RATES
    for found in trial.rates(device, torch.bfloat16, compiled=compiled, shapes=shapes):
        emit(row="fused", **found)


class Wide(Network):
    """Square layers without activation: many parameters and little else."""

    def __init__(self, width: int, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def init_weights(self) -> None:
        cheaply(self)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.layers)


def optimizer_pass(device: torch.device, *, tiny: bool, emit: Emit) -> None:
    """The optimizer's pass by itself, beside a copy; then milliseconds of an engine's step with its average, by engine and by kernel, and
    GB/s by the floor of its bytes."""
    for found in updates.benchmark(device, *((2**10,) if tiny else ())):
        emit(row="update", **found)
    width, depth = (16, 2) if tiny else (4096, 40)
    for cluster in (LOCAL, ZERO3):
        for kernel in choice.OPTIONS["adam"]:
            try:
                choice.choose({"adam": kernel}, device)
            except UserError as error:
                emit(row="optimizer", engine=cluster["engine"], kernel=kernel, unavailable=str(error))
                continue
            ms, numel = _pass(width, depth, cluster, device)
            emit(
                row="optimizer", engine=cluster["engine"], kernel=kernel, parameters=numel, ms=ms,
                gb_per_second=FLOOR * numel / ms / 1e6,
            )  # fmt: skip


def _pass(width: int, depth: int, settings: Mapping[str, Any], device: torch.device) -> tuple[float, int]:
    cluster = cluster_from({"precision": "bf16", **settings}, "bench gpu")
    computing = {name: getattr(cluster, name) for name in Computing.model_fields}
    engine = build_engine(
        {"model": NetSpec(lambda: Wide(width, depth), AdamW())},
        {"ema": Average(average_of="model", decay=0.9999)},
        EngineSettings(**computing, precision="bf16", steps=10**6, device=device),
    )
    x = torch.randn(1, width, device=device)
    times = []
    for number in range(8):
        with engine.training("model"):
            engine.backward("model", engine.nets["model"](x).square().mean(), last=True)

            def update(number: int = number) -> None:
                engine.step("model", number, last=True)
                engine.update_averages(number)

            times.append(median_ms(update, device, warm=0, repeats=1))
    return sorted(times[3:])[2], width * (width + 1) * depth


BLOCKS = 4
"""Blocks of the network that is timed: enough to outweigh what stands around them."""


def blocks(device: torch.device, *, tiny: bool, compiled: bool, emit: Emit) -> None:
    """Forward and backward of a shallow DiT and MMDiT at their full width: all kernels plain (inductor fuses them), all as chosen, and each
    implementation by itself over the plain ones."""
    for task in (DIT,) if tiny else (DIT, SD3):
        shallow = replace(task, overrides={"networks": {"model": {"depth": BLOCKS}}})
        settings = {"plain": dict(choice.PLAIN), "chosen": {}}
        for name in [name for name in choice.OPTIONS if name not in ("adam", "attention")]:
            others = [option for option in choice.OPTIONS[name] if option != choice.PLAIN[name]]
            settings |= {f"{name}: {option}": {**choice.PLAIN, name: option} for option in others}
        for label, kernels in settings.items():
            _blocks(shallow, label, kernels, device, tiny, compiled, emit)


def _blocks(
    task: Task, label: str, kernels: Mapping[str, str], device: torch.device, tiny: bool, compiled: bool, emit: Emit
) -> None:
    torch.compiler.reset()
    choice.forget()
    try:
        ours = Ours(task, {**LOCAL, "compile": compiled}, device, tiny=tiny, kernels=kernels)
    except UserError as error:
        emit(row="blocks", recipe=task.recipe, kernels=label, unavailable=str(error))
        return
    do = ours.steps_of(2 if tiny else task.micro_batch)
    ms = median_ms(lambda: do(1), device, warm=1 if tiny else 3, repeats=2 if tiny else 10)
    spent = profiled(do, device, steps=1)
    emit(row="blocks", recipe=task.recipe, kernels=label, depth=BLOCKS, ms=ms, chosen=ours.kernels, **spent)
