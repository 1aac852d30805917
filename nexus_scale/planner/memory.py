"""Memory of one rank, by part, from the number of parameters.

Source: Rajbhandari et al. 2020 (ZeRO), section 3 and figure 1: mixed-precision Adam keeps 2 bytes of weights, 2 of gradients and
12 of optimizer state (float32 master, first and second moment) per parameter, 16 in all; stage 1 shards the 12, stage 2 the
gradients too, stage 3 the weights too. In float32 the weights are their own master: 4 + 4 + 8, again 16. Other optimizers keep
fewer values than Adam's two moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

GIB = 2**30

Precision = Literal["float32", "bf16"]
Offload = Literal["none", "cpu"]

WEIGHT = {"float32": 4, "bf16": 2}
_MASTER = {"float32": 0, "bf16": 4}
_MOMENT = _AVERAGE = 4

CONTEXT = 0.6 * GIB
"""What CUDA's context, the kernels' code and cuBLAS's workspaces take of a GPU: an assumption (torch 2.11 on an H100 shows about so much
beside what its allocator holds)."""

CHANNELS = 0.9 * GIB
"""What NCCL's buffers and channels take of a GPU where there are several ranks: an assumption."""

FRAGMENTATION = 0.04
"""Part of what changes within a step that the allocator holds and cannot use: an assumption."""

BESIDE_TENSORS = ("cuda_context", "fragmentation")
"""Parts that torch's `max_memory_allocated` does not see."""


def memory_per_rank(
    parameters: int,
    *,
    world_size: int,
    zero_stage: int = 3,
    precision: Precision = "bf16",
    moments: int | None = None,
    averaged: int = 0,
    frozen_parameters: int = 0,
    eight_bits: int = 0,
    whole: int = 0,
    gathered: int = 0,
    reducing: int = 0,
    gradient_bytes: float | None = None,
    passing_bytes: float = 0.0,
    encoders: float = 0.0,
    activation_bytes: float = 0.0,
    offload: Offload = "none",
    on_gpu: bool = False,
) -> dict[str, float]:
    """Bytes by part; parts that start with `host` lie in the node's memory, all others on the device.

    Args:
        parameters: trained parameters of the whole model.
        world_size: ranks that ZeRO shards over.
        moments: values that the optimizers keep beside their masters, of all trained parameters together; None: Adam's two of each.
        averaged: parameters of all EMA copies together, in float32 and sharded like the optimizer's state.
        frozen_parameters: a rank's parameters that only compute (a teacher, or the rank's part of it; copies of a replicated network).
        eight_bits: those of them that are held in 8 bits.
        whole: trained parameters of which each rank keeps a copy that computes.
        gathered: parameters of sharded networks that are whole at once. reducing: those whose gradients are, before they are summed.
        gradient_bytes: that a trained parameter's gradient takes throughout the step; None: those of the precision.
        passing_bytes: that gradients take at the end of a backward pass, when activations are gone.
        encoders: bytes of what encodes while data are read.
        activation_bytes: of one micro-batch.
        on_gpu: adds what the GPU needs beside tensors.
    Raises:
        ValueError: a number out of range, or an unknown name.
    """
    moments = 2 * parameters if moments is None else moments
    sizes = (moments, averaged, frozen_parameters, whole, gathered, reducing, passing_bytes, encoders)
    if parameters < 1 or world_size < 1 or min(*sizes, activation_bytes, frozen_parameters - eight_bits) < 0:
        raise ValueError(
            "expected parameters and world_size of at least 1 and nothing negative; got "
            f"parameters {parameters}, world_size {world_size}, moments {moments}, averaged {averaged}, "
            f"frozen_parameters {frozen_parameters}, eight_bits {eight_bits}, gathered {gathered}, reducing {reducing}, "
            f"activation_bytes {activation_bytes}"
        )
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_stage {zero_stage}: expected 0, 1, 2 or 3")
    if precision not in WEIGHT:
        raise ValueError(f"precision {precision!r}: expected one of {', '.join(WEIGHT)}")
    if offload not in ("none", "cpu"):
        raise ValueError(f"offload {offload!r}: expected none or cpu")

    def share(stage: int, values: int = parameters) -> int:
        """Values that a rank holds of what is sharded from `stage` on, with the last rank's padding."""
        return -(-values // world_size) if zero_stage >= stage else values

    weight = WEIGHT[precision]
    each = weight if gradient_bytes is None else gradient_bytes
    optimizer, average = (("host_" if offload == "cpu" else "") + part for part in ("optimizer", "averages"))
    changing = activation_bytes + weight * (gathered + reducing)
    parts = {
        "weights": float(weight * share(3)),
        "whole_copies": float(weight * whole),
        "gradients": each * share(2) + max(0.0, passing_bytes - activation_bytes),
        optimizer: float(_MASTER[precision] * share(1) + _MOMENT * share(1, moments)),
        average: float(_AVERAGE * share(1, averaged)),
        "frozen": float(weight * (frozen_parameters - eight_bits) + eight_bits),
        "encoders": float(encoders),
        "gathered": float(weight * gathered),
        "reducing": float(weight * reducing),
        "activations": float(activation_bytes),
        "cuda_context": CONTEXT + (CHANNELS if world_size > 1 else 0.0) if on_gpu else 0.0,
        "fragmentation": FRAGMENTATION * changing if on_gpu else 0.0,
    }
    return {name: size for name, size in parts.items() if size > 0}


def on_device(parts: Mapping[str, float]) -> float:
    """Bytes of the parts that lie on the device."""
    return sum(size for name, size in parts.items() if not name.startswith("host"))


def on_host(parts: Mapping[str, float]) -> float:
    """Bytes of the parts that are offloaded to the node's memory, for one rank."""
    return sum(size for name, size in parts.items() if name.startswith("host"))


def in_tensors(parts: Mapping[str, float]) -> float:
    """Bytes of tensors on the device at the peak of a step: what torch's `max_memory_allocated` reports."""
    return sum(size for name, size in parts.items() if not name.startswith("host") and name not in BESIDE_TENSORS)
