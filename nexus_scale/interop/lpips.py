"""LPIPS in the file of the `lpips` package, `torch.save(lpips.LPIPS(net="vgg").state_dict(), "lpips_vgg.pth")`, as a table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nexus_scale.interop.formats import Format, Made, Shapes, Table
from nexus_scale.interop.published import Family
from nexus_scale.models.vae.lpips import SCALE, SHIFT


def _table(net: Any) -> Table:
    """There layers are counted from the image on: each convolution and its ReLU are two, a pooling is one."""
    table, number = {}, 0
    for i, depth in enumerate(net.depth):
        number += i > 0
        for j in range(depth):
            table[f"stages.{i}.convs.{j}"] = f"net.slice{i + 1}.{number}"
            number += 2
        table[f"heads.{i}"] = f"lin{i}.model.1"
    return table


def _beside(net: Any) -> dict[str, Made]:
    """Constants, and the heads once more."""

    def made(values: Tensor, differs: str = "") -> Made:
        return Made(lambda net: values, 1e-6 if differs else None, differs, written=False)

    again = {f"lins.{i}.model.1.weight": made(torch.zeros(1, width, 1, 1)) for i, width in enumerate(net.channels)}
    of_images = {"scaling_layer.shift": SHIFT, "scaling_layer.scale": SCALE}
    return again | {name: made(torch.tensor(of).view(1, 3, 1, 1), "is another's") for name, of in of_images.items()}


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """Channels and convolutions of each stage."""
    stages = shapes.count(r"net\.slice(\d+)\.")
    channels = tuple(shapes.of(f"lin{i}.model.1.weight")[1] for i in range(stages))
    return {
        "channels": channels,
        "depth": tuple(shapes.count(rf"net\.slice{i + 1}\.(\d+)\.weight") for i in range(stages)),
    }


ORIGINAL = Format(
    "lpips", "LPIPS weights", _table, from_shapes=_args_of, computed=_beside, file="lpips_vgg.safetensors"
)
FAMILY = Family({"original": ORIGINAL})
