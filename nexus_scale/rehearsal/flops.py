"""What a callable costs, counted on the meta device: nothing is computed and no memory is taken.

Multiplications and additions of matrix products, convolutions and attention count, two FLOPs for each pair, by torch's
own counter; norms and activations do not, as is the custom for model FLOP/s. On meta, attention is counted in its plain form,
whichever kernel serves it on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

MOST_OPERATIONS = 12_000
"""Of one call: some seconds of counting. SD3's 8 B take some 3,000; recurrent networks take each of their steps by itself."""


class TooManyOperations(Exception):
    """What is counted goes on for too long."""


class Bounded(TorchDispatchMode):
    """Within it no more than `most` operations are done.

    Raises:
        TooManyOperations: from the operation after them.
    """

    def __init__(self, most: int = MOST_OPERATIONS) -> None:
        super().__init__()
        self.most, self.operations = most, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        if self.operations > self.most:
            raise TooManyOperations(f"more than {self.most:,} operations")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class FlopCount:
    """`flops`: floating-point operations. `bytes`: what the operations read and wrote, each by itself: the traffic to
    memory if nothing is fused and nothing is cached, an upper bound."""

    flops: int
    bytes: int


class _ByteCounter(TorchDispatchMode):
    """Sums the sizes of all operands and results, views left out: they move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return result


def _meta(tensor: Tensor) -> Tensor:
    moved = tensor.detach().to("meta")
    return moved.requires_grad_(tensor.requires_grad)


def count(fn: Callable[..., Any], *args: Any, backward: bool = False) -> FlopCount:
    """FLOPs and bytes of `fn(*args)`.

    Args:
        fn: an nn.Module on any device (its parameters are replaced by meta ones for the call), or a callable whose tensors
            all come from `args` or lie on the meta device.
        args: tensors, mappings and lists of them, or anything else; tensors are taken to the meta device.
        backward: also the backward pass, from the sum of all floating-point results.
    Raises:
        ValueError: `backward` where no result depends on something that requires a gradient.
        TooManyOperations: see MOST_OPERATIONS.
    """
    moved = tree_map_only(Tensor, _meta, args)
    state: dict[str, Tensor] = {}
    if isinstance(fn, nn.Module):
        state = {name: _meta(tensor) for name, tensor in [*fn.named_parameters(), *fn.named_buffers()]}
    byte_counter = _ByteCounter()
    with FlopCounterMode(display=False) as flop_counter, byte_counter, Bounded(), torch.set_grad_enabled(backward):
        result = torch.func.functional_call(fn, state, moved) if isinstance(fn, nn.Module) else fn(*moved)
        if backward:
            roots = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.requires_grad]
            if not roots:
                raise ValueError(
                    "backward was asked for, but no result requires a gradient: give parameters or inputs that do"
                )
            torch.autograd.backward(roots, [torch.empty_like(root) for root in roots])
    return FlopCount(flops=flop_counter.get_total_flops(), bytes=byte_counter.bytes)
