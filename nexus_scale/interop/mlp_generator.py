"""MLPGenerator in a file of its own names: no other program has it."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Shapes, own_format
from nexus_scale.interop.published import Family


def _args_of(shapes: Shapes) -> dict[str, Any]:
    points, hidden = shapes.of("last.weight")
    return {
        "noise_size": shapes.of("middle.0.linear.weight")[1],
        "point_size": points,
        "hidden_size": hidden,
        "depth": shapes.count(r"middle\.(\d+)\."),
    }


OWN = own_format("mlp_generator", "weights of a generator", _args_of, free=("spread",))
FAMILY = Family({"original": OWN})
