"""WindowTransformer in a file of its own names: the weights of VideoPoet's super-resolution are not published."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Shapes, own_format
from nexus_scale.interop.published import Family
from nexus_scale.interop.token_blocks import blocks_of


def _args_of(shapes: Shapes) -> dict[str, Any]:
    """What tensors show; the shapes of clips and windows are not among it."""
    size, hidden = shapes.of("head.weight")
    return {"codebook_size": size, "hidden_size": hidden, **blocks_of(shapes, "token_blocks")}


OWN = own_format(
    "window_transformer",
    "weights of a super-resolution transformer",
    _args_of,
    free=("code_shape", "low_shape", "windows", "num_heads", "dropout"),
)
FAMILY = Family({"original": OWN})
