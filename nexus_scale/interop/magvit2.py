"""Magvit2 as the weights of Open-MAGVIT2's video tokenizer (github.com/TencentARC/SEED-Voken), as a table; to the bit.

Its norms span the whole clip (`norm_over: chunk`) in 32 groups, which no weight says.
"""

from __future__ import annotations

import math
from typing import Any

from nexus_scale.interop.formats import Format, Row, Shapes, Table
from nexus_scale.interop.published import Family


def _block(ours: str, theirs: str, shortcut: bool) -> Table:
    names = {"norm1": "norm1", "norm2": "norm2", "conv1": "conv1.conv_1", "conv2": "conv2.conv_1"}
    names |= {"shortcut": "nin_shortcut.conv_1"} if shortcut else {}
    return {f"{ours}.{own}": f"{theirs}.{their}" for own, their in names.items()}


def _table(net: Any) -> Table:
    last = len(net.channels) - 1
    table: dict[str, Row] = {
        "enc_in": "encoder.conv_in.conv_1",
        "enc_norm": "encoder.norm_out",
        "to_latents": "encoder.conv_out.conv_1",
    }
    table |= {"dec_in": "decoder.conv_in.conv_1", "dec_norm": "decoder.norm_out", "dec_out": "decoder.conv_out.conv_1"}
    for j in range(net.depth):
        table |= _block(f"enc_middle.{j}", f"encoder.mid_block.{j}", False)
        table |= _block(f"dec_middle.{j}", f"decoder.mid_block.{j}", False)
        for i in range(last + 1):
            there = {"enc": f"encoder.down.{i}.block.{j}", "dec": f"decoder.up.{last - i}.block.{j}"}
            for side, stages in (("enc", net.enc_stages), ("dec", net.dec_stages)):
                table |= _block(f"{side}_stages.{i}.{j}", there[side], stages[i][j].shortcut is not None)
    for i in range(last):
        table[f"down.{i}"] = f"encoder.down.{i}.downsample.conv_1"
        table[f"up.{i}.conv"] = f"decoder.up.{last - i}.upsample.conv1.conv_1"
    for i in range(last + 1):
        table[f"adapt.{i}.scale"] = f"decoder.adaptive.{last - i}.gamma"
        table[f"adapt.{i}.shift"] = f"decoder.adaptive.{last - i}.beta"
    return table


def _args_of(shapes: Shapes) -> dict[str, Any]:
    stages = shapes.count(r"encoder\.down\.(\d+)\.")
    up = [shapes.of(f"decoder.up.{i}.upsample.conv1.conv_1.weight") for i in range(1, stages)]
    return {
        "image_channels": shapes.of("encoder.conv_in.conv_1.weight")[1],
        "bits": shapes.of("encoder.conv_out.conv_1.weight")[0],
        "channels": tuple(shapes.of(f"encoder.down.{i}.block.0.conv1.conv_1.weight")[0] for i in range(stages)),
        "depth": shapes.count(r"encoder\.mid_block\.(\d+)\."),
        "temporal_ratio": math.prod(2 for shape in up if shape[0] == 8 * shape[1]),
    }


ORIGINAL = Format(
    "magvit2",
    "Open-MAGVIT2 weights",
    _table,
    from_shapes=_args_of,
    free=("num_frames", "image_size", "num_groups", "norm_over", "temperature"),
    others=("loss.", "quantize.", "model_ema."),
    file="open_magvit2.safetensors",
)
FAMILY = Family({"original": ORIGINAL})
