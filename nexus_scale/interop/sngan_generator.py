"""SNGANGenerator in the authors' code (pfnet-research/sngan_projection, ResNetGenerator), whose npz files hold these names, as a table.

`np.load("ResNetGenerator_450000.npz")`, written as safetensors, is read as it is.
"""

from __future__ import annotations

from typing import Any

from nexus_scale.interop.formats import Format, Shapes, Table
from nexus_scale.interop.published import Family

LEAVES = {"weight": "W", "bias": "b"}
STATISTICS = {"running_mean": "avg_mean", "running_var": "avg_var"}
PLAIN = {"weight": "gamma", "bias": "beta", **STATISTICS}
TOLD = {"weight": "gammas/W", "bias": "betas/W", **STATISTICS}


def _table(net: Any) -> Table:
    """Blocks are counted from 2, and the last two layers with them."""
    depth = len(net.middle)
    norm = TOLD if net.num_classes else PLAIN
    rows = {"first": ("l1", LEAVES), "norm": (f"b{depth + 2}", PLAIN), "last": (f"l{depth + 2}", LEAVES)}
    for i in range(depth):
        parts = {"conv1": ("c1", LEAVES), "conv2": ("c2", LEAVES), "shortcut": ("c_sc", LEAVES)}
        parts |= {"norm1": ("b1", norm), "norm2": ("b2", norm)}
        rows |= {f"middle.{i}.{ours}": (f"block{i + 2}/{theirs}", leaves) for ours, (theirs, leaves) in parts.items()}
    return {
        f"{ours}.{leaf}": f"{theirs}/{name}" for ours, (theirs, leaves) in rows.items() for leaf, name in leaves.items()
    }


def _args_of(shapes: Shapes) -> dict[str, Any]:
    depth = shapes.count(r"block(\d+)/")
    size, noise_size = shapes.of("l1/W")
    widths = [shapes.of("block2/c1/W")[1], *(shapes.of(f"block{i + 2}/c1/W")[0] for i in range(depth))]
    told = shapes.get("block2/b1/gammas/W")
    return {
        "image_channels": shapes.of(f"l{depth + 2}/W")[0],
        "image_size": round((size / widths[0]) ** 0.5) * 2**depth,
        "noise_size": noise_size,
        "widths": tuple(widths),
        "num_classes": told[0] if told else 0,
    }


ORIGINAL = Format(
    "sngan_generator",
    "SNGAN generator weights",
    _table,
    from_shapes=_args_of,
    free=("norm_group",),
    file="ResNetGenerator.safetensors",
)
FAMILY = Family({"original": ORIGINAL})
