"""DCGANCritic in PyTorch's example (netD of pytorch/examples' dcgan/main.py), as a table; to the bit. Its sigmoid is left out here."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.dcgan_generator import counted
from nexus_scale.interop.formats import Format, Shapes, Table
from nexus_scale.interop.published import Family


def _table(net: Any) -> Table:
    """There each layer is a convolution, a norm and a ReLU, counted from 0; the first has no norm."""
    rows = {f"middle.{i}.conv": f"main.{3 * i + 2}" for i in range(len(net.middle))}
    rows |= {f"middle.{i}.norm": f"main.{3 * i + 3}" for i in range(len(net.middle))}
    return {"first": "main.0", **rows, "last": f"main.{3 * len(net.middle) + 2}"}


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """A class beside the image cannot be told from further channels."""
    depth = 1 + shapes.count(r"main\.(\d+)\.running_mean")
    hidden_size, image_channels = shapes.of("main.0.weight")[:2]
    base = shapes.of(f"main.{3 * depth - 1}.weight")[2]
    return {
        "image_channels": image_channels,
        "image_size": base * 2**depth,
        "hidden_size": hidden_size,
        "depth": depth,
    }


ORIGINAL = Format(
    "dcgan_critic",
    "DCGAN discriminator weights",
    _table,
    from_shapes=_args_of,
    free=("norm_group", "image_channels"),
    computed=lambda net: counted([3 * i + 3 for i in range(len(net.middle))]),
    file="netD.safetensors",
)
FAMILY = Family({"original": ORIGINAL})
