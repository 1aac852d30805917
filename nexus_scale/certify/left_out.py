"""Negative controls: a checkpoint that verifies but lacks a piece of state. A certificate that overlooks it proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nexus_scale.contracts import Shard, UserError
from nexus_scale.engine.checkpoint import CheckpointStore, newest
from nexus_scale.kernels.update import MOMENTS

ITEMS: dict[str, Callable[[str], bool]] = {
    "masters": lambda name: name.endswith(".fp32"),
    "moments": lambda name: name.rpartition(".")[2] in MOMENTS,
    "ema": lambda name: name.endswith(".ema"),
    "optimizer_steps": lambda name: name.endswith(".optimizer_steps"),
    "buffers": lambda name: name.endswith(".buffer"),
    "objective": lambda name: name.startswith("objective/"),
    "draws": lambda name: False,
}
"""What can be left out, and its tensors; `draws`, the position in the data, has none."""

EMPTY = {"masters": 2.0**-7, "buffers": 1.0}
"""What stands in place of an item where it is not zeros: of some masters and buffers the norm or a root divides, and a run that learns
nothing but NaN does not come to the end of its steps."""


def items(checkpoints: Path) -> list[str]:
    """Those of ITEMS that the newest checkpoint holds: whose tensors are there, and not what stands in place of one left out."""
    checkpoint = newest(checkpoints)

    def holds(item: str) -> bool:
        names = [] if checkpoint is None else [name for name in checkpoint.names if ITEMS[item](name)]
        return any((checkpoint.tensor(name) != EMPTY.get(item, 0.0)).any() for name in names)  # type: ignore[union-attr]

    return [item for item in ITEMS if item == "draws" or holds(item)]


def leave_out(item: str, checkpoints: Path) -> int:
    """Rewrites the newest checkpoint with what is EMPTY for one item and correct hashes; its step.

    Args:
        item: one of ITEMS.
    Raises:
        UserError: the checkpoint lacks the item already.
    """
    checkpoint = newest(checkpoints)
    if checkpoint is None:
        raise LookupError(f"{checkpoints}: holds no checkpoint to leave {item} out of")
    shards = {}
    for name in checkpoint.names:
        tensor = checkpoint.tensor(name)
        shards[name] = Shard(tensor.reshape(-1), 0, tuple(tensor.shape))
    gone = [name for name in shards if ITEMS[item](name)]
    state: dict[str, Any] = dict(checkpoint.state)
    if item == "draws":
        state["progress"] = {**state["progress"], "draws": 0}
    elif not gone:
        raise UserError(
            f"--leave-out {item}: this recipe's checkpoints hold none; they hold {', '.join(items(checkpoints))}"
        )
    for name in gone:
        shards[name] = Shard(torch.full_like(shards[name].local, EMPTY.get(item, 0.0)), 0, shards[name].shape)
    store = CheckpointStore(checkpoints, rank=0, world_size=1, attempt=f"without-{item}", keep=1)
    store.save(checkpoint.step, shards, state)
    store.wait()
    store.close()
    return checkpoint.step
