"""Engines that keep everything on each rank: `local` is one process; `replicated` averages gradients over ranks.

`replicated` is for small networks; under ZeRO-3 a single network is kept whole by its own `engine: replicated`. A step runs
little Python: norms are one call over all parameters, and so are clipping, the optimizer, averages and copies.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_scale.config.schema import Average, Optimizer
from nexus_scale.contracts import Network, ReadShard, Stage, Trains, UserError, names_of
from nexus_scale.engine import optim
from nexus_scale.engine.base import BaseEngine, Partition
from nexus_scale.engine.blocks import prepare_blocks
from nexus_scale.engine.eight_bits import hold_in_eight_bits, layers_of, quantised
from nexus_scale.engine.ema import MovingAverage
from nexus_scale.engine.networks import (
    Caller,
    build_network,
    build_to_be_filled,
    give_memory,
    place,
    share_buffers,
    twin_of,
)
from nexus_scale.engine.settings import EngineSettings, NetSpec

BUCKET_NUMEL = 8 * 2**20
"""Gradients travel in flat buckets of about so many elements: few messages, little memory on top."""


class _Learner:
    """A trained network's parameters and optimizer.

    Attributes:
        weights: the parameters that learn.
        masters: their values in float32: the weights themselves, or under bf16 copies of them.
        averages: those that move with the optimizer's step.
    """

    def __init__(self, spec: Optimizer, weights: list[nn.Parameter]):
        self.spec, self.weights = spec, weights
        whole = weights[0].dtype == torch.float32
        self.masters: list[Tensor] = list(weights) if whole else [weight.detach().float() for weight in weights]
        decays, multipliers = optim.tags_of(weights, spec)
        self.update = optim.make_update(
            spec, self.masters, weight_decays=decays, lr_multipliers=multipliers, copies=None if whole else weights
        )
        self.averages: list[MovingAverage] = []
        self._sums: list[Tensor] | None = None

    def follow(self, averages: list[MovingAverage], learns: list[bool]) -> None:
        """Lets averages move with the optimizer's step; `learns`: which of their values the optimizer updates."""
        self.averages = averages
        for average in averages:
            average.leave_to_optimizer(learns)
        self.update.follow([average.learning for average in averages])

    @torch.no_grad()
    def add_up(self, last: bool) -> None:
        """Sums bf16 gradients over micro-batches in float32. A step's only one stays as it is."""
        if last and self._sums is None:
            return
        if self._sums is None:
            self._sums = [
                torch.zeros_like(m) if w.grad is None else w.grad.float()
                for m, w in zip(self.masters, self.weights, strict=True)
            ]
        else:
            taken = [(total, weight.grad) for total, weight in zip(self._sums, self.weights, strict=True)]
            reached = [(total, gradient) for total, gradient in taken if gradient is not None]
            if reached:
                torch._foreach_add_([total for total, _ in reached], [gradient for _, gradient in reached])
        for weight in self.weights:
            weight.grad = None

    def take_gradients(self) -> list[Tensor]:
        """The step's gradients, float32 where the optimizer takes no others. A parameter that took no part has gradient zero, as under
        ZeRO, and Adam's moments still decay."""
        found = self._sums
        if found is None:
            found = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in self.weights]
        self._sums = None
        for weight in self.weights:
            weight.grad = None
        return found if self.update.takes_bf16 else [gradient.float() for gradient in found]


class LocalEngine(BaseEngine):
    """Keeps everything on this rank, and averages gradients over ranks where there are several."""

    def __init__(
        self,
        specs: Mapping[str, NetSpec],
        averages: Mapping[str, Average],
        settings: EngineSettings,
        stage: Stage | None = None,
        called: Collection[str] = (),
    ):
        super().__init__(specs, averages, settings, called)
        if settings.engine == "local" and self.world_size > 1:
            raise UserError(
                f"engine local runs in one process, but there are {self.world_size}; set engine to deepspeed or replicated",
                code=4,
            )
        self._learners: dict[str, _Learner] = {}
        for name, spec in specs.items():
            module = self._built(name, spec)
            if spec.bits:
                hold_in_eight_bits(module, self.device, self.dtype)
            else:
                place(module, self.device, self.dtype)
            prepare_blocks(
                module,
                name,
                activation_checkpointing=settings.activation_checkpointing and (spec.learns or name in self._adapted),
                compiled=settings.compile and not spec.bits,
                graphs=settings.cuda_graphs and spec.learns and self.dtype == torch.bfloat16,
            )
            self.modules[name] = module
            self.nets[name] = module if self.dtype == torch.float32 else Caller(module, module, self.dtype)
            if spec.optimizer is not None and spec.learns:
                self._learners[name] = self._learner(name, module, spec.optimizer)
            self.partitions[name] = self._partition_of(name)
        self._finish()

    def _built(self, name: str, spec: NetSpec) -> Network:
        """A network with its first weights; with zeros in the precision that computes where it is large and all of it is given."""
        module = build_to_be_filled(name, spec, self.settings)
        if module is None:
            return build_network(name, spec, self.settings.seed)
        device = torch.device("cpu") if spec.bits else self.device  # where it comes to 8 bits layer by layer
        give_memory(module, lambda parameter: torch.zeros(parameter.shape, dtype=self.dtype, device=device))
        return module

    def _learner(self, name: str, module: nn.Module, spec: Optimizer) -> _Learner:
        weights = [p for p in module.parameters() if p.requires_grad]
        if not weights:
            raise UserError(
                f"network {name!r} is trained, but none of its parameters requires a gradient; set frozen: true"
            )
        return _Learner(spec, weights)

    def _partition_of(self, name: str) -> Partition:
        learner = self._learners.get(name)
        held: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}
        if learner is not None:
            for i, weight in enumerate(learner.weights):
                moments = {key: values[i].view(-1) for key, values in learner.update.moments.items()}
                held[id(weight)] = learner.masters[i], moments
        partition = Partition()
        for parameter_name, parameter in self.modules[name].named_parameters():
            if self.specs[name].bits and parameter_name.removesuffix(".weight") in layers_of(self.modules[name]):
                continue  # `fill` reads it
            master, its_moments = held.get(id(parameter), (parameter, None))
            partition.add(parameter_name, tuple(parameter.shape), 0, master.detach().view(-1), its_moments)
        return partition

    def _finish(self) -> None:
        super()._finish()
        for name, learner in self._learners.items():
            learns = [moments is not None for moments in self.partitions[name].moments]
            learner.follow(self._averages_beside(name), learns)

    @torch.no_grad()
    def fill(self, name: str, read: ReadShard) -> None:
        """See contracts.Engine; what is held in 8 bits is read layer by layer."""
        super().fill(name, read)
        for path, layer in layers_of(self.modules[name]).items() if self.specs[name].bits else ():
            with contextlib.suppress(KeyError):  # as in other networks
                weight = read(f"{path}.weight", 0, layer.weight.numel()).view(layer.weight.shape)
                layer.weight = quantised(weight.to(self.device, self.dtype))

    # ------------------------------------------------------------------------------------------ learning

    def backward(self, trains: Trains, loss: Tensor, last: bool) -> None:
        self._for_backward(loss).backward()
        if self.dtype != torch.float32:
            for name in names_of(trains):
                self._learners[name].add_up(last)

    @torch.no_grad()
    def _step(self, name: str, step: int, last: bool) -> Mapping[str, Tensor | float]:
        learner = self._learners[name]
        spec, update = learner.spec, learner.update
        gradients = learner.take_gradients()
        if self.world_size > 1:
            gradients = _averaged_over_ranks(gradients, self.world_size)
        # Gradients are the same on all ranks by now, so all come to the same decision without asking.
        norm = update.norm(gradients)
        lr = spec.lr * optim.lr_factor(spec.schedule, step, self.settings.steps)
        decays = [average.decay(step) for average in learner.averages] if last else []
        update(gradients, lr=lr, factor=update.clip_factor(norm), decays=decays)
        if last:
            self._moved(learner.averages, step)
        if update.waits:
            value = float(norm)
            return {"lr": lr, "grad_norm": value, "skipped": 0.0 if math.isfinite(value) else 1.0}
        return {"lr": lr, "grad_norm": norm, "skipped": 1.0 - torch.isfinite(norm).float()}

    # ------------------------------------------------------------------------------------------ averages in use

    def _make_callable(self, name: str, average: MovingAverage) -> None:
        """Gives the average a copy that computes; in float32 it shares the average's memory and needs no update."""
        of = average.spec.average_of
        twin, network = twin_of(self.specs[of]), self.modules[of]
        prepare_blocks(twin, name, activation_checkpointing=False, compiled=self.settings.compile)
        copies = []
        for parameter, value in zip(twin.parameters(), average.values, strict=True):
            parameter.data = value.view(parameter.shape).to(self.dtype)
            copies.append(parameter.data.view(-1))

        @torch.no_grad()
        def follow() -> None:
            share_buffers(twin, network)
            if self.dtype != torch.float32:
                torch._foreach_copy_(copies, average.values)

        self._follow[name] = follow
        self.nets[name] = self._call_of_average(twin, self.specs[of])

    @contextmanager
    def _lent(self, average: MovingAverage) -> Iterator[None]:
        """Points the weights at the average's memory: in float32 nothing is copied, and nothing has to be restored."""
        parameters = list(self.modules[average.spec.average_of].parameters())
        own = [parameter.data for parameter in parameters]
        for parameter, value in zip(parameters, average.values, strict=True):
            parameter.data = value.view(parameter.shape).to(parameter.dtype)
        try:
            yield
        finally:
            for parameter, data in zip(parameters, own, strict=True):
                parameter.data = data

    @torch.no_grad()
    def _refresh(self, name: str) -> None:
        learner = self._learners.get(name)
        if learner is not None and self.dtype != torch.float32:
            torch._foreach_copy_(list[Tensor](learner.weights), learner.masters)

    # ------------------------------------------------------------------------------------------ state

    def _optimizer_steps(self, name: str) -> int:
        return self._learners[name].update.steps

    def _set_optimizer_steps(self, name: str, steps: int) -> None:
        self._learners[name].update.steps = steps


def _averaged_over_ranks(gradients: list[Tensor], world_size: int) -> list[Tensor]:
    """Their means over ranks. A collective."""
    found: list[Tensor] = []
    bucket: list[Tensor] = []
    numel = 0
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        numel += gradient.numel()
        if numel >= BUCKET_NUMEL or i + 1 == len(gradients):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket]).float()
            dist.all_reduce(flat)
            flat /= world_size
            parts = flat.split([tensor.numel() for tensor in bucket])
            found += [part.view(tensor.shape) for part, tensor in zip(parts, bucket, strict=True)]
            bucket, numel = [], 0
    return found
