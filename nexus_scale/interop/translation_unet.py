"""TranslationUnet as the generator of pix2pix's released code (junyanz/pytorch-CycleGAN-and-pix2pix, `unet_256`), as tables; to the bit.

There each level is a module within the one above it. The running means of its batch norms are left out: it draws, as it trains, with the
statistics of the image.
"""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Format, Row, Shapes, Table
from nexus_scale.interop.published import Family
from nexus_scale.interop.translation_resnet import FILE, normed


def _level(number: int) -> str:
    """The modules of a level of theirs, counted from the outermost."""
    return "model.model" + "".join(f".{1 if level == 0 else 3}.model" for level in range(number))


def _table(net: Any) -> Table:
    rows: dict[str, Row] = {"first": f"{_level(0)}.0", "last": f"{_level(0)}.3"}
    for level in range(1, net.depth):
        there, lowest = _level(level), level == net.depth - 1
        down = f"down.{level - 1}"
        rows |= {f"{down}.conv": f"{there}.1"} if lowest else normed(down, f"{there}.1", f"{there}.2")
        rows |= normed(f"up.{net.depth - 1 - level}", f"{there}.{3 if lowest else 5}", f"{there}.{4 if lowest else 6}")
    return rows


def _args(shapes: Shapes) -> dict[str, Any]:
    hidden, channels = shapes.of("model.model.0.weight")[:2]
    depth = 1
    while f"{_level(depth)}.1.weight" in shapes:
        depth += 1
    return {
        "in_channels": channels,
        "out_channels": shapes.of("model.model.3.weight")[1],
        "image_size": 2**depth,
        "hidden_size": hidden,
        "depth": depth,
        "norm": "instance" if "model.model.0.bias" in shapes else "affine_instance",
    }


ORIGINAL = Format(
    "translation_unet",
    "pix2pix generator",
    _table,
    from_shapes=_args,
    free=("image_size", "dropout"),
    file=FILE,
)
FAMILY = Family({"original": ORIGINAL})
