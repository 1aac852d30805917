"""What a forward and a backward pass of a network are made of: products, attention, bytes of element-wise kernels, launches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from nexus_scale.config.recipe import Recipe, network_class
from nexus_scale.contracts import Network
from nexus_scale.engine.networks import cast, place
from nexus_scale.kernels import choice
from nexus_scale.planner.activations import FEW, PASSES
from nexus_scale.planner.attention import AttentionCall, FusedAttention
from nexus_scale.planner.fused import KERNELS_OF_THEIR_OWN, Traces, as_compiled
from nexus_scale.planner.memory import Precision
from nexus_scale.rehearsal.costs import example_inputs
from nexus_scale.rehearsal.flops import MOST_OPERATIONS, Bounded, TooManyOperations
from nexus_scale.rehearsal.meta import network_on_meta, refused

COUNTED = FEW
"""Samples that are counted at once; one alone would leave out what broadcasting costs."""


@dataclass(frozen=True)
class Work:
    """The work of one sample through one network.

    Attributes:
        products: FLOPs of matrix products and convolutions, forward.
        attention: calls, forward, and how often each is made for a sample.
        forward_bytes, backward_bytes: what element-wise kernels read and write.
        forward_kernels, backward_kernels: launches of a whole micro-batch's pass, whatever its size.
        blocks: how many blocks the network has.
    """

    products: float
    attention: Mapping[AttentionCall, float]
    forward_bytes: float
    backward_bytes: float
    forward_kernels: int
    backward_kernels: int
    blocks: int

    @property
    def flops(self) -> float:
        """FLOPs of the forward pass."""
        return self.products + sum(call.flops * times for call, times in self.attention.items())


class _Launches(TorchDispatchMode):
    """Counts operations that launch a kernel, and the bytes of those that are neither products nor attention."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.count += 1
            if func.overloadpacket.__name__ not in KERNELS_OF_THEIR_OWN:
                tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
                self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def work_of(network: Network, inputs: tuple[Any, ...], *, traces: Traces | None = None) -> Work:
    """The work of one sample through a network on the meta device, which is given COUNTED of them. `traces`: see `kept`.

    Of what lies outside of compiled blocks the backward pass is counted as twice the forward.
    """
    launches, back = _Launches(), _Launches()
    with choice.plain(), FusedAttention() as attention, FlopCounterMode(display=False) as flops, torch.no_grad():
        network.train()(*inputs)
    calls: Counter[Any] = Counter()
    if traces is None:
        with choice.plain(), torch.enable_grad(), FusedAttention():
            with launches:
                result = network(*inputs)
            roots = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
            with back:
                torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])
        network.zero_grad(set_to_none=True)
    else:
        with (
            choice.plain(),
            torch.enable_grad(),
            FusedAttention(),
            as_compiled(network.blocks(), traces) as calls,
            launches,
        ):
            network.train()(*inputs)
    within = [traces[key].kernels for key in calls.elements() if traces[key].kernels] if traces is not None else []
    forward, backward = [kernels[0] for kernels in within], [kernels[1] for kernels in within]
    return Work(
        products=flops.get_total_flops() / COUNTED,
        attention={call: times / COUNTED for call, times in Counter(attention.calls).items()},
        forward_bytes=(launches.bytes + sum(one.bytes for one in forward)) / COUNTED,
        backward_bytes=((2 * launches.bytes if traces is not None else back.bytes) + sum(one.bytes for one in backward))
        / COUNTED,
        forward_kernels=launches.count + sum(one.count for one in forward),
        backward_kernels=(2 * launches.count if traces is not None else back.count)
        + sum(one.count for one in backward),
        blocks=len(network.blocks()),
    )


def work_in(recipe: Recipe, *, precision: Precision, traces: Traces | None = None) -> dict[str, Work]:
    """The work of each network that is trained, by its name; without those that give no example inputs or take too long to count."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found = {}
    for name, spec in recipe.trained().items():
        network = network_on_meta(*network_class(spec), f"networks.{name}")
        place(network, torch.device("meta"), dtype)

        def count(network: Network = network) -> Work | None:
            inputs = example_inputs(network, recipe, COUNTED)
            if inputs is None:
                return None
            with Bounded(PASSES * MOST_OPERATIONS):
                return work_of(network, cast(inputs, dtype, min_dims=2), traces=traces)

        try:
            counted = refused(f"networks.{name}: a sample cannot be computed", partial(count))
        except TooManyOperations:
            continue
        if counted is not None:
            found[name] = counted
    return found
