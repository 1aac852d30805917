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


def items(checkpoints: Path) -> list[str]:
    """Those of ITEMS that the newest checkpoint holds: whose tensors are there, and not zero, which is what one left out is."""
    checkpoint = newest(checkpoints)
    held = [] if checkpoint is None else [name for name in checkpoint.names if checkpoint.tensor(name).any()]
    return [item for item, of in ITEMS.items() if item == "draws" or any(map(of, held))]


def leave_out(item: str, checkpoints: Path) -> int:
    """Rewrites the newest checkpoint with zeros for one item and correct hashes; its step.

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
        shards[name] = Shard(torch.zeros_like(shards[name].local), 0, shards[name].shape)
    store = CheckpointStore(checkpoints, rank=0, world_size=1, attempt=f"without-{item}", keep=1)
    store.save(checkpoint.step, shards, state)
    store.wait()
    store.close()
    return checkpoint.step
