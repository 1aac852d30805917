"""What the ranks of a cluster hold of a recipe's networks."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_scale.config.recipe import Cluster, Recipe, network_class
from nexus_scale.contracts import Network, UserError
from nexus_scale.engine.eight_bits import layers_of
from nexus_scale.engine.settings import RESIDENT_NUMEL, stays_whole
from nexus_scale.interop.encoders import find_text_encoder
from nexus_scale.kernels.update import moments_of
from nexus_scale.planner.memory import GIB, WEIGHT, Precision, memory_per_rank
from nexus_scale.rehearsal.meta import network_on_meta
from nexus_scale.train import make_objective

PREFETCHED = 2
"""Blocks of a large network that are gathered at once: the one that computes, and the next one (engine/flat.py)."""

REDUCED = 4
"""Blocks whose gradients are whole at once: those of one block, their copy that is sent, and two that are under way (engine/flat.py)."""


def precision_of(cluster: Cluster) -> Precision:
    """The precision of the computation. `auto` is assumed to be bf16 on GPUs and float32 elsewhere, as only the device knows."""
    assumed = "bf16" if cluster.gpus_per_worker else "float32"
    return "bf16" if cluster.precision == "bf16" or (cluster.precision == "auto" and assumed == "bf16") else "float32"


@dataclass(frozen=True)
class Holdings:
    """A recipe's networks in numbers.

    Attributes:
        counts: parameters of each network that is built, by name.
        parameters, moments, averaged: those that are trained, values that their optimizers keep, those of all averages.
        blocks: parameters of the blocks of each trained network, and of each that is adapted, by its name.
        eight_bits: parameters that are held in 8 bits.
        encoders: bytes of what encodes while data are read; `uncounted`: what could not be counted, in words.
    """

    counts: Mapping[str, int]
    parameters: int
    moments: int
    averaged: int
    blocks: Mapping[str, tuple[int, ...]]
    eight_bits: int = 0
    encoders: float = 0.0
    uncounted: tuple[str, ...] = ()


def holdings(recipe: Recipe, data_root: Path | None = None) -> Holdings:
    """A recipe's networks in numbers; nothing is allocated.

    Args:
        data_root: where relative folders of text encoders start.
    """
    made = {name: network_on_meta(*network_class(spec), f"networks.{name}") for name, spec in recipe.built().items()}
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in made.items()}
    encoders, uncounted = _encoders(recipe, data_root)
    return Holdings(
        counts=counts,
        parameters=sum(counts[name] for name in recipe.trained()),
        moments=moment_values(recipe, counts),
        averaged=sum(counts[average.average_of] for average in recipe.averages().values()),
        blocks={name: _blocks(made[name]) for name in (*recipe.trained(), *_adapted(recipe))},
        eight_bits=sum(
            layer.weight.numel()
            for name, entry in recipe.frozen().items()
            if entry.bits
            for layer in layers_of(made[name]).values()
        ),
        encoders=encoders,
        uncounted=uncounted,
    )


def _adapted(recipe: Recipe) -> list[str]:
    """Frozen networks that adapters compute with, whose blocks are gathered as those of trained ones are."""
    return sorted({adapter.adapts for adapter in recipe.adapters().values()})


def _blocks(network: Network) -> tuple[int, ...]:
    return tuple(sum(p.numel() for p in block.parameters()) for block in network.blocks())


def moment_values(recipe: Recipe, counts: Mapping[str, int]) -> int:
    """Values that the optimizers keep, each network's by the kind that teaches it."""
    return sum(
        counts[name] * len(moments_of(entry.optimizer or recipe.optimizer)) for name, entry in recipe.trained().items()
    )


def _encoders(recipe: Recipe, data_root: Path | None) -> tuple[float, tuple[str, ...]]:
    """Bytes of the text encoders that each worker holds whole, in float32, and what is not counted of encoders."""
    fly = recipe.data.on_the_fly
    uncounted = ("memory of the autoencoder (data.on_the_fly) is not counted",) if "moments" in fly else ()
    if "text" not in fly:
        return 0.0, uncounted
    given: Any = recipe.data.encoders["text"]
    total = 0.0
    for spec in [given] if isinstance(given, Mapping) else given:
        try:
            files = find_text_encoder(spec, data_root).weights
        except UserError as error:
            return total, (*uncounted, f"memory of the text encoders (data.on_the_fly) is not counted: {error}")
        total += sum(map(_float32_bytes, files))
    return total, uncounted


def _float32_bytes(file: Path) -> float:
    """What a file of weights takes in float32. A pickle is taken to hold float32 values."""
    if file.suffix != ".safetensors":
        return float(file.stat().st_size)
    with file.open("rb") as opened:
        header = json.loads(opened.read(struct.unpack("<Q", opened.read(8))[0]))
    return 4.0 * sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def only_computing(recipe: Recipe, cluster: Cluster, counts: Mapping[str, int], workers: int) -> int:
    """Parameters that each rank holds beside its part of what is trained: frozen networks and averages that the objective calls, of large
    ones its part."""
    sharding = is_sharding(cluster, workers)
    computing = [(name, entry.engine) for name, entry in recipe.frozen().items()]
    if sharding or precision_of(cluster) != "float32":  # otherwise an average computes from its own memory
        needed = recipe.called(make_objective(recipe, None).needs)
        of = [average.average_of for name, average in recipe.averages().items() if name in needed]
        computing += [(name, recipe.trained()[name].engine) for name in of]
    copies = 0
    for name, engine in computing:
        sharded = sharding and not stays_whole(counts[name], engine == "sharded")
        copies += -(-counts[name] // workers) if sharded else counts[name]
    return copies


def is_sharding(cluster: Cluster, workers: int) -> bool:
    """Whether states are sharded: a rank alone has nothing to shard, unless they lie in host memory."""
    return cluster.engine == "deepspeed" and cluster.max_workers > 0 and (workers > 1 or _offloads(cluster))


def _offloads(cluster: Cluster) -> bool:
    return cluster.offload == "cpu" and bool(cluster.gpus_per_worker)  # on a CPU there is nowhere to offload to


def is_resident(held: Holdings) -> bool:
    """Whether blocks stay gathered from their forward to their backward pass."""
    return max(held.counts[name] for name in held.blocks) <= RESIDENT_NUMEL


def rank_memory(
    recipe: Recipe, cluster: Cluster, held: Holdings, *, workers: int, accumulation: int, activation_bytes: float
) -> dict[str, float]:
    """Bytes that one rank takes, by part (see `memory_per_rank`)."""
    precision, sharding = precision_of(cluster), is_sharding(cluster, workers)
    kept, passing = gradients_of(cluster, precision, accumulation, sharding=sharding)
    shared = [name for name, entry in recipe.trained().items() if sharding and not _is_whole(held, name, entry)]
    whole = [name for name in recipe.trained() if sharding and workers > 1 and name not in shared]
    bases = [name for name in _adapted(recipe) if sharding and not _is_whole(held, name, recipe.frozen()[name])]
    at_once = [*(_at_once(held, name) for name in shared), *((_at_once(held, name)[0], 0) for name in bases)]
    gathered, reducing = zip((0, 0), *at_once, strict=True)
    return memory_per_rank(
        held.parameters,
        world_size=workers,
        zero_stage=3 if sharding else 0,
        precision=precision,
        moments=held.moments,
        averaged=held.averaged,
        frozen_parameters=only_computing(recipe, cluster, held.counts, workers),
        eight_bits=held.eight_bits,
        whole=sum(held.counts[name] for name in whole),
        gathered=max(gathered),
        reducing=max(reducing),
        gradient_bytes=kept,
        passing_bytes=passing * held.parameters,
        encoders=held.encoders,
        activation_bytes=activation_bytes,
        offload="cpu" if _offloads(cluster) else "none",
        on_gpu=bool(cluster.gpus_per_worker),
    )


def _is_whole(held: Holdings, name: str, entry: Any) -> bool:
    return stays_whole(held.counts[name], entry.engine == "sharded")


def _at_once(held: Holdings, name: str) -> tuple[int, int]:
    """Parameters of a sharded network that are whole at once, and those whose gradients are. What lies outside of its blocks stays
    whole from the first to the last, and so do its gradients."""
    count, block = held.counts[name], max(held.blocks[name], default=0)
    outside = count - sum(held.blocks[name])
    gathered = count if count <= RESIDENT_NUMEL else min(count, PREFETCHED * block + outside)
    return gathered, REDUCED * block + outside


def gradients_of(cluster: Cluster, precision: Precision, accumulation: int, *, sharding: bool) -> tuple[float, float]:
    """Bytes of a parameter's gradient: those that lie there throughout the step, and those that come as activations go."""
    if sharding:
        return (float(WEIGHT[precision]) if accumulation == 1 and not _offloads(cluster) else 4.0), 0.0
    if precision == "float32":
        return (0.0, 4.0) if accumulation == 1 else (4.0, 0.0)
    return (0.0, 2.0) if accumulation == 1 else (4.0, 2.0)  # bf16 gradients, and their sum over micro-batches


def limits_of(cluster: Cluster) -> tuple[float | None, float | None]:
    """Bytes that a rank may use on its device and on its host; None where the cluster file does not say."""
    ranks_per_node = max(1, -(-cluster.ranks // cluster.nodes))
    host = cluster.node_memory_gib * GIB / ranks_per_node if cluster.node_memory_gib else None
    if not cluster.gpus_per_worker:
        return host, host
    return cluster.gpu_memory_gib * GIB * cluster.gpus_per_worker if cluster.gpu_memory_gib else None, host
