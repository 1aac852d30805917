"""The micro-batch of a run: what fits a rank, by the planner's estimate."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from nexus_scale.config.recipe import Cluster, Recipe, accumulation, divisors
from nexus_scale.contracts import Batch, UserError
from nexus_scale.planner.activations import MANY, Activations, activations_of
from nexus_scale.planner.fused import Traces
from nexus_scale.planner.holdings import Holdings, holdings, limits_of, precision_of, rank_memory
from nexus_scale.planner.losses import activations_of_losses
from nexus_scale.planner.memory import GIB, on_device, on_host
from nexus_scale.planner.work import Work, work_in
from nexus_scale.rehearsal.batches import explained
from nexus_scale.train import make_objective


@dataclass(frozen=True)
class Fit:
    """A micro-batch, and what a rank would take with it.

    Attributes:
        memory: bytes per rank, by part.
        device_limit, host_limit: bytes that there are; None: not known.
        uncounted: names of networks whose activations could not be counted: whether it fits, only a trial can say.
    """

    micro_batch: int
    activation_checkpointing: bool
    memory: dict[str, float]
    device_limit: float | None
    host_limit: float | None = None
    uncounted: tuple[str, ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the parts fit; None where a limit that matters, or a network's activations, are unknown."""
        pairs = [(on_device(self.memory), self.device_limit), (on_host(self.memory), self.host_limit)]
        needed = [(size, limit) for size, limit in pairs if size > 0]
        if any(limit is not None and size > limit for size, limit in needed):
            return False
        return None if self.uncounted or any(limit is None for _, limit in needed) else True


class Fitting:
    """What one recipe takes on one cluster, at any micro-batch; networks are counted once.

    Args:
        device_limit: bytes of the device, where more is known than the cluster file says.
        data_root: where relative folders of text encoders start.
        sample: of the data, the largest (planner.losses): whole losses are counted then, through all the networks that they call.
    """

    def __init__(
        self,
        recipe: Recipe,
        cluster: Cluster,
        *,
        device_limit: float | None = None,
        data_root: Path | None = None,
        sample: Batch | None = None,
    ):
        self.recipe, self.cluster, self.sample = recipe, cluster, sample
        stated, self.host_limit = limits_of(cluster)
        self.device_limit = stated if device_limit is None else device_limit
        self.held: Holdings = holdings(recipe, data_root)
        self.traces: Traces | None = {} if cluster.compile else None
        self.activations = cache(self._activations)

    def _activations(self, checkpointing: bool) -> Activations:
        given: dict[str, Any] = {
            "precision": precision_of(self.cluster),
            "checkpointing": checkpointing,
            "traces": self.traces,
        }
        networks = activations_of(self.recipe, **given)
        if self.sample is None:
            return networks
        objective = make_objective(self.recipe, None)
        what = f"objective {self.recipe.objective.name} cannot train on these data"
        with explained(what, objective, self.sample.fields) as cut_short:
            losses = activations_of_losses(self.recipe, self.sample, **given)
        if cut_short:  # it takes too long to count, or asks for a value
            return networks
        return max(losses, replace(networks, uncounted=()), key=lambda found: found.of(MANY))

    def work(self) -> dict[str, Work]:
        """What a forward and a backward pass of each network do; without networks whose work cannot be counted."""
        return work_in(self.recipe, precision=precision_of(self.cluster), traces=self.traces)

    def on(self, cluster: Cluster) -> Fitting:
        """The same recipe on a cluster with other workers, or another engine; what is counted stays counted."""
        other = copy.copy(self)
        other.cluster, other.host_limit = cluster, limits_of(cluster)[1]
        return other

    @property
    def can_recompute(self) -> bool:
        """Whether all trained networks have blocks."""
        return all(self.held.blocks.values())

    def workers(self) -> list[int]:
        """Numbers of groups of ranks that may share the global batch, ascending."""
        least, most = self.cluster.workers if isinstance(self.cluster.workers, tuple) else (self.cluster.ranks,) * 2
        together = self.cluster.sequence_parallel
        found = [
            n for n in range(least, most + 1) if n % together == 0 and self.recipe.global_batch % (n // together) == 0
        ]
        if not found:
            accumulation(self.recipe.global_batch, most // together, None)  # raises, with the numbers that do
        return found

    def sizes(self) -> list[int]:
        """Micro-batches that divide a worker's share, at every number of workers that the cluster may have; ascending."""
        together = self.cluster.sequence_parallel
        return divisors(math.gcd(*(self.recipe.global_batch // (n // together) for n in self.workers())))

    def at(self, micro_batch: int, *, checkpointing: bool | None = None, workers: int | None = None) -> Fit:
        """What a rank takes with a micro-batch; `workers`: the fewest of the cluster unless given, with which it takes most."""
        workers = min(self.workers()) if workers is None else workers
        recomputes = self.cluster.activation_checkpointing if checkpointing is None else checkpointing
        found = self.activations(recomputes)
        together = self.cluster.sequence_parallel
        memory = rank_memory(
            self.recipe, self.cluster, self.held,
            workers=workers,
            accumulation=self.recipe.global_batch * together // (workers * micro_batch),
            activation_bytes=found.of(micro_batch / together),
        )  # fmt: skip
        return Fit(micro_batch, recomputes, memory, self.device_limit, self.host_limit, found.uncounted)

    def candidates(self) -> Iterator[Fit]:
        """Micro-batches, largest first; after them, where the cluster file leaves recomputation out, the same with it."""
        sizes = self.sizes()[::-1]
        yield from map(self.at, sizes)
        if not self.cluster.activation_checkpointing and self.can_recompute:
            yield from (self.at(size, checkpointing=True) for size in sizes)


def candidates(
    recipe: Recipe, cluster: Cluster, *, device_limit: float | None = None, data_root: Path | None = None
) -> list[Fit]:
    """Micro-batches that do not exceed the limit by the planner's estimate, in the order in which to try them: the largest first, then
    the same with recomputation of blocks. Where no limit is known, all of them.

    Args:
        device_limit: bytes of a rank's device, measured; None: those of the cluster file.
    """
    fitting = Fitting(recipe, cluster, device_limit=device_limit, data_root=data_root)
    return [fit for fit in fitting.candidates() if fit.fits is not False]


def largest_micro_batch(
    recipe: Recipe, cluster: Cluster, *, device_limit: float | None = None, data_root: Path | None = None
) -> Fit:
    """The largest micro-batch that fits by the planner's estimate; with recomputation of blocks only where even 1 does not fit.

    Raises:
        UserError: no micro-batch fits; says what one takes, and of what.
    """
    fitting = Fitting(recipe, cluster, device_limit=device_limit, data_root=data_root)
    smallest = None
    for smallest in fitting.candidates():
        if smallest.fits is not False:
            return smallest
    assert smallest is not None
    short = (
        "host"
        if smallest.device_limit is not None and on_device(smallest.memory) <= smallest.device_limit
        else "device"
    )
    taken, limit = (
        (on_host(smallest.memory), smallest.host_limit)
        if short == "host"
        else (on_device(smallest.memory), smallest.device_limit)
    )
    more = "more workers" if cluster.engine == "deepspeed" else "engine: deepspeed with more workers"
    raise UserError(
        f"{cluster.name}: no micro-batch fits: with one sample{' and recomputed blocks' if smallest.activation_checkpointing else ''} "
        f"a worker takes {taken / GIB:.1f} GiB of its {short}'s {(limit or 0) / GIB:.1f} GiB; use {more}, offload: cpu, or larger GPUs",
        code=4,
    )
