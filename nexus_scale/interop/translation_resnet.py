"""TranslationResnet as the generator of CycleGAN's released code (junyanz/pytorch-CycleGAN-and-pix2pix, `resnet_9blocks`), as tables; to
the bit."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Format, Row, Shapes, Table
from nexus_scale.interop.published import Family

FILE = "model.safetensors"


def normed(ours: str, conv: str, norm: str) -> dict[str, Row]:
    """Rows of a convolution, and of the norm behind it, which may have no weights."""
    return {
        f"{ours}.conv": conv,
        f"{ours}.norm.scale": f"{norm}.weight",
        f"{ours}.norm.shift": f"{norm}.bias",
    }


def _table(net: Any) -> Table:
    second = 5 + bool(net.dropout)  # dropout is a module of theirs
    above = 10 + net.depth
    rows = normed("first", "model.1", "model.2") | normed("down.0", "model.4", "model.5")
    rows |= normed("down.1", "model.7", "model.8")
    for i in range(net.depth):
        for number, place in ((1, 1), (2, second)):
            rows |= {
                f"middle.{i}.conv{number}": f"model.{10 + i}.conv_block.{place}",
                f"middle.{i}.norm{number}.scale": f"model.{10 + i}.conv_block.{place + 1}.weight",
                f"middle.{i}.norm{number}.shift": f"model.{10 + i}.conv_block.{place + 1}.bias",
            }
    rows |= normed("up.0", f"model.{above}", f"model.{above + 1}")
    rows |= normed("up.1", f"model.{above + 3}", f"model.{above + 4}")
    return rows | {"last": f"model.{above + 7}"}


def _args(shapes: Shapes) -> dict[str, Any]:
    hidden, channels = shapes.of("model.1.weight")[:2]
    depth = shapes.count(r"model\.(\d+)\.conv_block\.")
    return {
        "in_channels": channels,
        "out_channels": shapes.of(f"model.{17 + depth}.weight")[0],
        "hidden_size": hidden,
        "depth": depth,
        "norm": "instance" if "model.1.bias" in shapes else "affine_instance",
        "dropout": 0.5 if len(shapes.get("model.10.conv_block.6.weight", ())) == 4 else 0.0,
    }


ORIGINAL = Format(
    "translation_resnet", "CycleGAN generator", _table, from_shapes=_args, free=("image_size",), file=FILE
)
FAMILY = Family({"original": ORIGINAL})
