"""MaskedTransformer in a file of its own names."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Shapes, own_format
from nexus_scale.interop.published import Family
from nexus_scale.interop.token_blocks import blocks_of, told_of


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """What tensors show; heads are not among it."""
    levels, size, hidden = shapes.of("heads.rows")
    return {
        "num_codebooks": levels,
        "codebook_size": size,
        "hidden_size": hidden,
        **blocks_of(shapes, "token_blocks"),
        **told_of(shapes),
    }


OWN = own_format("masked_transformer", "weights of a masked transformer", _args_of, free=("num_heads", "dropout"))
FAMILY = Family({"original": OWN})
