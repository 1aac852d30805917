"""What the tensors of a transformer over tokens show of it, whatever it reads; see models/layers/tokens.py."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Shapes


def blocks_of(shapes: Shapes, blocks: str, depth: str = "depth") -> dict[str, Any]:
    """Number and inner width of the `TokenBlock`s that a network calls `blocks`; heads are not among it."""
    inner, hidden = shapes.of(f"{blocks}.0.fc1.weight")
    return {depth: shapes.count(rf"{blocks}\.(\d+)\."), "mlp_ratio": inner / hidden}
