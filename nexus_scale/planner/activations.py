"""What a network keeps for its backward pass, counted on the meta device, which computes and allocates nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nexus_scale.config.recipe import Recipe, network_class
from nexus_scale.contracts import Network
from nexus_scale.engine.networks import cast, place
from nexus_scale.kernels import choice
from nexus_scale.planner.attention import FusedAttention
from nexus_scale.planner.fused import as_compiled, kernels_of
from nexus_scale.planner.memory import Precision
from nexus_scale.rehearsal.costs import example_inputs
from nexus_scale.rehearsal.flops import Bounded, TooManyOperations
from nexus_scale.rehearsal.meta import network_on_meta, refused

LIVE_TENSORS = 3
"""Tensors of the size of the largest that is kept, which live at once within a backward pass that is not compiled: two gradients and
what is made of them."""


@dataclass(frozen=True)
class Kept:
    """`bytes`: what one forward pass keeps for its backward pass. `workspace`: what lives at once beside it while a block is
    differentiated."""

    bytes: int
    workspace: int


class _Counter:
    """Sums the storages that autograd saves, each once, without those of `excluded` tensors."""

    def __init__(self, excluded: Sequence[Tensor]):
        self._seen = {tensor.untyped_storage()._cdata for tensor in excluded}
        self._alive: list[Tensor] = []  # a freed storage would give its identity to another
        self.bytes = self.largest = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor)
            self.bytes += storage.nbytes()
            self.largest = max(self.largest, storage.nbytes())
        return tensor


class _Blocks:
    """What each block keeps, and what it is given, while a counter counts."""

    def __init__(self, counter: _Counter):
        self._counter = counter
        self.within: list[int] = []
        self.inputs = 0
        self._depth = 0  # tracing calls a block within its own call

    def before(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        self.inputs += sum(leaf.numel() * leaf.element_size() for leaf in given)
        self.within.append(-self._counter.bytes)

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._depth -= 1
        if not self._depth:
            self.within[-1] += self._counter.bytes

    @contextmanager
    def watched(self, blocks: Sequence[nn.Module]) -> Any:
        hooks = [block.register_forward_pre_hook(self.before, with_kwargs=True) for block in blocks]
        hooks += [block.register_forward_hook(self.after, with_kwargs=True) for block in blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def kept(
    network: Network,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    checkpointing: bool = False,
    compiled: bool = False,
) -> Kept:
    """Bytes that one forward pass keeps for its backward pass, and what lives beside them.

    Args:
        network: on the meta device, in the precision of the computation.
        args, kwargs: of its `forward`, on the meta device.
        checkpointing: whether blocks keep only their inputs, and one block at a time is computed again.
        compiled: whether blocks are compiled: then they keep fewer tensors, and compute cheap ones again.
    """
    counter = _Counter([*network.parameters(), *network.buffers()])
    blocks = _Blocks(counter)
    with ExitStack() as within:
        traced = within.enter_context(as_compiled(network.blocks())) if compiled else []
        if checkpointing:
            within.enter_context(blocks.watched(network.blocks()))
        within.enter_context(choice.plain())
        within.enter_context(torch.enable_grad())
        within.enter_context(FusedAttention())
        within.enter_context(torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor))
        network.train()(*args, **(kwargs or {}))
    workspaces = [kernels_of(graph).workspace for kind in traced for graph in kind.graphs]
    total = counter.bytes - sum(blocks.within) + blocks.inputs + max(blocks.within, default=0)
    return Kept(total, max(workspaces) if workspaces else LIVE_TENSORS * counter.largest)


def saved_bytes(
    network: Network,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    checkpointing: bool = False,
    compiled: bool = False,
) -> int:
    """Bytes that one forward pass keeps for its backward pass; see `kept`."""
    return kept(network, args, kwargs, checkpointing=checkpointing, compiled=compiled).bytes


@dataclass(frozen=True)
class Activations:
    """Bytes that a micro-batch of n samples takes beside the states: `fixed + n * (each + workspace)`.

    `uncounted`: names of networks that offer no `example_inputs`, or take too many operations.
    """

    each: float = 0.0
    workspace: float = 0.0
    fixed: float = 0.0
    uncounted: tuple[str, ...] = ()

    def of(self, samples: float) -> float:
        return self.fixed + samples * (self.each + self.workspace)


def activations_of(
    recipe: Recipe, *, precision: Precision, checkpointing: bool = False, compiled: bool = False
) -> Activations:
    """What one micro-batch takes: that of the network that needs most, as one learns at a time."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    most, uncounted = Activations(), []
    for name, spec in recipe.trained().items():
        made = network_on_meta(*network_class(spec), f"networks.{name}")
        place(made, torch.device("meta"), dtype)

        def count(samples: int, network: Network = made) -> Kept | None:
            inputs = example_inputs(network, recipe, samples)
            if inputs is None:
                return None
            with Bounded():
                return kept(network, cast(inputs, dtype, min_dims=2), checkpointing=checkpointing, compiled=compiled)

        try:
            two, one = (refused(f"networks.{name}: a sample cannot be computed", partial(count, n)) for n in (2, 1))
        except TooManyOperations:
            uncounted.append(name)
            continue
        if two is None or one is None:
            uncounted.append(name)
            continue
        each = float(two.bytes - one.bytes)  # what does not grow with the batch is no sample's
        most = max(most, Activations(each, two.workspace / 2, one.bytes - each), key=lambda found: found.of(1))
    return Activations(most.each, most.workspace, most.fixed, tuple(uncounted))
