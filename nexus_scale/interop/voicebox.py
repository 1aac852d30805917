"""Voicebox's networks alone, by our own names: no published code has them, so the folder holds safetensors and a README with the sizes."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Shapes, own_format
from nexus_scale.interop.published import Family


def trunk_of(shapes: Shapes) -> dict[str, Any]:
    """What tensors show; heads are not among it."""
    num_phonemes, phone_size = shapes.of("phones.rows")
    hidden, per_group, kernel = shapes.of("trunk.places.weight")
    return {
        "num_phonemes": num_phonemes,
        "phone_size": phone_size,
        "hidden_size": hidden,
        "depth": shapes.count(r"trunk\.skip_blocks\.(\d+)\."),
        "mlp_ratio": shapes.of("trunk.skip_blocks.0.block.fc1.weight")[0] / hidden,
        "kernel_size": kernel,
        "conv_groups": hidden // per_group,
    }


OWN = own_format(
    "voicebox",
    "Voicebox weights",
    lambda shapes: {**trunk_of(shapes), "num_mels": shapes.of("out.weight")[0]},
    free=("num_heads", "dropout"),
)
FAMILY = Family({"original": OWN})
