"""The micro-batch of `cluster.micro_batch: auto`: one step of the largest size is tried on every rank, with the engine as it is built,
and where it does not fit, smaller ones are, and at last with recomputation of blocks.

A trial leaves no trace. Its loss is NaN, so that the engine skips the step; no rank talks to another while it tries, since one may run
out of memory where the others do not; what a forward changes beside weights is put back. An engine that ran out of memory is thrown away.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from nexus_scale.config.recipe import Cluster, Recipe, accumulation, divisors
from nexus_scale.contracts import Batch, Engine, Objective, UserError
from nexus_scale.engine import distributed, memory
from nexus_scale.engine.alone import alone
from nexus_scale.kernels.memory import give_back_freed_memory
from nexus_scale.rehearsal.batches import batches_to_rehearse, networks_on_meta
from nexus_scale.rehearsal.warm_up import FirstSteps, one_size, trying

log = logging.getLogger(__name__)


class Size(NamedTuple):
    """Samples that a worker takes at once, and whether it recomputes blocks in the backward pass."""

    micro_batch: int
    recompute: bool = False

    def __str__(self) -> str:
        return f"micro-batch {self.micro_batch}" + (" with recomputation of blocks" if self.recompute else "")


def built(
    chosen: dict[str, Any],
    given: Sequence[Size],
    recipe: Recipe,
    cluster: Cluster,
    objective: Objective,
    dataset: Any,
    build: Callable[[Size, int], Engine],
    first: Callable[[int], FirstSteps],
) -> tuple[Engine, Size]:
    """The engine, and what a worker takes at once: as the run chose, or found now and noted in `chosen`. A collective.

    Found once, it stays; with another number of workers it is tried again, and smaller ones where it does not fit or divide any more.

    Args:
        chosen: see run/choices.py.
        given: sizes to try in the first start, largest first; all, where there are none.
        build: makes an engine, for a size and a number of micro-batches in a step.
        first: what the first steps depend on.
    Raises:
        UserError: the global batch does not divide; nothing fits.
    """
    workers, found = distributed.world_size(), chosen.get("found")
    fixed = chosen["micro_batch"] if found is None else None
    micro, _ = accumulation(recipe.global_batch, workers // cluster.sequence_parallel, fixed)
    share = recipe.global_batch // (workers // cluster.sequence_parallel)

    def make(size: Size) -> Engine:
        return build(size, share // size.micro_batch)

    if found is None:
        size = Size(micro, cluster.activation_checkpointing)
        return make(size), size
    if found.get("workers") == workers:
        size = Size(chosen["micro_batch"], found["recompute"])
        if share % size.micro_batch == 0:
            return make(size), size
    most = chosen["micro_batch"] or share
    possible = every_size(recipe, cluster, objective, share, most)
    fitting = {size.micro_batch for size in possible}
    sizes = [size for size in given if size.micro_batch in fitting and not found] or possible
    if found.get("recompute"):
        sizes = [size for size in sizes if size.recompute]
    trial = Trial(first, cluster, dataset, objective.fields, share)
    engine, size = largest_that_fits(sizes, make, trial.fits)
    if distributed.rank() == 0:
        log.info("cluster.micro_batch auto: %s fits", size)
    chosen |= {"micro_batch": size.micro_batch, "found": {"workers": workers, "recompute": size.recompute}}
    return engine, size


def every_size(recipe: Recipe, cluster: Cluster, objective: Objective, share: int, most: int) -> list[Size]:
    """All sizes that divide a worker's share, of at most `most` samples, and part no neighbours that are computed together: the largest
    first, then with recomputation where it is off and the networks have blocks."""
    networks = networks_on_meta(recipe, objective)
    group = math.lcm(objective.together, *(networks[name].together for name in recipe.trained()))
    micro = [size for size in divisors(share)[::-1] if size <= most and size % group == 0]
    plain = [Size(size, cluster.activation_checkpointing) for size in micro]
    if cluster.activation_checkpointing or not all(networks[name].blocks() for name in recipe.trained()):
        return plain
    return [*plain, *(Size(size, True) for size in micro)]


def largest_that_fits(
    sizes: Sequence[Size], build: Callable[[Size], Engine], fits: Callable[[Engine, Size], bool]
) -> tuple[Engine, Size]:
    """The engine with the first of `sizes` that fits; after one that does not, the next has at most half as many samples. A collective.

    Raises:
        UserError: none fits.
    """
    size: Size | None = sizes[0]
    while size is not None:
        engine = build(size)
        if fits(engine, size):
            return engine, size
        del engine
        free()
        smaller = _after(sizes, size)
        if distributed.rank() == 0:
            log.info("cluster.micro_batch auto: %s does not fit; trying %s", size, smaller or "nothing smaller")
        last, size = size, smaller
    raise UserError(
        f"cluster.micro_batch auto: even {last} does not fit ({memory.taken()}); take more workers or cluster.offload=cpu",
        code=4,
    )


def _after(sizes: Sequence[Size], failed: Size) -> Size | None:
    halved = (s for s in sizes if s.recompute == failed.recompute and s.micro_batch <= failed.micro_batch // 2)
    recomputed = (s for s in sizes if s.recompute and not failed.recompute)
    return next(halved, None) or next(recomputed, None)


def free() -> None:
    """Returns what nobody refers to any more, so that the next trial has all of the memory."""
    gc.collect()
    give_back_freed_memory()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# ------------------------------------------------------------------------------------------------- the trial


class Trial:
    """A step of the data's largest size.

    Args:
        first: what the first steps depend on.
        dataset, fields: whose largest sample is repeated as often as a micro-batch has samples.
        share: samples of a global batch that are this worker's.
    """

    def __init__(
        self, first: Callable[[int], FirstSteps], cluster: Cluster, dataset: Any, fields: Sequence[str], share: int
    ):
        self._first, self._cluster, self._share = first, cluster, share
        self._sample = largest_sample(dataset, fields)

    def fits(self, engine: Engine, size: Size) -> bool:
        """Whether all ranks have the memory. A collective; the engine is of no use afterwards where they do not."""
        engine.sum_over_ranks(torch.zeros(1, device=engine.device))  # what collectives take themselves is taken first
        free()
        with trying(engine), alone(), memory.limited(engine.device, self._cluster):
            enough = self._has_room(engine, repeated(self._sample, size.micro_batch), size)
        free()
        if distributed.sum_over_ranks(torch.tensor([0.0 if enough else 1.0])).item():
            return False
        engine.regather()  # what a rank that is alone gathered is of no use
        return True

    def _has_room(self, engine: Engine, batch: Batch, size: Size) -> bool:
        try:
            # Two micro-batches where a step has more: what sums gradients is there while the second computes.
            one_size(engine, self._first(size.micro_batch), batch, min(2, self._share // size.micro_batch))
            if engine.device.type == "cuda":
                torch.cuda.synchronize(engine.device)
        except Exception as error:
            if not memory.is_out_of_memory(error, limited=True):
                raise
            log.info("rank %d: %s: %s", distributed.rank(), size, memory.first_line(error))
            return False
        return True


def largest_sample(dataset: Any, fields: Sequence[str]) -> Batch:
    """Samples of the size with most values in these fields."""

    def values(batch: Batch) -> int:
        return sum(batch[name][0].numel() for name in fields if name in batch)

    return max(batches_to_rehearse(dataset), key=values)


def repeated(sample: Batch, count: int) -> Batch:
    """The first of some samples so many times, as if no token of it were padding."""
    fields = {
        name: torch.ones(count, *value.shape[1:], dtype=value.dtype)
        if name.endswith("_mask") and value.dtype == torch.bool
        else value[:1].repeat(count, *[1] * (value.ndim - 1))
        for name, value in sample.fields.items()
    }
    return Batch(fields, torch.arange(count), sample.samples[:1].repeat(count), bucket=sample.bucket)
