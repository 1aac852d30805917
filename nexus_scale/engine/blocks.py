"""Activation checkpointing and compilation of a network's blocks.

What is compiled is `block.forward`: hooks on the block, by which ZeRO-3 gathers and releases weights, and activation checkpointing lie
around it, so that they run as they are and no graph breaks at them. Graphs are of fixed shapes, one for each size of the data, and are
shared by blocks of one structure. `rehearsal/warm_up.py` makes them before the first step.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from nexus_scale.contracts import Adapter, Nets, Network, UserError
from nexus_scale.engine import compiler
from nexus_scale.kernels.lengths import Lengths

log = logging.getLogger(__name__)

_warm = False

ADAPTERS = "nexus_adapters"
"""Under this name a block holds the adapters that are attached to its network."""


@cache
def _checkpointed(cls: Any) -> Any:
    """The class with a call that keeps only its inputs. The *call* is wrapped, not `forward`: hooks, by which ZeRO-3
    gathers parameters, must run again when the block is computed again."""

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return cls.__call__(self, *args, **kwargs)
        adapters = [adapter for adapter in vars(self).get(ADAPTERS, ()) if adapter.at_works]
        if not (self.training or adapters):
            return cls.__call__(self, *args, **kwargs)

        def computed(*a: Any, **k: Any) -> Any:
            with contextlib.ExitStack() as changes:  # in the backward, too, which comes after the call that they are of
                for adapter in adapters:
                    changes.enter_context(adapter.at_work())
                return cls.__call__(self, *a, **k)

        return checkpoint(computed, *args, use_reentrant=False, **kwargs)

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


def prepare_blocks(
    network: Network, name: str, *, activation_checkpointing: bool, compiled: bool, graphs: bool = False
) -> None:
    """Checkpoints and compiles the blocks, in place; parameters keep their names. What is compiled is the `forward` that a block has now.

    `graphs`: a call with gradients, and its backward, is a CUDA graph; weights must stay where they are, and gradients be read before the
    next forward. A network that the objective differentiates twice, or that has no blocks, stays as it is, which is logged; so does an
    adapter without blocks of its own.

    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    if isinstance(network, Adapter) and not network.blocks():
        return
    if activation_checkpointing:
        for block in blocks_of(network, name, "activation_checkpointing"):
            cls: Any = type(block)
            block.__class__ = _checkpointed(cls)
    if compiled:
        why_not = _why_not_compiled(network)
        if why_not:
            log.info("network %r is not compiled: %s", name, why_not)
            return
        network.compiled = True
        for block in network.blocks():
            block.forward = CompiledForward(block.forward, graphs)


def _why_not_compiled(network: Network) -> str:
    if network.differentiated_twice:
        return "the objective differentiates it twice (R1, a gradient penalty), which compiled code cannot"
    return "" if network.blocks() else f"{type(network).__name__} has no blocks()"


def compiled_blocks(nets: Nets) -> dict[str, str]:
    """What is compiled of each of an engine's networks, in words, for environment.json."""
    found = {}
    for name, net in nets.items():
        network: Network = net if isinstance(net, Network) else net.module
        names = [type(b).__name__ for b in network.blocks() if isinstance(vars(b).get("forward"), CompiledForward)]
        counted = ", ".join(f"{names.count(kind)} x {kind}" for kind in dict.fromkeys(names))
        found[name] = counted or f"nothing: {_why_not_compiled(network)}"
    return found


class CompiledForward:
    """A block's `forward`, compiled for each size that it is called with.

    Within `warm()`, a call without gradients of a size that is not compiled yet (a last, smaller batch of a validation; samples, whose
    number and lengths vary; tokens one by one) computes as it would uncompiled.
    """

    def __init__(self, forward: Callable[..., Any], graphs: bool = False):
        compiler.set_limits()
        self.of = type(getattr(forward, "__self__", forward)).__name__
        make = partial(torch.compile, forward, backend=compiler.BACKEND, dynamic=False)
        self.compiled = make()
        self.learning = make(options={"triton.cudagraphs": True}) if graphs else self.compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _warm and not torch.is_grad_enabled():
            with torch.compiler.set_stance("eager_on_recompile"):
                return self.compiled(*args, **kwargs)
        graphs = compiler.graphs()
        _keep_open(args, kwargs)
        out = (self.learning if torch.is_grad_enabled() else self.compiled)(*args, **kwargs)
        if _warm and compiler.graphs() != graphs:
            log.info("compiled a block once more, for a size or a use that came up while training: %s", self.of)
        return out


def _keep_open(args: Any, kwargs: Any) -> None:
    """Leaves sizes open that differ from batch to batch: first dimensions of what lies end to end (kernels/lengths.py)."""
    if not any(isinstance(value, (Lengths, tuple)) for value in (*args, *kwargs.values())):
        return
    from torch._dynamo import maybe_mark_dynamic

    leaves = tree_leaves((args, kwargs))
    given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    for lengths in (leaf for leaf in leaves if isinstance(leaf, Lengths)):
        for tensor in lengths.open_tensors(given):
            maybe_mark_dynamic(tensor, 0)


@contextmanager
def warm() -> Iterator[None]:
    """A context for what comes once all sizes of the data are compiled (see `CompiledForward`)."""
    global _warm
    before, _warm = _warm, True
    try:
        yield
    finally:
        _warm = before
