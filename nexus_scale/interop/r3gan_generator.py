"""R3GANGenerator in the authors' code (github.com/brownvc/R3GAN, `G_ema.state_dict()` of its pickles), as a table; to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from nexus_scale.interop.formats import Format, Made, Row, Shapes, Table
from nexus_scale.interop.published import Family

PREFIX = "Model."


def stages(net: Any, first: int) -> Iterator[tuple[str, Row]]:
    """Rows of the blocks and of what widens; `first` is the number of the first block in each of their stages, before (generator: 1) or
    behind (critic: 0) which lies what leads from one to the next."""
    for number, stage in enumerate(net.stages):
        for block in range(len(stage)):
            ours, theirs = f"stages.{number}.{block}", f"MainLayers.{number}.Layers.{block + first}"
            yield from ((f"{ours}.conv{i}", f"{theirs}.LinearLayer{i}.Layer") for i in (1, 2, 3))
            yield from ((f"{ours}.act{i}.bias", f"{theirs}.NonLinearity{i}.Bias") for i in (1, 2))
    for number, layer in enumerate(net.widen):
        if list(layer.parameters()):
            yield f"widen.{number}", f"{between(net, number, first)}.LinearLayer.Layer"


def between(net: Any, number: int, first: int) -> str:
    """What leads from a stage to the next: the next one's first layer, or its own last."""
    return f"MainLayers.{number + 1}.Layers.0" if first else f"MainLayers.{number}.Layers.{len(net.stages[number])}"


def kernels(net: Any, first: int) -> dict[str, Made]:
    """Their filter of every change of size, which has one value."""
    names = [f"{between(net, number, first)}.Resampler.Kernel" for number in range(len(net.widen))]
    return {name: Made(_kernel, tolerance=1e-6, differs="another filter than [1, 2, 1]") for name in names}


def _kernel(net: Any) -> Tensor:
    taps = torch.tensor([1.0, 3, 3, 1])
    return taps.outer(taps) / 64


def arguments(shapes: Shapes) -> dict[str, Any]:
    """What generator and critic have in common."""
    found: dict[str, list[int]] = {"hidden_sizes": [], "depths": [], "num_groups": []}
    wide = size = 1
    for number in range(shapes.count(r"MainLayers\.(\d+)\.")):
        stage = rf"MainLayers.{number}.Layers"
        depth = shapes.count(rf"{stage}\.(\d+)\.LinearLayer1")
        block = f"{stage}.{0 if f'{stage}.0.LinearLayer1.Layer.weight' in shapes else 1}"
        (wide, size), part = (
            shapes.of(f"{block}.LinearLayer1.Layer.weight")[:2],
            shapes.of(f"{block}.LinearLayer2.Layer.weight")[1],
        )
        for name, value in (("hidden_sizes", size), ("depths", depth), ("num_groups", wide // part)):
            found[name].append(value)
    classes = shapes.get("EmbeddingLayer.weight", (0, 0))[1]
    return {
        **{name: tuple(values) for name, values in found.items()},
        "expansion": wide // size,
        "num_classes": classes,
    }


def _table(net: Any) -> Table:
    rows: dict[str, Row] = dict(stages(net, 1))
    rows |= {
        "basis.pattern": "MainLayers.0.Layers.0.Basis",
        "first": "MainLayers.0.Layers.0.LinearLayer",
        "last": "AggregationLayer.Layer",
    }
    return rows | ({"embedding": "EmbeddingLayer"} if net.num_classes else {})


def _args_of(shapes: Shapes) -> dict[str, Any]:
    args = arguments(shapes)
    noise = shapes.of("MainLayers.0.Layers.0.LinearLayer.weight")[1] // (2 if args["num_classes"] else 1)
    return {"image_channels": shapes.of("AggregationLayer.Layer.weight")[0], "noise_size": noise, **args}


ORIGINAL = Format(
    "r3gan_generator",
    "R3GAN generator weights",
    _table,
    from_shapes=_args_of,
    computed=lambda net: kernels(net, 1),
    file="G.safetensors",
    prefix=PREFIX,
)
FAMILY = Family({"original": ORIGINAL})
