"""DCGANGenerator in PyTorch's example, `torch.save(netG.state_dict(), ...)` of pytorch/examples' dcgan/main.py, as a table; to the bit."""

from __future__ import annotations

from typing import Any

import torch

from nexus_scale.interop.formats import Format, Made, Shapes, Table
from nexus_scale.interop.published import Family


def _table(net: Any) -> Table:
    """There each layer is a transposed convolution, a norm and a ReLU, counted from 0."""
    names = ["first", *(f"middle.{i}" for i in range(len(net.middle)))]
    rows = {f"{name}.conv": f"main.{3 * i}" for i, name in enumerate(names)}
    rows |= {f"{name}.norm": f"main.{3 * i + 1}" for i, name in enumerate(names)}
    return {**rows, "last": f"main.{3 * len(names)}"}


def counted(norms: list[int]) -> dict[str, Made]:
    """torch's count of batches of these layers, which changes nothing."""
    return {f"main.{i}.num_batches_tracked": Made(lambda net: torch.zeros((), dtype=torch.int64)) for i in norms}


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """A class beside the noise cannot be told from longer noise."""
    depth = shapes.count(r"main\.(\d+)\.running_mean")
    hidden_size, image_channels = shapes.of(f"main.{3 * depth}.weight")[:2]
    noise_size, _, base, _ = shapes.of("main.0.weight")
    return {
        "image_channels": image_channels, "image_size": base * 2**depth, "noise_size": noise_size, "hidden_size": hidden_size,
        "depth": depth,
    }  # fmt: skip


ORIGINAL = Format(
    "dcgan_generator",
    "DCGAN generator weights",
    _table,
    from_shapes=_args_of,
    free=("norm_group", "noise_size"),
    computed=lambda net: counted([3 * i + 1 for i in range(1 + len(net.middle))]),
    file="netG.safetensors",
)
FAMILY = Family({"original": ORIGINAL})
