"""What an engine needs beside the sections of recipe and cluster."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import ConfigDict
from torch import nn

from nexus_scale.config.schema import Computing, Optimizer
from nexus_scale.contracts import Network


@dataclass(frozen=True)
class NetSpec:
    """One network.

    Attributes:
        make: constructs it, without initialising; the engine calls `init_weights` itself.
        optimizer: how it learns; None for a frozen network.
        frozen: it never learns, and computes in eval mode.
        sharded: under ZeRO-3 its weights are gathered part by part where it is large (see `stays_whole`); False: every rank
            keeps a whole copy to compute with, and it may be differentiated twice. Optimizer state is sharded either way.
        adapts: the frozen network that this one, an adapter, changes; empty: it is no adapter. One is whole on each rank.
        bits: of a frozen network, 8: its blocks' linear layers hold their weights in so many; None: all are in the engine's precision.
        fill: called with the initialised network, on all ranks, to load given weights into it (a teacher, a run to go
            on from).
        given: names of the parameters that `Engine.fill` or a checkpoint brings before the network computes; where they are all, a large
            one gets no first values. Asked of large ones alone; a collective.
    """

    make: Callable[[], Network]
    optimizer: Optimizer | None = None
    frozen: bool = False
    sharded: bool = True
    adapts: str = ""
    bits: int | None = None
    fill: Callable[[nn.Module], None] | None = None
    given: Callable[[], Collection[str]] | None = None

    @property
    def learns(self) -> bool:
        return not self.frozen


WHOLE_NUMEL = 8_000_000
"""Networks of at most this many parameters stay gathered between steps under ZeRO-3: 32 MB a rank at most, and no hook in
forward or backward."""

MESSAGE_NUMEL = 500_000
"""Least number of parameters in a message under ZeRO-3, where blocks are smaller: 1 MB in bf16, below which a message takes as long."""

RESIDENT_NUMEL = 1_000_000_000
"""Of networks of at most this many parameters, blocks stay gathered from their forward to their backward under ZeRO-3: 2 GB in bf16, and a
third less to send."""


def stays_whole(numel: int, sharded: bool, bound: int = WHOLE_NUMEL) -> bool:
    """Whether ZeRO-3 keeps a whole copy of a network of `numel` parameters on every rank."""
    return not sharded or numel <= bound


class EngineSettings(Computing):
    """Where and how networks compute: the cluster file's part, and what the run derives from it.

    Attributes:
        precision: `bf16` keeps float32 masters beside bf16 weights; networks get bf16 inputs and their outputs come
            back in float32.
        micro_batch: samples per rank and backward.
        accumulation: backwards per step.
        steps: length of the run, which schedules need.
        device: `cpu`, `cuda`, `cuda:1`.
        partition_at_birth: networks of at least this many parameters are constructed sharded under ZeRO-3, so that no
            rank's device ever holds one whole.
        whole_numel: networks of at most this many parameters stay gathered between steps under ZeRO-3; 0: none does, and one rank
            shards too, as tests and benchmarks want it.
        message_numel: blocks of fewer parameters are gathered and reduced together, until they have so many.
        resident_numel: of those of at most this many, blocks stay gathered from forward to backward.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    precision: Literal["float32", "bf16"] = "float32"
    micro_batch: int = 1
    accumulation: int = 1
    steps: int = 1
    seed: int = 0
    device: str | torch.device = "cpu"
    partition_at_birth: int = 200_000_000
    whole_numel: int = WHOLE_NUMEL
    message_numel: int = MESSAGE_NUMEL
    resident_numel: int = RESIDENT_NUMEL

    @property
    def nothing_to_shard(self) -> bool:
        """Whether a single rank needs no ZeRO."""
        return self.offload == "none" and self.whole_numel > 0

    def stays_whole(self, numel: int, sharded: bool) -> bool:
        """Whether a network of `numel` parameters stays gathered between steps."""
        return stays_whole(numel, sharded, self.whole_numel)
