"""DeepSpeed ZeRO-3: masters, moments, gradients and averages are sharded over ranks. The one door to deepspeed.

Parameter n of numel N lies on rank r as the flat slice [r * ceil(N / W), ...): the shards that checkpoints know. In
float32 the masters are the shards that compute; in bf16 they are copies, so after every write of masters the shards are
rewritten too, and with them the whole copies of parameters that ZeRO-3 keeps gathered.

Source: Rajbhandari et al. 2020, "ZeRO: memory optimizations toward training trillion parameter models".
"""

from __future__ import annotations

import functools
import logging
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_scale.config.schema import Average, Optimizer
from nexus_scale.contracts import Network, Stage, Trains, UserError, names_of
from nexus_scale.engine import deepspeed_internals, distributed, optim
from nexus_scale.engine.base import BaseEngine, Partition, part_of, whole_partition
from nexus_scale.engine.blocks import prepare_blocks
from nexus_scale.engine.ema import MovingAverage
from nexus_scale.engine.networks import (
    Caller,
    build_network,
    on_second_derivative,
    parameter_shapes,
    place,
    share_buffers,
    twin_of,
    without_gradients,
)
from nexus_scale.engine.settings import EngineSettings, NetSpec, stays_whole

logger = logging.getLogger(__name__)

Shapes = Mapping[str, torch.Size]
"""Of a network's parameters, whole, by name."""


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
    """ZeRO-3, one DeepSpeed engine per network; small frozen ones stay whole on each rank."""

    def __init__(
        self,
        specs: Mapping[str, NetSpec],
        averages: Mapping[str, Average],
        settings: EngineSettings,
        stage: Stage | None = None,
        called: Collection[str] = (),
    ):
        if settings.zero_stage != 3:
            raise UserError(
                f"zero_stage {settings.zero_stage}: the deepspeed engine supports only ZeRO-3, whose shards make up the checkpoints; "
                "set zero_stage to 3, or engine to replicated"
            )
        super().__init__(specs, averages, settings, called)
        self._library = _deepspeed(self.device)
        self.rank, self.world_size = distributed.rank_and_world_size()
        self._zero: dict[str, ZeroNetwork] = {}
        self._frozen: dict[str, FrozenZeroNetwork] = {}
        for name, spec in specs.items():
            if spec.optimizer is None or not spec.learns:
                self._add_frozen(name, spec)
            else:
                self._add_trained(name, spec, spec.optimizer)
        self._finish()

    def _add_trained(self, name: str, spec: NetSpec, optimizer: Optimizer) -> None:
        zero = ZeroNetwork(self._library, name, spec, optimizer, self.settings, self.device, self.rank, self.world_size)
        self._zero[name] = zero
        self.modules[name], self.partitions[name] = zero.module, zero.partition
        self.nets[name] = Caller(zero.module, zero.engine if zero.kept_whole else _once(zero.engine, name), self.dtype)

    def _add_frozen(self, name: str, spec: NetSpec) -> None:
        if stays_whole_of(parameter_shapes(spec), self.settings, spec.sharded):
            module = place(build_network(name, spec, self.settings.seed), self.device, self.dtype)
            prepare_blocks(module, name, activation_checkpointing=False, compiled=self.settings.compile)
            self.modules[name], self.partitions[name] = module, whole_partition(module)
            self.nets[name] = module if self.dtype == torch.float32 else Caller(module, module, self.dtype)
            return
        frozen = FrozenZeroNetwork(self._library, name, spec, self.settings, self.device, self.rank, self.world_size)
        self._frozen[name] = frozen
        self.modules[name], self.partitions[name] = frozen.module, frozen.partition
        # Not through the engine: it would take the backward for its own. The hooks that gather weights are the module's.
        self.nets[name] = Caller(frozen.module, _once(frozen.module, name), self.dtype)

    def backward(self, trains: Trains, loss: Tensor, last: bool) -> None:
        engines = [self._zero[name].engine for name in names_of(trains)]
        for engine in engines:
            engine.set_gradient_accumulation_boundary(last)
        deepspeed_internals.backward(engines, self._for_backward(loss))

    def _step(self, name: str, step: int, last: bool) -> Mapping[str, Tensor | float]:
        said = self._zero[name].step(step, self.settings.steps)
        for frozen in self._frozen.values():
            # Of several forwards before one backward, DeepSpeed releases what the last one gathered.
            deepspeed_internals.release_gathered(frozen.engine)
        return said

    def _make_callable(self, name: str, average: MovingAverage) -> None:
        """Gives the average a copy that computes, whole or sharded as its network is."""
        of = average.spec.average_of
        spec, zero = self.specs[of], self._zero[of]
        if zero.kept_whole:
            twin = place(twin_of(spec), self.device, self.dtype)
            prepare_blocks(twin, name, activation_checkpointing=False, compiled=self.settings.compile)
            copies = WholeCopies([parameter.data for parameter in twin.parameters()], self.rank, self.world_size)
            bring: Callable[[Sequence[Tensor]], None] = copies.gather
        else:
            frozen = FrozenZeroNetwork(self._library, of, spec, self.settings, self.device, self.rank, self.world_size)
            self._frozen[name] = frozen
            twin, bring = frozen.module, frozen.compute_with

        def follow() -> None:
            share_buffers(twin, zero.module)
            bring(average.values)

        self._follow[name] = follow
        self.nets[name] = Caller(twin, without_gradients(twin), self.dtype)

    @contextmanager
    def _lent(self, average: MovingAverage) -> Iterator[None]:
        """Lets the average's shards compute; the trained ones are kept aside and come back to the bit."""
        zero = self._zero[average.spec.average_of]
        own = [held.clone() for held in zero.computing]
        zero.compute_with(average.values)
        try:
            yield
        finally:
            zero.compute_with(own)

    def _refresh(self, name: str) -> None:
        if name in self._zero:
            self._zero[name].compute_with(self.partitions[name].masters)
        elif name in self._frozen:
            deepspeed_internals.release_gathered(self._frozen[name].engine)

    def _optimizer_steps(self, name: str) -> int:
        with self._zero[name].inner_optimizer() as optimizer:
            return optim.get_steps(optimizer)

    def _set_optimizer_steps(self, name: str, steps: int) -> None:
        with self._zero[name].inner_optimizer() as optimizer:
            optim.set_steps(optimizer, steps)


def _once(engine: Any, name: str) -> Any:
    """The call of a sharded network; it refuses to be differentiated twice."""
    return on_second_derivative(engine, functools.partial(_refuse, name))


def _refuse(name: str) -> None:
    raise UserError(
        f"network {name!r}: the objective differentiates its gradient again (R1, a gradient penalty), which "
        f"ZeRO-3 cannot while its weights are sharded; set networks.{name}.engine: replicated to keep it whole on each rank, or "
        "engine: replicated in the cluster"
    )


class ZeroNetwork:
    """One trained network under ZeRO-3, and live views of this rank's shards.

    Attributes:
        computing: what forward and backward gather from, flat views cut to the real length, in the order of `partition`.
    """

    def __init__(
        self,
        library: ModuleType,
        name: str,
        spec: NetSpec,
        optimizer: Optimizer,
        settings: EngineSettings,
        device: torch.device,
        rank: int,
        world_size: int,
    ):
        self.spec, self.rank, self.world_size, self.device = optimizer, rank, world_size, device
        self.shapes = parameter_shapes(spec)
        self.kept_whole = stays_whole_of(self.shapes, settings, spec.sharded)
        self.config = zero_config(optimizer.clip_grad_norm, settings, self.shapes, spec.sharded, world_size, device)
        module = to_be_sharded(library, name, spec, settings, self.config, device)
        prepare_blocks(
            module, name, activation_checkpointing=settings.activation_checkpointing, compiled=settings.compile
        )
        learning = [p for p in module.parameters() if p.requires_grad]
        if not learning:
            raise UserError(
                f"network {name!r} is trained, but none of its parameters requires a gradient; set frozen: true"
            )
        groups = optim.param_groups(learning, optimizer)
        self.multipliers = [float(group.pop("lr_multiplier")) for group in groups]
        self.optimizer = optim.make_optimizer(groups, optimizer)
        self.engine, *_ = library.initialize(
            model=module, optimizer=self.optimizer, config=self.config, dist_init_required=False
        )
        self.module: Network = self.engine.module
        with self.inner_optimizer() as ready:
            optim.allocate_state(ready)
        self.partition = self._partition()
        if self.kept_whole:
            self._keep_whole(library)
            self.gather_kept()
        else:
            deepspeed_internals.gather_in_every_backward(self.module)

    def _partition(self) -> Partition:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        partition = sharded_partition(self.module, self.shapes, self.rank, self.world_size)
        self.computing = list(partition.masters)
        for i, parameter in enumerate(self.module.parameters()):
            if parameter.requires_grad:
                held = len(self.computing[i])
                partition.masters[i] = safe_get_local_fp32_param(parameter).detach()[:held]
                partition.moments[i] = {
                    key: safe_get_local_optimizer_state(parameter, key)[:held] for key in optim.moments_of(self.spec)
                }
        return partition

    @contextmanager
    def inner_optimizer(self) -> Iterator[torch.optim.Optimizer]:
        """The optimizer, with this rank's flat masters as its parameters."""
        with deepspeed_internals.with_masters(self.engine, self.optimizer) as optimizer:
            yield optimizer

    def _keep_whole(self, library: ModuleType) -> None:
        """Keeps the network gathered: no hooks that gather and release, and one gather after a step instead of one for each
        parameter. Measured on 1.5 M parameters in 98 tensors, two gloo ranks of one thread: 235 ms of CPU a step; 318 with
        DeepSpeed's own handling of the same threshold, 328 with threshold 0, 340 with 10,000; replicated without sharding 211.

        Gradients, masters and moments stay DeepSpeed's and stay sharded; what a rank holds beside them is a copy to
        compute with.
        """
        deepspeed_internals.stop_gathering(self.engine)
        parameters = dict(self.module.named_parameters())
        # Entered and never left: to DeepSpeed, the weights are gathered for good.
        library.zero.GatheredParameters(list(parameters.values())).__enter__()
        for (name, parameter), held in zip(parameters.items(), self.computing, strict=True):
            parameter.data = torch.empty(self.shapes[name], dtype=held.dtype, device=self.device)
        self._copies = WholeCopies([parameter.data for parameter in parameters.values()], self.rank, self.world_size)

    # ------------------------------------------------------------------------------------------ learning

    @torch.no_grad()
    def step(self, step: int, steps: int) -> dict[str, Tensor | float]:
        lr = self.spec.lr * optim.lr_factor(self.spec.schedule, step, steps)
        for group, multiplier in zip(self.optimizer.param_groups, self.multipliers, strict=True):
            group["lr"] = lr * multiplier
        self.engine.step()
        deepspeed_internals.forget_gradients(self.engine)
        if "offload_optimizer" in self.config["zero_optimization"]:
            self._forget_offloaded_gradients()
        skipped = not self.engine.was_step_applied()
        if not skipped and self.spec.clip_weights is not None:
            optim.clip_weights(self.partition.learning(), self.spec.clip_weights)
            self.compute_with(self.partition.masters)
        elif not skipped and self.kept_whole:
            self.gather_kept()
        norm = math.inf if skipped else float(self.engine.get_global_grad_norm())
        return {"lr": lr, "grad_norm": norm, "skipped": 1.0 if skipped else 0.0}

    def _forget_offloaded_gradients(self) -> None:
        """Zeroes the buffers of offloaded gradients, and with them their norms."""
        from deepspeed.utils import safe_set_local_grad

        for parameter in self.module.parameters():
            if parameter.requires_grad:
                safe_set_local_grad(parameter, torch.zeros_like(deepspeed_internals.slice_of(parameter)))

    # ------------------------------------------------------------------------------------------ weights

    @torch.no_grad()
    def compute_with(self, values: list[Tensor]) -> None:
        """Writes this rank's shards of the weights that compute, and refreshes what is kept gathered. A collective."""
        torch._foreach_copy_(self.computing, values)
        if self.kept_whole:
            self.gather_kept()
        else:
            deepspeed_internals.release_gathered(self.engine)

    @torch.no_grad()
    def gather_kept(self) -> None:
        """Updates the whole copies from the shards. A collective."""
        self._copies.gather(self.computing)


class WholeCopies:
    """Whole tensors, assembled from the ranks' slices in one all-gather for all of them."""

    def __init__(self, wholes: Sequence[Tensor], rank: int, world_size: int):
        flat = [whole.view(-1) for whole in wholes]
        self._mine = flat[0].new_zeros(sum(-(-len(whole) // world_size) for whole in flat))
        self._received = self._mine.new_empty(world_size, len(self._mine))
        self._sent: list[Tensor] = []
        self._whole_parts: list[Tensor] = []
        self._received_parts: list[Tensor] = []
        offset = 0
        for whole in flat:
            for other in range(world_size):
                start, stop = part_of(len(whole), other, world_size)
                if other == rank:
                    self._sent.append(self._mine[offset : offset + stop - start])
                if stop > start:
                    self._whole_parts.append(whole[start:stop])
                    self._received_parts.append(self._received[other, offset : offset + stop - start])
            offset += -(-len(whole) // world_size)

    @torch.no_grad()
    def gather(self, held: Sequence[Tensor]) -> None:
        """Assembles the whole tensors; `held`: this rank's slices, cut to their real length. A collective."""
        torch._foreach_copy_(self._sent, list(held))
        dist.all_gather_into_tensor(self._received.view(-1), self._mine)
        torch._foreach_copy_(self._whole_parts, self._received_parts)


class FrozenZeroNetwork:
    """A network that only computes, with weights sharded by ZeRO-3, which gathers them module by module, in backward too."""

    def __init__(
        self,
        library: ModuleType,
        name: str,
        spec: NetSpec,
        settings: EngineSettings,
        device: torch.device,
        rank: int,
        world_size: int,
    ):
        shapes = parameter_shapes(spec)
        config = zero_config(None, settings, shapes, spec.sharded, world_size, device)
        # No step releases what was gathered: it goes as soon as its module has computed.
        config["zero_optimization"]["stage3_max_reuse_distance"] = 0
        module = to_be_sharded(library, name, spec, settings, config, device).requires_grad_(False).eval()
        prepare_blocks(module, name, activation_checkpointing=False, compiled=settings.compile)
        self.engine, *_ = library.initialize(model=module, config=config, dist_init_required=False)
        self.module: Network = self.engine.module
        deepspeed_internals.gather_in_every_backward(self.module)
        self.partition = sharded_partition(self.module, shapes, rank, world_size)

    @torch.no_grad()
    def compute_with(self, values: Sequence[Tensor]) -> None:
        """Writes this rank's slices."""
        torch._foreach_copy_(self.partition.masters, list(values))
        deepspeed_internals.release_gathered(self.engine)


def sharded_partition(module: nn.Module, shapes: Shapes, rank: int, world_size: int) -> Partition:
    """A rank's slices of the weights that compute, cut to their real length, without moments."""
    partition = Partition(sharded=True)
    for name, parameter in module.named_parameters():
        start, stop = part_of(shapes[name].numel(), rank, world_size)
        held = deepspeed_internals.slice_of(parameter)[: stop - start]
        partition.add(name, tuple(shapes[name]), start, held, None)
    return partition


def persistence_threshold(settings: EngineSettings, numel: int, sharded: bool) -> int:
    """The largest number of elements of a parameter that stays gathered between steps, in a network of `numel`."""
    if settings.persistence_threshold is not None and sharded:
        return settings.persistence_threshold
    return numel if stays_whole(numel, sharded) else 100_000


def stays_whole_of(shapes: Shapes, settings: EngineSettings, sharded: bool) -> bool:
    """Whether all parameters of a network stay gathered."""
    sizes = [shape.numel() for shape in shapes.values()]
    return max(sizes, default=0) <= persistence_threshold(settings, sum(sizes), sharded)


def zero_config(
    clip_grad_norm: float | None,
    settings: EngineSettings,
    shapes: Shapes,
    sharded: bool,
    world_size: int,
    device: torch.device,
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    It says that a step has one micro-batch. The loop divides the loss and says which backward is the last; if DeepSpeed knew of the
    accumulation, it would also divide the gradients that an objective takes itself through a network.
    """
    numel = sum(shape.numel() for shape in shapes.values())
    whole = stays_whole_of(shapes, settings, sharded)  # by us: DeepSpeed itself need keep nothing
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": device.type == "cuda",
        "contiguous_gradients": True,
        "reduce_scatter": not whole,  # an all-reduce of one buffer took 6 % less CPU on a small network
        "reduce_bucket_size": min(max(numel, 1), 50_000_000),
        "stage3_prefetch_bucket_size": min(numel, 50_000_000),
        "stage3_param_persistence_threshold": 0 if whole else persistence_threshold(settings, numel, sharded),
        "memory_efficient_linear": not whole,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
    }
    if settings.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_batch_size": settings.micro_batch * world_size,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_grad_norm or 0.0,
        "bf16": {"enabled": settings.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def to_be_sharded(
    library: ModuleType,
    name: str,
    spec: NetSpec,
    settings: EngineSettings,
    config: dict[str, Any],
    device: torch.device,
) -> Network:
    """A network with its first weights, ready for DeepSpeed to shard; a large one is already sharded."""
    if sum(shape.numel() for shape in parameter_shapes(spec).values()) >= settings.partition_at_birth:
        return born_sharded(library, name, spec, settings.seed, config, device)
    return build_network(name, spec, settings.seed).to(device)


def born_sharded(
    library: ModuleType,
    name: str,
    spec: NetSpec,
    seed: int,
    config: dict[str, Any],
    device: torch.device,
) -> Network:
    """A network whose parameters are sharded as they are made, with the values of `build_network`.

    Rank 0 initialises a whole copy in host memory and hands it out parameter by parameter: no device ever holds more
    than one of them whole.
    """
    # The precision is in the configuration: given as an argument too, 0.19.8 takes bf16 for it where it finds no float16 support.
    with torch.random.fork_rng(devices=[]), library.zero.Init(config_dict_or_path=config):
        module = spec.make()
    original = build_network(name, spec, seed) if distributed.rank() == 0 else None
    whole = {} if original is None else {**dict(original.named_parameters()), **dict(original.named_buffers())}
    with torch.no_grad():
        for parameter_name, parameter in module.named_parameters():
            with library.zero.GatheredParameters([parameter], modifier_rank=0):
                if whole:
                    parameter.copy_(whole[parameter_name])
        for buffer_name, buffer in module.named_buffers():
            if buffer.is_floating_point():
                buffer.data = buffer.data.float()  # made in the precision of the parameters
            if whole:
                buffer.copy_(whole[buffer_name])
            if dist.get_world_size() > 1:
                dist.broadcast(buffer, src=0)
    return module
