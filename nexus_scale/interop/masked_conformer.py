"""MaskedConformer in a file of its own names: SoundStorm's weights are not published, and public ones have other norms."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Shapes, own_format
from nexus_scale.interop.published import Family

_BLOCK = "conformer_blocks.0"


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """What tensors show; heads and rates of what it is told are not among it."""
    levels, size, hidden = shapes.of("heads.rows")
    inner, _, kernel = shapes.of(f"{_BLOCK}.conv.depthwise.weight")
    told = {key.split(".")[1]: shape[0] for key, shape in shapes.items() if key.startswith("told.")}
    return {
        "num_codebooks": levels,
        "codebook_size": size,
        "told": told,
        "hidden_size": hidden,
        "depth": shapes.count(r"conformer_blocks\.(\d+)\."),
        "mlp_ratio": shapes.of(f"{_BLOCK}.mlp1.fc1.weight")[0] / hidden,
        "kernel_size": kernel,
        "conv_ratio": inner / hidden,
    }


OWN = own_format("masked_conformer", "SoundStorm weights", _args_of, free=("num_heads", "repeats", "dropout"))
FAMILY = Family({"original": OWN})
