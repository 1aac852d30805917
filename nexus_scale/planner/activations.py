"""What a network keeps for its backward pass, counted on the meta device, which computes and allocates nothing."""

from __future__ import annotations

from collections import Counter
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
from nexus_scale.planner.fused import Traces, as_compiled
from nexus_scale.planner.live import peak_of_passes
from nexus_scale.planner.memory import Precision
from nexus_scale.rehearsal.costs import example_inputs
from nexus_scale.rehearsal.flops import MOST_OPERATIONS, Bounded, TooManyOperations
from nexus_scale.rehearsal.meta import network_on_meta, refused

FEW, MANY = 4, 8
"""Samples of the two passes that are counted: their difference is what a sample takes. With fewer, gradients of weights may take more."""

PASSES = 4
"""Forward passes that counting takes the time of: two, and a backward pass."""


@dataclass(frozen=True)
class Kept:
    """`bytes`: what one forward pass keeps for its backward pass. `workspace`: what lives at once beside it while a block is
    differentiated."""

    bytes: int
    workspace: int


class SavedBytes:
    """Sums the storages that autograd saves, each once, without those of `excluded` tensors."""

    def __init__(self, excluded: Sequence[Tensor]):
        self._seen = {tensor.untyped_storage()._cdata for tensor in excluded}
        self._alive: list[Tensor] = []  # a freed storage would give its identity to another
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


class Blocks:
    """What each block keeps, and what it is given, while a counter counts."""

    def __init__(self, counter: SavedBytes):
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

    def with_recomputation(self) -> int:
        """Bytes kept where blocks that were watched keep their inputs alone, and one at a time is computed again."""
        return self._counter.bytes - sum(self.within) + self.inputs + max(self.within, default=0)

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
    traces: Traces | None = None,
    workspace: bool = True,
) -> Kept:
    """Bytes that one forward pass keeps for its backward pass, and what lives beside them.

    Args:
        network: on the meta device, in the precision of the computation.
        args, kwargs: of its `forward`, on the meta device.
        checkpointing: whether blocks keep only their inputs, and one block at a time is computed again.
        traces: where blocks are compiled, which makes them keep fewer tensors and compute cheap ones again; holds what was traced.
        workspace: whether what lives beside it is counted, too, which takes a backward pass; otherwise it is 0.
    """
    counter = SavedBytes([*network.parameters(), *network.buffers()])
    blocks = Blocks(counter)
    with ExitStack() as within:
        calls = Counter[Any]() if traces is None else within.enter_context(as_compiled(network.blocks(), traces))
        if checkpointing:
            within.enter_context(blocks.watched(network.blocks()))
        within.enter_context(choice.plain())
        within.enter_context(torch.enable_grad())
        within.enter_context(FusedAttention())
        within.enter_context(torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor))
        network.train()(*args, **(kwargs or {}))
    total = blocks.with_recomputation()
    if traces is not None:
        return Kept(total, max((one.workspace for key in calls for one in traces[key].kernels), default=0))
    if not workspace:
        return Kept(total, 0)
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    with choice.plain(), FusedAttention():
        peak = peak_of_passes(network, partial(network, *args, **(kwargs or {})), given)
    return Kept(total, max(0, peak - counter.bytes))


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
    recipe: Recipe, *, precision: Precision, checkpointing: bool = False, traces: Traces | None = None
) -> Activations:
    """What one micro-batch takes: that of the network that needs most, as one learns at a time. `traces`: see `kept`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    most, uncounted = Activations(), []
    for name, spec in recipe.trained().items():
        made = network_on_meta(*network_class(spec), f"networks.{name}")
        place(made, torch.device("meta"), dtype)

        def count(samples: int, within: Traces | None = None, network: Network = made) -> Kept | None:
            inputs = example_inputs(network, recipe, samples)
            if inputs is None:
                return None
            with Bounded(PASSES * MOST_OPERATIONS):
                return kept(
                    network,
                    cast(inputs, dtype, min_dims=2),
                    checkpointing=checkpointing,
                    traces=within,
                    workspace=traces is None,
                )

        def counted(samples: int, within: Traces | None = None, count: Any = count, name: str = name) -> Kept | None:
            found: Kept | None = refused(
                f"networks.{name}: a sample cannot be computed", lambda: count(samples, within)
            )
            return found

        try:
            many, few = counted(MANY), counted(FEW)
            compiled = None if traces is None or few is None else counted(FEW, traces)
        except TooManyOperations:
            many = few = None
        if many is None or few is None:
            uncounted.append(name)
            continue
        most = max(most, of_samples(many, few, compiled), key=lambda found: found.of(MANY))
    return Activations(most.each, most.workspace, most.fixed, tuple(uncounted))


def of_samples(many: Kept, few: Kept, compiled: Kept | None) -> Activations:
    """What does not grow with the batch is no sample's. Compiled blocks keep as much of that as others, and are traced for one batch."""
    each, workspace = (
        max(0.0, (big - little) / (MANY - FEW))
        for big, little in ((many.bytes, few.bytes), (many.workspace, few.workspace))
    )
    fixed = few.bytes - FEW * each
    if compiled is not None:
        return Activations((compiled.bytes - fixed) / FEW, compiled.workspace / FEW, fixed)
    return Activations(each, workspace, fixed + few.workspace - FEW * workspace)
