"""PatchDiscriminator as that of the released code of pix2pix and CycleGAN (junyanz/pytorch-CycleGAN-and-pix2pix, `basic`), as tables; to
the bit. Its group norms have no place there."""

from __future__ import annotations

from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.interop.formats import Format, Shapes, State, Table
from nexus_scale.interop.published import Family
from nexus_scale.interop.translation_resnet import FILE


def _table(net: Any) -> Table:
    rows = {"first": "model.0", "last": f"model.{2 + 3 * net.depth}"}
    for i in range(net.depth):
        rows |= {
            f"layers.{i}.conv": f"model.{2 + 3 * i}",
            f"layers.{i}.scale": f"model.{3 + 3 * i}.weight",
            f"layers.{i}.shift": f"model.{3 + 3 * i}.bias",
        }
    return rows


def _args(shapes: Shapes) -> dict[str, Any]:
    hidden, channels = shapes.of("model.0.weight")[:2]
    convolutions = sum(len(shape) == 4 for shape in shapes.values())
    return {
        "image_channels": channels,
        "hidden_size": hidden,
        "depth": convolutions - 2,
        "norm": "instance" if "model.2.bias" in shapes else "affine_instance",
    }


def _prepared(state: State, args: dict[str, Any]) -> tuple[State, dict[str, Any]]:
    if (norm := args.get("norm", "group")) == "group":
        raise UserError(
            f"patch_discriminator.norm: got {norm}; the published layout has instance norms: it cannot be exported"
        )
    return state, args


ORIGINAL = Format(
    "patch_discriminator",
    "PatchGAN discriminator",
    _table,
    from_shapes=_args,
    prepared=_prepared,
    free=("image_size", "num_groups"),
    file=FILE,
)
FAMILY = Family({"original": ORIGINAL})
