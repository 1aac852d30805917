"""What an engine is told: plain values, made by train.py from recipe and cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class ScheduleSpec:
    """Learning rate as a factor of the peak, a function of the step alone (see optim.lr_factor).

    Attributes:
        warmup_steps: the factor first rises linearly from 0 to 1 over so many steps.
        final_ratio: the factor at the last step of `cosine`, `linear` and `wsd`.
        decay_steps: length of the decay at the end of `wsd` (warm-up, stable, decay); None: a tenth of the run.
    """

    name: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    warmup_steps: int = 0
    final_ratio: float = 0.0
    decay_steps: int | None = None


@dataclass(frozen=True)
class OptimizerSpec:
    """AdamW. `clip_grad_norm`: the gradients' total L2 norm is scaled down to at most this; None: never."""

    name: Literal["adamw"] = "adamw"
    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_grad_norm: float | None = 1.0
    schedule: ScheduleSpec = field(default_factory=ScheduleSpec)


@dataclass(frozen=True)
class NetSpec:
    """One network.

    Attributes:
        make: constructs it, without initialising; the engine calls `init_weights` itself.
        optimizer: how it learns; None for a frozen network.
        frozen: it never learns, and computes in eval mode.
        sharded: under ZeRO-3 its weights are gathered part by part where it is large (see `stays_whole`); False: every rank
            keeps a whole copy to compute with, and it may be differentiated twice. Optimizer state is sharded either way.
        fill: called with the initialised network, on all ranks, to load given weights into it (a teacher, a run to go
            on from).
    """

    make: Callable[[], nn.Module]
    optimizer: OptimizerSpec | None = None
    frozen: bool = False
    sharded: bool = True
    fill: Callable[[nn.Module], None] | None = None

    @property
    def learns(self) -> bool:
        return not self.frozen


WHOLE_NUMEL = 8_000_000
"""Networks of at most so many parameters stay gathered between steps under ZeRO-3: 32 MB a rank at most, and no hook in
forward or backward."""


def stays_whole(numel: int, sharded: bool) -> bool:
    """Whether ZeRO-3 keeps a whole copy of a network of `numel` parameters on every rank."""
    return not sharded or numel <= WHOLE_NUMEL


@dataclass(frozen=True)
class AverageSpec:
    """An exponential moving average of a trained network's weights.

    Attributes:
        of: name of the trained network.
        decay: part of the old average that stays after a step.
        warmup: the decay is at most (1 + step) / (10 + step), so that the first weights are forgotten at once.
    """

    of: str
    decay: float = 0.9999
    warmup: bool = True


@dataclass(frozen=True)
class EngineSettings:
    """Where and how the networks compute.

    Attributes:
        kind: `deepspeed` shards over ranks, `replicated` keeps everything on each rank and averages gradients, `local`
            is one process.
        zero_stage: what DeepSpeed shards.
        precision: `bf16` keeps float32 masters beside bf16 weights; networks get bf16 inputs and their outputs come
            back in float32.
        micro_batch: samples per rank and backward.
        accumulation: backwards per step.
        sequence_parallel: so many neighbouring ranks see the same samples and share their tokens in training.
        steps: length of the run, which schedules need.
        offload: `cpu` keeps optimizer state (and masters) in host memory under DeepSpeed.
        device: `cpu`, `cuda`, `cuda:1`.
        partition_at_birth: networks of at least so many parameters are constructed sharded under ZeRO-3, so that no
            rank's device ever holds one whole.
        persistence_threshold: ZeRO-3 keeps parameters of at most so many elements whole on each rank; None: chosen by
            network size.
    """

    kind: Literal["deepspeed", "local", "replicated"] = "local"
    zero_stage: int = 3
    precision: Literal["float32", "bf16"] = "float32"
    micro_batch: int = 1
    accumulation: int = 1
    sequence_parallel: int = 1
    steps: int = 1
    seed: int = 0
    offload: Literal["none", "cpu"] = "none"
    activation_checkpointing: bool = False
    compile: bool = False
    device: str | torch.device = "cpu"
    partition_at_birth: int = 200_000_000
    persistence_threshold: int | None = None
