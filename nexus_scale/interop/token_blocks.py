"""What the tensors of a transformer over tokens show of it, whatever it reads; see models/layers/tokens.py."""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Shapes


def blocks_of(shapes: Shapes, blocks: str, depth: str = "depth") -> dict[str, Any]:
    """Number and inner width of the `TokenBlock`s that a network calls `blocks`; heads are not among it."""
    inner, hidden = shapes.of(f"{blocks}.0.fc1.weight")
    return {depth: shapes.count(rf"{blocks}\.(\d+)\."), "mlp_ratio": inner / hidden}


def told_of(shapes: Shapes) -> dict[str, Any]:
    """The conditions that `layers.told.Told` of a network has tables for; see models/layers/told.py."""
    return {
        "num_classes": shapes["told.label.rows"][0] - 1 if "told.label.rows" in shapes else 0,
        "text_dim": shapes["told.text.weight"][1] if "told.text.weight" in shapes else 0,
    }
