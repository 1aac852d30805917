"""ZeRO-3: masters, moments, gradients and averages are sharded over ranks. The one door to deepspeed.

DeepSpeed shards one flat tensor for each block (engine/flat.py); what gathers them and reduces gradients is ours, because DeepSpeed's
hooks stand at every module and parameter: of 28 small blocks they made a step take five times the host time of `local`, where
these take 1.2 times (`nexus bench host`), and its step waits for the device.

In float32 the masters are the shards that compute; in bf16, and where they lie in host memory, they are copies, so after every write of
masters the shards are rewritten too.

Source: Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter models".
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nexus_scale.config.schema import Average, Optimizer
from nexus_scale.contracts import Stage, Trains, UserError
from nexus_scale.engine import deepspeed_internals, distributed, optim
from nexus_scale.engine.base import BaseEngine
from nexus_scale.engine.blocks import prepare_blocks
from nexus_scale.engine.ema import MovingAverage
from nexus_scale.engine.networks import Caller, on_second_derivative, share_buffers
from nexus_scale.engine.settings import EngineSettings, NetSpec
from nexus_scale.engine.sharding import FlatPartition, shard_network

logger = logging.getLogger(__name__)


def _deepspeed(device: torch.device) -> ModuleType:
    """The deepspeed module, imported quietly, within a process group, and kept from compiling C++ at run time.

    A killed build of its shared-memory op leaves a lock on which every later start waits silently.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # Otherwise it starts `numactl` as a process at every reduction, to count what it calls devices.
        os.environ.setdefault("LOCAL_SIZE", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch\.distributed)(\..*)?")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed_internals.forbid_compilers(deepspeed.ops)
    if not dist.is_initialized():
        _join_group_of_one(device)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    module: ModuleType = deepspeed
    return module


def _join_group_of_one(device: torch.device) -> None:
    """Makes the process group that ZeRO needs even for one rank."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class DeepSpeedEngine(BaseEngine):
    """ZeRO-3; small networks stay gathered on each rank, and only their optimizer's state is sharded."""

    def __init__(
        self,
        specs: Mapping[str, NetSpec],
        averages: Mapping[str, Average],
        settings: EngineSettings,
        stage: Stage | None = None,
        called: Collection[str] = (),
    ):
        super().__init__(specs, averages, settings, called)
        self._library = _deepspeed(self.device)
        self.rank, self.world_size = distributed.rank_and_world_size()
        self._zero: dict[str, ZeroNetwork] = {}
        self._frozen: dict[str, FrozenZeroNetwork] = {}
        for name, spec in specs.items():
            one: ZeroNetwork | FrozenZeroNetwork
            if spec.optimizer is None or not spec.learns:
                one = self._frozen[name] = FrozenZeroNetwork(
                    self._library, name, spec, settings, self.device, self.dtype, adapted=name in self._adapted
                )
            else:
                one = self._zero[name] = ZeroNetwork(
                    self._library, name, spec, spec.optimizer, settings, self.device, self.dtype
                )
            self.modules[name], self.partitions[name] = one.module, one.partition
            self.nets[name] = Caller(
                one.module, one.module if one.sharded.whole else _once(one.module, name), self.dtype
            )
        self._finish()
        for name, zero in self._zero.items():
            zero.follow(self._averages_beside(name))

    def backward(self, trains: Trains, loss: Tensor, last: bool) -> None:
        self._for_backward(loss).backward()
        for zero in self._zero.values():  # those that rest may have computed, too
            zero.sharded.finish()
        for frozen in self._frozen.values():
            frozen.sharded.finish()

    def _step(self, name: str, step: int, last: bool) -> Mapping[str, Tensor | float]:
        zero = self._zero[name]
        said = zero.step(step, self.settings.steps, last)
        if last:
            self._moved(zero.averages, step)
        return said

    def _make_callable(self, name: str, average: MovingAverage) -> None:
        """Gives the average a copy that computes, whole or sharded as its network is."""
        of = average.spec.average_of
        spec, zero = self.specs[of], self._zero[of]
        twin = self._frozen[name] = FrozenZeroNetwork(self._library, of, spec, self.settings, self.device, self.dtype)

        def follow() -> None:
            share_buffers(twin.module, zero.module)
            twin.sharded.compute_with(zero.partition.joined(average.values))

        self._follow[name] = follow
        self.nets[name] = self._call_of_average(twin.module, spec)

    @contextmanager
    def _lent(self, average: MovingAverage) -> Iterator[None]:
        """Lets the average's shards compute; the trained ones are kept aside and come back to the bit."""
        zero = self._zero[average.spec.average_of]
        own = zero.sharded.shards.clone()
        zero.sharded.compute_with(zero.partition.joined(average.values))
        try:
            yield
        finally:
            zero.sharded.compute_with(own)

    def _refresh(self, name: str) -> None:
        one = self._zero.get(name) or self._frozen[name]
        one.refresh()

    def _optimizer_steps(self, name: str) -> int:
        return self._zero[name].update.steps

    def _set_optimizer_steps(self, name: str, steps: int) -> None:
        self._zero[name].update.steps = steps


def _once(module: Any, name: str) -> Any:
    """The call of a sharded network; it refuses to be differentiated twice."""
    return on_second_derivative(module, functools.partial(_refuse, name))


def _refuse(name: str) -> None:
    raise UserError(
        f"network {name!r}: the objective differentiates its gradient again (R1, a gradient penalty), which "
        f"ZeRO-3 cannot while its weights are sharded; set networks.{name}.engine: replicated to keep it whole on each rank, or "
        "engine: replicated in the cluster"
    )


class ZeroNetwork:
    """One trained network under ZeRO-3, and this rank's masters, moments and averages of it.

    Attributes:
        update: the optimizer, over the masters' runs of one tag.
        averages: those that move with the optimizer's step.
    """

    def __init__(
        self,
        library: ModuleType,
        name: str,
        spec: NetSpec,
        optimizer: Optimizer,
        settings: EngineSettings,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.spec = optimizer
        self._offloaded = settings.offload == "cpu"
        once = settings.accumulation == 1 and not self._offloaded
        self.module, self.sharded = shard_network(
            library, name, spec, settings, device, dtype, dtype if once else torch.float32
        )
        prepare_blocks(
            self.module,
            name,
            activation_checkpointing=settings.activation_checkpointing,
            compiled=settings.compile,
            graphs=settings.cuda_graphs and self.sharded.whole and dtype == torch.bfloat16,
        )
        shards = self.sharded.shards
        self._apart = self._offloaded or dtype != torch.float32
        self.masters = self._copied(shards) if self._apart else shards
        self.partition = FlatPartition(self.module, self.sharded, self.masters)
        self._learning = [(run, tag) for run, tag in self.partition.runs if tag.learns]
        if not any(parameter.requires_grad for parameter in self.module.parameters()):
            raise UserError(
                f"network {name!r} is trained, but none of its parameters requires a gradient; set frozen: true"
            )
        self.update = optim.make_update(
            optimizer,
            [self.masters[run] for run, _ in self._learning],
            weight_decays=[tag.weight_decay for _, tag in self._learning],
            lr_multipliers=[tag.lr_multiplier for _, tag in self._learning],
            copies=[shards[run] for run, _ in self._learning]
            if dtype != torch.float32 and not self._offloaded
            else None,
        )
        self.partition.learn(self.update.moments)
        self.averages: list[MovingAverage] = []

    def _copied(self, shards: Tensor) -> Tensor:
        """Masters apart from the shards that compute."""
        if not self._offloaded:
            return shards.float()
        masters = shards.to("cpu", torch.float32, copy=True)
        return masters.pin_memory() if shards.is_cuda else masters

    def follow(self, averages: list[MovingAverage]) -> None:
        """Lets averages move with the optimizer's step."""
        self.averages = averages
        for average in averages:
            average.leave_to_optimizer([tag.learns for _, tag in self.partition.runs])
        self.update.follow([average.learning for average in averages])

    @torch.no_grad()
    def step(self, step: int, steps: int, last: bool) -> dict[str, Tensor | float]:
        """Updates this rank's part. `last`: the averages move with it. A collective."""
        gradients = self.sharded.taken()
        if self._offloaded:
            gradients = gradients.to(self.masters.device)  # waits for the device, as the optimizer works on the host
        parts = [gradients[run] for run, _ in self._learning]
        if not self.update.takes_bf16:
            parts = [part.float() for part in parts]
        norm = distributed.sum_on_device(self.update.norm(parts).to(self.sharded.shards.device).square()).sqrt()
        lr = self.spec.lr * optim.lr_factor(self.spec.schedule, step, steps)
        decays = [average.decay(step) for average in self.averages] if last else []
        factor = self.update.clip_factor(norm).to(self.masters.device)
        self.update(parts, lr=lr, factor=factor, decays=decays)
        self.refresh(copied=not self._offloaded)
        return {"lr": lr, "grad_norm": norm, "skipped": 1.0 - torch.isfinite(norm).float()}

    @torch.no_grad()
    def refresh(self, copied: bool = False) -> None:
        """Lets what computes follow the masters; `copied`: the shards do already. A collective."""
        if self._apart and not copied:
            self.sharded.shards.copy_(self.masters, non_blocking=True)
        self.sharded.refresh()


class FrozenZeroNetwork:
    """A network that only computes, sharded where it is large; it is gathered block by block, in backward too."""

    def __init__(
        self,
        library: ModuleType,
        name: str,
        spec: NetSpec,
        settings: EngineSettings,
        device: torch.device,
        dtype: torch.dtype,
        adapted: bool = False,
    ):
        self.module, self.sharded = shard_network(library, name, spec, settings, device, dtype, None)
        recompute = adapted and settings.activation_checkpointing
        prepare_blocks(self.module, name, activation_checkpointing=recompute, compiled=settings.compile)
        self.partition = FlatPartition(self.module, self.sharded, self.sharded.shards)

    def refresh(self) -> None:
        """Lets what computes follow the shards. A collective."""
        self.sharded.refresh()
