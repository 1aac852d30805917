"""The aligner of recordings alone; see voicebox.py."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Shapes, own_format
from nexus_scale.interop.published import Family


def trunk_of(shapes: Shapes) -> dict[str, Any]:
    """Sizes of a trunk of Vocos's blocks."""
    channels, in_channels, _ = shapes.of("trunk.embed.weight")
    return {
        "num_mels": in_channels,
        "hidden_channels": channels,
        "mlp_channels": shapes.of("trunk.blocks.0.up.weight")[0],
        "depth": shapes.count(r"trunk\.blocks\.(\d+)\."),
    }


OWN = own_format(
    "phone_aligner",
    "weights of an aligner",
    lambda shapes: {**trunk_of(shapes), "num_phonemes": shapes.of("out.weight")[0]},
)
FAMILY = Family({"original": OWN})
