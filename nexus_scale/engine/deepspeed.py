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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nexus_scale.contracts import Stage, UserError
from nexus_scale.engine import distributed, optim
from nexus_scale.engine.base import MOMENTS, BaseEngine, Partition, part_of
from nexus_scale.engine.blocks import prepare_blocks
from nexus_scale.engine.ema import Average
from nexus_scale.engine.networks import Caller, build_network, count_parameters, on_second_derivative, place
from nexus_scale.engine.settings import AverageSpec, EngineSettings, NetSpec, OptimizerSpec, stays_whole

logger = logging.getLogger(__name__)


def _deepspeed(device: torch.device) -> ModuleType:
    """deepspeed, imported quietly and kept from compiling C++ at run time, within a process group.

    A build of its shared-memory op that is killed leaves a lock on which every later start waits without a word.
    """
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(deepspeed|torch\.distributed)(\..*)?")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Set whole, not edited: its first reading runs a compiler to find out which ops could be built.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    _count_devices_once(deepspeed)
    if not dist.is_initialized():
        _join_group_of_one(device)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
    module: ModuleType = deepspeed
    return module


def _count_devices_once(library: ModuleType) -> None:
    """DeepSpeed asks for the number of devices at every reduction, and on a CPU answers by starting `numactl` as a
    process."""
    accelerator = library.accelerator.get_accelerator()
    count = accelerator.device_count()
    accelerator.device_count = lambda: count


def _join_group_of_one(device: torch.device) -> None:
    """ZeRO wants a process group even for one rank."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


class DeepSpeedEngine(BaseEngine):
    """ZeRO-3, one DeepSpeed engine per trained network; frozen networks stay whole on each rank."""

    def __init__(
        self,
        specs: Mapping[str, NetSpec],
        averages: Mapping[str, AverageSpec],
        settings: EngineSettings,
        stage: Stage | None = None,
    ):
        if settings.zero_stage != 3:
            raise UserError(
                f"zero_stage {settings.zero_stage}: the deepspeed engine shards by ZeRO-3 alone, whose shards are what checkpoints hold; "
                "set zero_stage to 3, or engine to replicated"
            )
        super().__init__(specs, averages, settings)
        self._library = _deepspeed(self.device)
        self.rank, self.world_size = distributed.rank_and_world_size()
        self._zero: dict[str, ZeroNetwork] = {}
        for name, spec in specs.items():
            if spec.optimizer is None or not spec.learns:
                module = place(build_network(name, spec, settings.seed), self.device, self.dtype)
                prepare_blocks(module, name, activation_checkpointing=False, compiled=settings.compile)
                self.modules[name] = module
                self.nets[name] = module if self.dtype == torch.float32 else Caller(module, module, self.dtype)
                self.partitions[name] = Partition()
                for parameter_name, parameter in module.named_parameters():
                    self.partitions[name].add(
                        parameter_name, tuple(parameter.shape), 0, parameter.detach().view(-1), None
                    )
                continue
            zero = ZeroNetwork(
                self._library, name, spec, spec.optimizer, settings, self.device, self.rank, self.world_size
            )
            self._zero[name] = zero
            self.modules[name] = zero.module
            call = (
                zero.engine if zero.kept_whole else on_second_derivative(zero.engine, functools.partial(_refuse, name))
            )
            self.nets[name] = Caller(zero.module, call, self.dtype)
            self.partitions[name] = zero.partition
        self._finish()

    def backward(self, name: str, loss: Tensor, last: bool) -> None:
        engine = self._zero[name].engine
        engine.set_gradient_accumulation_boundary(last)
        engine.backward(self._for_backward(loss), scale_wrt_gas=False)

    def step(self, name: str, step: int) -> Mapping[str, Tensor | float]:
        return self._zero[name].step(step, self.settings.steps)

    @contextmanager
    def _lent(self, average: Average) -> Iterator[None]:
        """The average's shards in the place of the ones that compute; these are kept aside and come back to the bit."""
        zero = self._zero[average.spec.of]
        own = [held.clone() for held in zero.computing]
        zero.compute_with(average.values)
        try:
            yield
        finally:
            zero.compute_with(own)

    def _refresh(self, name: str) -> None:
        if name in self._zero:
            self._zero[name].compute_with(self.partitions[name].masters)

    def _optimizer_steps(self, name: str) -> int:
        with self._zero[name].inner_optimizer() as optimizer:
            return optim.get_steps(optimizer)

    def _set_optimizer_steps(self, name: str, steps: int) -> None:
        with self._zero[name].inner_optimizer() as optimizer:
            optim.set_steps(optimizer, steps)


def _refuse(name: str) -> None:
    raise UserError(
        f"network {name!r}: the objective takes a gradient through it that is differentiated again (R1, a gradient penalty), which "
        f"ZeRO-3 cannot while its weights are sharded; set networks.{name}.sharded: false to keep it whole on each rank, or "
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
        optimizer: OptimizerSpec,
        settings: EngineSettings,
        device: torch.device,
        rank: int,
        world_size: int,
    ):
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        self._available = ZeroParamStatus.AVAILABLE
        self.spec, self.rank, self.world_size, self.device = optimizer, rank, world_size, device
        numel = count_parameters(spec)
        self.config = zero_config(optimizer, settings, numel, world_size, device, sharded=spec.sharded)
        if numel >= settings.partition_at_birth:
            module = born_sharded(library, name, spec, settings.seed, self.config, device)
        else:
            module = build_network(name, spec, settings.seed).to(device)
        prepare_blocks(
            module, name, activation_checkpointing=settings.activation_checkpointing, compiled=settings.compile
        )
        learning = [p for p in module.parameters() if p.requires_grad]
        if not learning:
            raise UserError(f"network {name!r} learns but no parameter of it requires a gradient; set frozen: true")
        groups = optim.param_groups(learning, optimizer)
        self.multipliers = [float(group.pop("lr_multiplier")) for group in groups]
        inner = optim.make_optimizer(groups, optimizer)
        self.engine, *_ = library.initialize(
            model=module, optimizer=inner, config=self.config, dist_init_required=False
        )
        self.module: nn.Module = self.engine.module
        self.zero = self.engine.optimizer
        with self.inner_optimizer() as ready:
            optim.allocate_state(ready)
        self.computing: list[Tensor] = []
        self.partition = self._partition()
        self.kept_whole = all(parameter.ds_persist for parameter in self.module.parameters())
        if self.kept_whole:
            self._keep_whole()
        else:
            self._gather_in_every_backward()
        self.gather_kept()

    def _gather_in_every_backward(self) -> None:
        """DeepSpeed gathers a module's weights for as many backwards as it had forwards, and counts them here. An objective that takes
        gradients of several losses through one forward goes backward more often, and would meet weights that are not there."""
        for module in self.module.modules():
            counted: Any = module
            counted.applied_pre_backward_ref_cnt = 1 << 62

    def _partition(self) -> Partition:
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        partition = Partition(sharded=True)
        parameters: list[tuple[str, Any]] = list(self.module.named_parameters())  # with what DeepSpeed hangs on each
        for name, parameter in parameters:
            shape = tuple(parameter.ds_shape)
            start, stop = part_of(parameter.ds_numel, self.rank, self.world_size)
            held = parameter.ds_tensor.detach().view(-1)[: stop - start]
            master, moments = held, None
            if parameter.requires_grad:
                master = safe_get_local_fp32_param(parameter).detach()[: stop - start]
                moments = {key: safe_get_local_optimizer_state(parameter, key)[: stop - start] for key in MOMENTS}
            self.computing.append(held)
            partition.add(name, shape, start, master, moments)
        return partition

    @contextmanager
    def inner_optimizer(self) -> Iterator[torch.optim.Optimizer]:
        """Adam itself, with this rank's flat masters as its parameters (outside of a step DeepSpeed leaves its groups
        empty)."""
        self.zero._set_fp32_optimizer_param_groups()
        try:
            yield self.zero.optimizer
        finally:
            self.zero._clear_fp32_optimizer_param_groups()

    def _keep_whole(self) -> None:
        """For a network that stays gathered: no hooks that would gather and release, and one gather after a step instead of one for
        each parameter. Measured on 1.5 M parameters in 98 tensors, two gloo ranks of one thread: 235 ms of CPU a step; 318 with
        DeepSpeed's own handling of the same threshold, 328 with threshold 0, 340 with 10,000; replicated without sharding 211.

        Gradients, masters and moments stay DeepSpeed's and stay sharded; what a rank holds beside them is a copy to
        compute with.
        """
        offload = self.zero.parameter_offload
        for hook in (*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook):
            hook.remove()
        self.zero.persistent_parameters = []
        self.zero._partition_all_parameters = lambda: None
        learning = [p for group in self.zero.fp16_groups for p in group]
        sent = list(self.zero.fp16_partitioned_groups_flat)
        learns = {id(p) for p in learning}
        self._fixed: list[Any] = [p for p in self.module.parameters() if id(p) not in learns]
        for parameter in learning:
            parameter.data = torch.empty(parameter.ds_shape, dtype=parameter.ds_tensor.dtype, device=self.device)
            parameter.ds_status = self._available
        self._exchanges: list[tuple[Tensor, Tensor]] = []  # (this rank's flat shards, all ranks', (W, n))
        self._whole_parts: list[Tensor] = []
        self._received_parts: list[Tensor] = []
        for group, mine in zip(self.zero.fp16_groups, sent, strict=True):
            received = torch.empty(self.world_size, mine.numel(), dtype=mine.dtype, device=mine.device)
            self._exchanges.append((mine, received))
            offset = 0
            for parameter in group:
                whole = parameter.data.view(-1)
                for rank in range(self.world_size):
                    start, stop = part_of(parameter.ds_numel, rank, self.world_size)
                    if stop > start:
                        self._whole_parts.append(whole[start:stop])
                        self._received_parts.append(received[rank, offset : offset + stop - start])
                offset += parameter.partition_numel()

    # ------------------------------------------------------------------------------------------ learning

    @torch.no_grad()
    def step(self, step: int, steps: int) -> dict[str, Tensor | float]:
        lr = self.spec.lr * optim.lr_factor(self.spec.schedule, step, steps)
        for group, multiplier in zip(self.zero.optimizer.param_groups, self.multipliers, strict=True):
            group["lr"] = lr * multiplier
        self.engine.step()
        # A parameter that takes no part in the next step would else keep this step's gradient.
        self.zero.grad_partitions_flat_buffer.zero_()
        if "offload_optimizer" in self.config["zero_optimization"]:
            # Offloaded gradients have buffers of their own, and a table of norms.
            for master in self.zero.fp32_partitioned_groups_flat:
                master.grad.zero_()
            self.zero.norm_for_param_grads.clear()
        skipped = bool(self.zero.overflow)
        if self.kept_whole and not skipped:
            self.gather_kept()
        norm = math.inf if skipped else float(self.engine.get_global_grad_norm())
        return {"lr": lr, "grad_norm": norm, "skipped": 1.0 if skipped else 0.0}

    # ------------------------------------------------------------------------------------------ weights

    @torch.no_grad()
    def compute_with(self, values: list[Tensor]) -> None:
        """Writes this rank's shards of the weights that compute, and refreshes what is kept gathered. A collective."""
        torch._foreach_copy_(self.computing, values)
        if self.kept_whole:
            for parameter in self._fixed:
                parameter.partition()
        else:
            self.zero._partition_all_parameters()
        self.gather_kept()

    @torch.no_grad()
    def gather_kept(self) -> None:
        """Makes the whole copies equal to the shards. A collective."""
        if not self.kept_whole:
            if kept := self.zero.persistent_parameters:
                kept[0].all_gather(kept)
            return
        for mine, received in self._exchanges:
            dist.all_gather_into_tensor(received.view(-1), mine)
        torch._foreach_copy_(self._whole_parts, self._received_parts)
        if self._fixed:
            self._fixed[0].all_gather(self._fixed)


def zero_config(
    optimizer: OptimizerSpec,
    settings: EngineSettings,
    numel: int,
    world_size: int,
    device: torch.device,
    *,
    sharded: bool = True,
) -> dict[str, Any]:
    """DeepSpeed's configuration; all of it from ours.

    It is told of one micro-batch a step. The loop divides the loss and says which backward is the last; an accumulation of its
    own DeepSpeed would also divide out of the gradients that an objective takes itself through a network.
    """
    threshold = settings.persistence_threshold
    if threshold is None or not sharded:
        threshold = numel if stays_whole(numel, sharded) else 100_000
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": device.type == "cuda",
        "contiguous_gradients": True,
        "reduce_scatter": threshold < numel,  # an all-reduce of one buffer took 6 % less CPU on a small network
        "reduce_bucket_size": min(max(numel, 1), 50_000_000),
        "stage3_prefetch_bucket_size": min(numel, 50_000_000),
        "stage3_param_persistence_threshold": threshold,
        "memory_efficient_linear": threshold < numel,
        "stage3_max_live_parameters": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
    }
    if settings.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    return {
        "train_batch_size": settings.micro_batch * world_size,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.clip_grad_norm or 0.0,
        "bf16": {"enabled": settings.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }


def born_sharded(
    library: ModuleType,
    name: str,
    spec: NetSpec,
    seed: int,
    config: dict[str, Any],
    device: torch.device,
) -> nn.Module:
    """Constructs a network whose parameters are sharded as they are made, with the values that `build_network` gives.

    Rank 0 initialises a whole copy in host memory and hands it out one parameter at a time: no device ever holds more
    than one.
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
