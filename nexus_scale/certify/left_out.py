"""Negative controls: a checkpoint that verifies but lacks a piece of state. A certificate that overlooks it proves nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nexus_scale.contracts import Shard
from nexus_scale.engine.checkpoint import CheckpointStore, newest

ITEMS: dict[str, Callable[[str], bool]] = {
    "masters": lambda name: name.endswith(".fp32"),
    "moments": lambda name: name.endswith((".exp_avg", ".exp_avg_sq")),
    "ema": lambda name: name.endswith(".ema"),
    "optimizer_steps": lambda name: name.endswith(".optimizer_steps"),
    "draws": lambda name: False,
}
"""What can be left out, and its tensors; `draws`, the position in the data, has none."""


def leave_out(item: str, checkpoints: Path) -> int:
    """Rewrites the newest checkpoint with zeros for one item and correct hashes; its step.

    Args:
        item: one of ITEMS.
    Raises:
        LookupError: there is no checkpoint, or it lacks the item already.
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
        raise LookupError(f"{checkpoint.path}: holds no {item}")
    for name in gone:
        shards[name] = Shard(torch.zeros_like(shards[name].local), 0, shards[name].shape)
    store = CheckpointStore(checkpoints, rank=0, world_size=1, attempt=f"without-{item}", keep=1)
    store.save(checkpoint.step, shards, state)
    store.wait()
    store.close()
    return checkpoint.step
