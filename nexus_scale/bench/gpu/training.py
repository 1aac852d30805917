"""Our side: a recipe's step through the trainer, on any engine, without data, callbacks or Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nexus_scale.bench.gpu.cases import Fields, Task
from nexus_scale.bench.gpu.measuring import StageTimes
from nexus_scale.config.recipe import Computing, Recipe, cluster_from, load_recipe
from nexus_scale.contracts import Batch, Engine, Loss, Network, Objective, Phase, Progress, RunFolder
from nexus_scale.engine import build_engine
from nexus_scale.engine.settings import EngineSettings
from nexus_scale.kernels import choice
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.planner.losses import flops_of_step
from nexus_scale.rehearsal.batches import networks_on_meta, specs_of
from nexus_scale.run.choices import choose, try_kernels
from nexus_scale.train import make_objective
from nexus_scale.trainer import Trainer

TABLE = 1 << 20


def cheaply(network: nn.Module) -> None:
    """Fills all parameters with repeated draws of N(0, 0.02^2): a real start takes longer to draw than the steps take, and zeros would make
    matrix products faster than they are."""
    table = torch.randn(TABLE, generator=torch.Generator().manual_seed(0)) * 0.02
    with torch.no_grad():
        for parameter in network.parameters():
            table = table.to(parameter.device)
            flat = parameter.data.view(-1)
            for start in range(0, len(flat), TABLE):
                part = flat[start : start + TABLE]
                part.copy_(table[: len(part)])


def made_cheaply(make: Callable[[], Network], device: torch.device) -> Network:
    """A network on its device at once, unless it is to take no memory."""
    with torch.get_default_device() if torch.get_default_device().type == "meta" else device:
        network = make()
    network.init_weights = partial(cheaply, network)  # type: ignore[method-assign]
    return network


def recipe_of(task: Task, tiny: bool) -> Recipe:
    return load_recipe(task.recipe, {} if tiny else dict(task.overrides), tiny=tiny)


def fields_of(task: Task, recipe: Recipe) -> Fields:
    """The fields of a batch; in miniature, the recipe's made-up data."""
    return recipe.data.synthetic.fields if recipe.data.synthetic is not None else task.fields


def batch_of(fields: Fields, count: int, device: torch.device) -> Batch:
    """So many made-up samples in host memory, pinned for a GPU as the loader's are; the same ones for the same count."""
    rng = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for name, spec in fields.items():
        shape = (count, *spec["shape"])
        if spec.get("dtype") == "int64":
            made[name] = torch.randint(spec["high"], shape, generator=rng)
        else:
            made[name] = torch.randn(shape, generator=rng).half()
        if spec.get("lengths"):
            made[f"{name}_mask"] = torch.ones(shape[:2], dtype=torch.bool)
    if device.type == "cuda":
        made = {name: value.pin_memory() for name, value in made.items()}
    return Batch(made, torch.arange(count), torch.arange(count))


class OnePhase:
    """An objective of which only one phase runs, with the networks that it trains."""

    def __init__(self, objective: Objective, phase: str):
        self._objective, self._phase = objective, phase

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def phases(self, step: int) -> Sequence[Phase]:
        return [phase for phase in self._objective.phases(step) if phase.name == self._phase]

    @property
    def needs(self) -> Sequence[str]:
        return tuple(name for phase in self.phases(0) for name in phase.networks)

    def loss(self, *arguments: Any) -> Loss:
        return self._objective.loss(*arguments)


def objective_of(task: Task, recipe: Recipe) -> Objective:
    objective = make_objective(recipe, None)
    return cast(Objective, OnePhase(objective, task.phase)) if task.phase else objective


def forward_flops(recipe: Recipe, objective: Objective, fields: Fields) -> float:
    """FLOPs of a sample's forward pass through all that the phases of a step call, counted on the meta device; where a loss takes gradients
    itself, a third of those of its forward and backward."""
    if objective.needs_whole:
        return flops_of_step(recipe, batch_of(fields, 1, torch.device("cpu"))) / recipe.global_batch / 3
    nets, count = networks_on_meta(recipe, objective), 0
    batch = batch_of(fields, 1, torch.device("cpu")).on("meta")
    for phase in objective.phases(0):
        rng = ProgressRng(0, 0, phase.name, batch.positions, torch.device("meta"))
        with choice.plain(), torch.no_grad(), FlopCounterMode(display=False) as counter:
            objective.loss(phase.name, nets, batch, rng, 0)
        count += counter.get_total_flops()
    return float(count)


class Ours:
    """A recipe on an engine.

    Args:
        cluster: settings of a cluster file.
        kernels: implementations by name; what is missing is chosen, by trial on a GPU, as in a run's first start.
        trials: what is known of kernels, as `trials` has it; it is not tried again.
        tiny: in miniature; ZeRO-3 shards even so small a network.
    """

    def __init__(
        self,
        task: Task,
        cluster: Mapping[str, Any],
        device: torch.device,
        *,
        tiny: bool,
        kernels: Mapping[str, str] | None = None,
        trials: Sequence[Any] = (),
    ):
        self.device, self.tiny, self.stages = device, tiny, StageTimes(device)
        self.recipe = recipe_of(task, tiny)
        self.fields = fields_of(task, self.recipe)
        self.objective = objective_of(task, self.recipe)
        settings = {"activation_checkpointing": task.checkpointing, "kernels": dict(kernels or {}), **cluster}
        self.cluster = cluster_from({"precision": "bf16", "compile": True, **settings}, "bench gpu")
        self.kernels, self.trials = self._choose(trials)
        self.flops = forward_flops(self.recipe, self.objective, self.fields)
        self.engine = self._engine()
        self.progress = Progress()
        self._trainer: Trainer | None = None

    def _choose(self, known: Sequence[Any]) -> tuple[dict[str, str], list[dict[str, Any]]]:
        """Implementations by kernel, and what trials found by shape."""
        choices = choose(self.cluster, RunFolder(Path(tempfile.gettempdir(), "bench-gpu-is-no-run")), self.device)
        choices["trials"] = list(known)
        rehearse = partial(forward_flops, self.recipe, self.objective, self.fields)
        choices = try_kernels(choices, self.cluster, self.device, rehearse)
        return choices["kernels"], choices["trials"]

    def _engine(self) -> Engine:
        specs = specs_of(self.recipe, self.objective)
        needed = {*self.objective.needs, *(specs[name].adapts for name in self.objective.needs if name in specs)}
        specs = {
            name: replace(spec, make=partial(made_cheaply, spec.make, self.device))
            for name, spec in specs.items()
            if name in needed
        }
        averages = {name: one for name, one in self.recipe.averages().items() if one.average_of in specs}
        computing = {name: getattr(self.cluster, name) for name in Computing.model_fields}
        bf16 = self.cluster.precision == "bf16"
        return build_engine(
            specs,
            averages,
            EngineSettings(
                **computing,
                precision="bf16" if bf16 else "float32",
                steps=10**6,
                seed=0,
                device=self.device,
                whole_numel=0,
            ),
        )

    @property
    def waited(self) -> float:
        return 0.0 if self._trainer is None else self._trainer.readings.waited

    def steps_of(self, micro_batch: int) -> Callable[[int], None]:
        batch = batch_of(self.fields, micro_batch, self.device)
        trainer = self._trainer = Trainer(
            steps=10**9, seed=0, objective=self.objective, engine=self.engine, next_batches=lambda: [batch], callbacks=[],
            progress=self.progress, stage=self.stages,
        )  # fmt: skip

        return lambda count: trainer.advance(self.progress.step + count)
