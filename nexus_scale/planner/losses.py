"""What a whole loss keeps for its backward pass, through all the networks that it calls: counted where the data are there.

Networks alone (planner.activations) leave out what lies between them: a generator's loss goes through its discriminator, a codec's through
spectrograms.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from nexus_scale.config.recipe import Recipe
from nexus_scale.contracts import Batch, Network, Objective, Phase, UserError
from nexus_scale.engine.networks import Caller, place, without_gradients
from nexus_scale.kernels import choice
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.planner.activations import FEW, MANY, PASSES, Activations, Blocks, Kept, SavedBytes, of_samples
from nexus_scale.planner.attention import FusedAttention
from nexus_scale.planner.fused import Traces, as_compiled
from nexus_scale.planner.live import peak_of_passes
from nexus_scale.planner.memory import Precision
from nexus_scale.rehearsal.batches import batches_to_rehearse, networks_on_meta, phases_to_check
from nexus_scale.rehearsal.flops import MOST_OPERATIONS, Bounded
from nexus_scale.train import make_objective, open_data

log = logging.getLogger(__name__)


def largest_sample(recipe: Recipe, data_root: Path) -> Batch | None:
    """A sample of the recipe's data, of the size that has most values, as a batch of its own; None where the data are not there, or
    captions would have to be encoded."""
    if recipe.data.on_the_fly:
        return None
    try:
        dataset = open_data(recipe, data_root)
    except UserError as error:
        log.info(
            "each network is counted by itself, without what the loss adds, since the data cannot be read: %s", error
        )
        return None
    found = max(
        batches_to_rehearse(dataset), key=lambda batch: sum(value[0].numel() for value in batch.fields.values())
    )
    return repeated(found, 1)


def repeated(batch: Batch, times: int) -> Batch:
    """A batch of its first sample, so many times."""
    fields = {name: value[:1].expand(times, *value.shape[1:]).contiguous() for name, value in batch.fields.items()}
    place = torch.arange(times)
    return Batch(fields, place, place, bucket=batch.bucket)


class Flops(TorchDispatchMode):
    """Sums FLOPs by torch's own formulas, also where a loss takes gradients itself, which torch's counter cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def flops_of_step(recipe: Recipe, sample: Batch) -> float:
    """FLOPs of a training step of the recipe's global batch: forward and backward of all its phases, through every network that their
    losses call, frozen teachers and averages too; counted on the meta device, in the last step's phases.

    Args:
        sample: see `largest_sample`.
    Raises:
        TooManyOperations: it takes too long to count.
    """
    objective = make_objective(recipe, None)
    networks = networks_on_meta(recipe, objective)
    for network in networks.values():
        place(network, torch.device("meta"), torch.float32)
    losses, batch = Losses(recipe, objective, networks, torch.float32), repeated(sample, FEW)
    with choice.plain(), Flops() as counter, Bounded(PASSES * MOST_OPERATIONS):
        for phase in losses.phases:
            losses.total(phase, batch, "meta").backward()
    return counter.total * recipe.global_batch / FEW


class Losses:
    """The losses of a recipe's last step, in which all its phases have begun, on networks that lie on one device.

    Args:
        networks: by name, those that are trained, frozen and called as averages.
    """

    def __init__(self, recipe: Recipe, objective: Objective, networks: dict[str, Network], dtype: torch.dtype):
        self.recipe, self.objective, self.networks = recipe, objective, networks
        self.nets: dict[str, Any] = {}
        for name, network in networks.items():
            rests = name in recipe.averages()
            self.nets[name] = Caller(network, without_gradients(network) if rests else network, dtype)
            network.train(name in recipe.trained())
        *_, (self.step, phases) = phases_to_check(objective, recipe.steps)
        self.phases: Sequence[Phase] = phases

    def total(self, phase: Phase, batch: Batch, device: str) -> Tensor:
        """The loss of a phase, in which its networks learn and others rest."""
        for name, network in self.networks.items():
            network.requires_grad_(name in phase.networks)
        rng = ProgressRng(self.recipe.seed, self.step, phase.name, batch.positions, device)
        return self.objective.loss(phase.name, self.nets, batch.on(device), rng, self.step).total

    def tensors(self) -> list[Tensor]:
        return [t for network in self.networks.values() for t in (*network.parameters(), *network.buffers())]

    def modules(self) -> torch.nn.ModuleList:
        return torch.nn.ModuleList(self.networks.values())


def activations_of_losses(
    recipe: Recipe,
    sample: Batch,
    *,
    precision: Precision,
    checkpointing: bool = False,
    traces: Traces | None = None,
) -> Activations:
    """What one micro-batch takes in the phase that takes most.

    Args:
        sample: see `largest_sample`.
        traces: see `kept`.
    Raises:
        TooManyOperations: it takes too long to count.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    objective = make_objective(recipe, None)
    networks = networks_on_meta(recipe, objective)
    for network in networks.values():
        place(network, torch.device("meta"), dtype)
    losses = Losses(recipe, objective, networks, dtype)
    most = Activations()
    for phase in losses.phases:
        few, many = (
            _kept(losses, phase, repeated(sample, n), checkpointing, None, traces is None) for n in (FEW, MANY)
        )
        compiled = None if traces is None else _kept(losses, phase, repeated(sample, FEW), checkpointing, traces, False)
        most = max(most, of_samples(many, few, compiled), key=lambda found: found.of(MANY))
    return most


def _kept(
    losses: Losses, phase: Phase, batch: Batch, checkpointing: bool, traces: Traces | None, workspace: bool
) -> Kept:
    counter = SavedBytes(losses.tensors())
    learning = [losses.networks[name] for name in phase.networks]
    blocks = Blocks(counter)
    calls: Counter[Any] = Counter()
    with ExitStack() as within:
        for mode in (choice.plain(), torch.enable_grad(), FusedAttention(), Bounded(PASSES * MOST_OPERATIONS)):
            within.enter_context(mode)
        if traces is not None:
            calls = within.enter_context(as_compiled([b for network in learning for b in network.blocks()], traces))
        if checkpointing:
            within.enter_context(blocks.watched([b for network in learning for b in network.blocks()]))
        with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
            losses.total(phase, batch, "meta")
        total = blocks.with_recomputation()
        if traces is not None:
            return Kept(total, max((one.workspace for key in calls for one in traces[key].kernels), default=0))
    if not workspace:
        return Kept(total, 0)
    with choice.plain(), FusedAttention():
        peak = peak_of_passes(losses.modules(), lambda: losses.total(phase, batch, "meta"), list(batch.fields.values()))
    return Kept(total, max(0, peak - counter.bytes))
