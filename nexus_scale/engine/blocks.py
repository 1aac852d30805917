"""Activation checkpointing and compilation of a network's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from nexus_scale.contracts import Network, UserError


@cache
def _checkpointed(cls: Any) -> Any:
    """The class with a call that keeps only its inputs. The *call* is wrapped, not `forward`: hooks, by which ZeRO-3
    gathers parameters, must run again when the block is computed again."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not (torch.is_grad_enabled() and self.training):
            return cls.__call__(self, *args, **kwargs)
        return checkpoint(lambda *a, **k: cls.__call__(self, *a, **k), *args, use_reentrant=False, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def blocks_of(network: Network, name: str, asked_for: str) -> Sequence[nn.Module]:
    """A network's repeated blocks.

    Raises:
        UserError: it has none.
    """
    found = network.blocks()
    if not found:
        raise UserError(
            f"network {name!r} ({type(network).__name__}) has no blocks(), which {asked_for} needs; switch {asked_for} off"
        )
    return found


def prepare_blocks(network: Network, name: str, *, activation_checkpointing: bool, compiled: bool) -> None:
    """Checkpoints and compiles the blocks, in place; parameters keep their names.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    if activation_checkpointing:
        for block in blocks_of(network, name, "activation_checkpointing"):
            cls: Any = type(block)
            block.__class__ = _checkpointed(cls)
    if compiled:
        for block in blocks_of(network, name, "compile"):
            block.compile()
