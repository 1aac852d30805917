"""R3GANCritic in the authors' code (github.com/brownvc/R3GAN, `D.state_dict()` of its pickles), as a table; to the bit."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Format, Row, Shapes, Table
from nexus_scale.interop.published import Family
from nexus_scale.interop.r3gan_generator import PREFIX, arguments, kernels, stages


def _table(net: Any) -> Table:
    rows: dict[str, Row] = dict(stages(net, 0))
    last = f"MainLayers.{len(net.stages) - 1}.Layers.{len(net.stages[-1])}"
    rows |= {"first": "ExtractionLayer.Layer", "basis": f"{last}.Basis", "last": f"{last}.LinearLayer"}
    return rows | ({"embedding": "EmbeddingLayer"} if net.num_classes else {})


def _args_of(shapes: Shapes) -> dict[str, Any]:
    return {"image_channels": shapes.of("ExtractionLayer.Layer.weight")[1], **arguments(shapes)}


ORIGINAL = Format(
    "r3gan_critic",
    "R3GAN critic weights",
    _table,
    from_shapes=_args_of,
    computed=lambda net: kernels(net, 0),
    file="D.safetensors",
    prefix=PREFIX,
)
FAMILY = Family({"original": ORIGINAL})
