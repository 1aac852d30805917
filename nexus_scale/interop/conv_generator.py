"""ConvGenerator in a file of its own names: no other program has it."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Shapes, own_format
from nexus_scale.interop.published import Family


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """What tensors show; what share of the first layer's inputs are classes is not among it."""
    channels, hidden = shapes.of("last.weight")[:2]
    depth = shapes.count(r"middle\.(\d+)\.")
    side = round((shapes.of("first.weight")[0] / hidden) ** 0.5)
    return {"image_channels": channels, "image_size": side * 2**depth, "hidden_size": hidden, "depth": depth}


OWN = own_format("conv_generator", "weights of a generator", _args_of, free=("noise_size", "num_classes"))
FAMILY = Family({"original": OWN})
