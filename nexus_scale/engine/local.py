"""Engines that keep everything on each rank: `local` is one process; `replicated` averages gradients over ranks.

`replicated` is for small networks; under ZeRO-3 a single network is kept whole by its own `engine: replicated`. A step runs
little Python: lists are made once, and norms, clipping and averages are one call over all parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_scale.config.schema import Average, Optimizer
from nexus_scale.contracts import Stage, Trains, UserError, names_of
from nexus_scale.engine import optim
from nexus_scale.engine.base import BaseEngine, Partition
from nexus_scale.engine.blocks import prepare_blocks
from nexus_scale.engine.ema import MovingAverage
from nexus_scale.engine.networks import Caller, build_network, place, share_buffers, twin_of, without_gradients
from nexus_scale.engine.settings import EngineSettings, NetSpec
from nexus_scale.kernels.adam import made_ready

BUCKET_NUMEL = 8 * 2**20
"""Gradients travel in flat buckets of about so many elements: few messages, little memory on top."""


@dataclass
class _Learner:
    """The parameters and the optimizer of a trained network. `masters` are its weights in float32, float32 copies of them under bf16."""

    spec: Optimizer
    weights: list[nn.Parameter]
    masters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    update: Callable[[], None]
    multipliers: list[float]
    gradients: list[Tensor] = field(default_factory=list)
    lr: float = -1.0


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
            module = place(build_network(name, spec, settings.seed), self.device, self.dtype)
            prepare_blocks(
                module,
                name,
                activation_checkpointing=settings.activation_checkpointing and spec.learns,
                compiled=settings.compile,
            )
            self.modules[name] = module
            self.nets[name] = module if self.dtype == torch.float32 else Caller(module, module, self.dtype)
            if spec.optimizer is not None and spec.learns:
                self._learners[name] = self._learner(name, module, spec.optimizer)
            self.partitions[name] = self._partition_of(name)
        self._finish()

    def _learner(self, name: str, module: nn.Module, spec: Optimizer) -> _Learner:
        weights = [p for p in module.parameters() if p.requires_grad]
        if not weights:
            raise UserError(
                f"network {name!r} is trained, but none of its parameters requires a gradient; set frozen: true"
            )
        masters = weights if self.dtype == torch.float32 else [_master_of(weight) for weight in weights]
        groups = optim.param_groups(masters, spec)
        multipliers = [float(group.pop("lr_multiplier")) for group in groups]
        optimizer = optim.make_optimizer(groups, spec)
        optim.allocate_state(optimizer)
        return _Learner(spec, weights, masters, optimizer, made_ready(optimizer), multipliers)

    def _partition_of(self, name: str) -> Partition:
        learner = self._learners.get(name)
        masters = {} if learner is None else {id(w): m for w, m in zip(learner.weights, learner.masters, strict=True)}
        partition = Partition()
        for parameter_name, parameter in self.modules[name].named_parameters():
            master = masters.get(id(parameter))
            moments = None
            if master is not None and learner is not None:
                state = learner.optimizer.state[master]
                moments = {key: state[key].view(-1) for key in optim.moments_of(learner.spec)}
            held = parameter if master is None else master
            partition.add(parameter_name, tuple(parameter.shape), 0, held.detach().view(-1), moments)
        return partition

    # ------------------------------------------------------------------------------------------ learning

    def backward(self, trains: Trains, loss: Tensor, last: bool) -> None:
        self._for_backward(loss).backward()
        if self.dtype != torch.float32:
            for name in names_of(trains):
                self._add_gradients(self._learners[name])

    @staticmethod
    def _add_gradients(learner: _Learner) -> None:
        """Sums bf16 gradients over micro-batches, in float32."""
        if not learner.gradients:
            learner.gradients = [torch.zeros_like(master) for master in learner.masters]
        sums, fresh = [], []
        for weight, total in zip(learner.weights, learner.gradients, strict=True):
            if weight.grad is not None:
                sums.append(total)
                fresh.append(weight.grad.float())
                weight.grad = None
        if sums:
            torch._foreach_add_(sums, fresh)

    @torch.no_grad()
    def _step(self, name: str, step: int) -> Mapping[str, Tensor | float]:
        learner = self._learners[name]
        if self.dtype != torch.float32:
            for master, total in zip(learner.masters, learner.gradients, strict=True):
                master.grad = total
        gradients: list[Tensor] = []
        for parameter in learner.masters:
            gradient = parameter.grad
            if gradient is None:
                # As under ZeRO: a parameter that took no part has gradient zero, and Adam's moments still decay.
                gradient = parameter.grad = torch.zeros_like(parameter)
            gradients.append(gradient)
        if self.world_size > 1:
            _average_over_ranks(gradients, self.world_size)
        # Gradients are the same on all ranks by now, so all come to the same decision without asking.
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))))
        spec = learner.spec
        lr = spec.lr * optim.lr_factor(spec.schedule, step, self.settings.steps)
        finite = math.isfinite(norm)
        if finite:
            if spec.clip_grad_norm is not None and norm > spec.clip_grad_norm:
                torch._foreach_mul_(gradients, spec.clip_grad_norm / (norm + 1e-6))
            if lr != learner.lr:
                learner.lr = lr
                for group, multiplier in zip(learner.optimizer.param_groups, learner.multipliers, strict=True):
                    group["lr"] = lr * multiplier
            learner.update()
            if spec.clip_weights is not None:
                optim.clip_weights(list[Tensor](learner.masters), spec.clip_weights)
        for parameter in learner.masters:
            parameter.grad = None
        if self.dtype != torch.float32:
            torch._foreach_zero_(learner.gradients)
            if finite:
                torch._foreach_copy_(list[Tensor](learner.weights), list[Tensor](learner.masters))
        return {"lr": lr, "grad_norm": norm, "skipped": 0.0 if finite else 1.0}

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
        self.nets[name] = Caller(twin, without_gradients(twin), self.dtype)

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
            torch._foreach_copy_(list[Tensor](learner.weights), list[Tensor](learner.masters))

    # ------------------------------------------------------------------------------------------ state

    def _optimizer_steps(self, name: str) -> int:
        return optim.get_steps(self._learners[name].optimizer)

    def _set_optimizer_steps(self, name: str, steps: int) -> None:
        optim.set_steps(self._learners[name].optimizer, steps)


def _master_of(weight: nn.Parameter) -> nn.Parameter:
    """A float32 copy with the same tags."""
    master = nn.Parameter(weight.detach().float())
    for tag in ("nexus_decay", "nexus_lr_multiplier"):
        if hasattr(weight, tag):
            setattr(master, tag, getattr(weight, tag))
    return master


def _average_over_ranks(gradients: list[Tensor], world_size: int) -> None:
    """Mean over ranks, in place. A collective."""
    bucket: list[Tensor] = []
    numel = 0
    for i, gradient in enumerate(gradients):
        bucket.append(gradient)
        numel += gradient.numel()
        if numel >= BUCKET_NUMEL or i + 1 == len(gradients):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            flat /= world_size
            parts = flat.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(bucket, [part.view(tensor.shape) for part, tensor in zip(parts, bucket, strict=True)])
            bucket, numel = [], 0
