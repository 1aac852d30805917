"""Blocks are compiled before the first step, for each size of the data: a step then takes as long as the next one."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nexus_scale.contracts import Batch, Engine, Objective, Phase, UserError
from nexus_scale.engine import compiler
from nexus_scale.io.ticker import still
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.rehearsal.batches import REHEARSED_SIZES, batches_to_rehearse, phases_to_check

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FirstSteps:
    """What the first steps of a run depend on. `objective` is changed: not the one that trains. `validates`: validations follow."""

    objective: Objective
    seed: int
    steps: int
    micro_batch: int
    validates: bool


def warm_up(engine: Engine, first: FirstSteps, dataset: Any) -> dict[str, Any]:
    """Computes every phase's loss, gradient and step, and a validation, once in each size of the data. A collective.

    Gradients are made NaN, so that the engine leaves out every update, as it does in training: weights, moments, averages and buffers
    stay as they are, and the optimizer's kernels are compiled, too.

    Returns:
        sizes, graphs, compiled, from_cache, graph_breaks, seconds; for environment.json.
    Raises:
        UserError: the compiler fails.
    """
    begun, before = time.monotonic(), compiler.work()
    batches = [_filled(batch, first.micro_batch) for batch in batches_to_rehearse(dataset)]
    for number, batch in enumerate(batches, 1):
        at, earlier = time.monotonic(), compiler.work()
        with trying(engine):
            one_size(engine, first, batch)
        if engine.rank == 0:
            done = compiler.work().since(earlier)
            log.info(
                "compiling: size %d of %d%s: %d graphs in %.1f s, %d pieces of code compiled and %d from the cache", number,
                len(batches), f" ({batch.bucket})" if batch.bucket else "", done.graphs, time.monotonic() - at, done.made, done.found,
            )  # fmt: skip
    if len(batches) > REHEARSED_SIZES and engine.rank == 0:
        log.info("compiling: other sizes of the data are compiled when they come")
    work = compiler.work().since(before)
    return {
        "sizes": len(batches),
        "graphs": work.graphs,
        "compiled": work.made,
        "from_cache": work.found,
        "graph_breaks": work.breaks,
        "seconds": round(time.monotonic() - begun, 1),
    }


def _filled(batch: Batch, size: int) -> Batch:
    """A micro-batch of `size` samples, those of `batch` again and again."""
    taken = torch.arange(size) % len(batch)
    fields = {name: value[taken] for name, value in batch.fields.items()}
    return replace(batch, fields=fields, positions=torch.arange(size), samples=batch.samples[taken])


def trying(engine: Engine) -> AbstractContextManager[None]:
    """A context in which rank 0 says every few seconds that a step is being tried. Its thread starts here: where memory is refused, a
    thread may die as it starts, and the one that started it waits for good."""
    return still(
        "a step is tried before the first one; compiling its blocks takes longest",
        log.info if engine.rank == 0 else log.debug,
    )


def one_size(engine: Engine, first: FirstSteps, batch: Batch, micro_batches: int = 1) -> None:
    """Every phase's loss, gradient and step, of so many micro-batches, and a validation. Leaves no trace; see `warm_up`.

    Raises:
        UserError: the compiler fails.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        _one_size(engine, first, batch, micro_batches)
    except TorchDynamoException as error:
        reason = " ".join(str(error).split("\n\n")[0].split()) or type(error).__name__
        raise UserError(
            f"cluster.compile: torch's compiler failed: {reason}\nset compile: false in the cluster file (cluster.compile=false) "
            "to train without it",
            code=4,
        ) from error
    except RuntimeError as error:
        if "double backward" not in str(error):
            raise
        raise UserError(
            f"objective {type(first.objective).__name__} differentiates a network twice (R1, a gradient penalty), which compiled code "
            "cannot: name the network in its needs_whole, and it is not compiled; or set cluster.compile=false",
        ) from error


def _one_size(engine: Engine, first: FirstSteps, batch: Batch, micro_batches: int) -> None:
    buffers = [buffer for network in _modules(engine) for buffer in network.buffers()]
    kept = [buffer.clone() for buffer in buffers]
    given = batch.on(engine.device)
    devices = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for step, phases in phases_to_check(first.objective, first.steps):
            for phase in phases:
                _one_phase(engine, first, given, step, phase, micro_batches)
        if first.validates:
            trained = {
                name
                for _, phases in phases_to_check(first.objective, first.steps)
                for p in phases
                for name in p.networks
            }
            with engine.weights(min(trained)):
                first.objective.validate(engine.nets, given, _rng(engine, first, given, 0, "validate"))
    for buffer, own in zip(buffers, kept, strict=True):
        buffer.copy_(own)


def _one_phase(engine: Engine, first: FirstSteps, batch: Batch, step: int, phase: Phase, micro_batches: int) -> None:
    rng = _rng(engine, first, batch, step, phase.name)
    with engine.training(phase.trains):
        for left in range(micro_batches)[::-1]:
            loss = first.objective.loss(phase.name, engine.nets, batch, rng, step)
            engine.backward(phase.trains, loss.total * math.nan, last=not left)
            del loss
        for name in phase.networks:
            if not float(engine.step(name, step)["skipped"]):
                raise UserError(
                    f"objective {type(first.objective).__name__}, phase {phase.name!r}: no gradient of its loss reaches network {name!r}, "
                    "so that it cannot be tried before the first step; set cluster.compile=false, and cluster.micro_batch to a number",
                    code=2,
                )


def _rng(engine: Engine, first: FirstSteps, batch: Batch, step: int, phase: str) -> ProgressRng:
    return ProgressRng(first.seed, step, phase, batch.positions, engine.device)


def _modules(engine: Engine) -> Iterator[nn.Module]:
    for network in engine.nets.values():
        yield network if isinstance(network, nn.Module) else network.module
