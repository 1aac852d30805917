"""Memory that a network keeps for its backward pass, counted on the meta device, which computes and allocates nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from nexus_scale.config.recipe import Recipe, network_class
from nexus_scale.contracts import Network
from nexus_scale.engine.networks import cast, place
from nexus_scale.kernels import choice
from nexus_scale.planner.memory import Precision
from nexus_scale.rehearsal.costs import example_inputs
from nexus_scale.rehearsal.flops import Bounded, TooManyOperations
from nexus_scale.rehearsal.meta import network_on_meta, refused


class _FlashAttention(torch.autograd.Function):
    """Saves what fused attention saves: queries, keys, values, the result and a log-sum per row, but no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("counted, never computed")


class _FusedAttention(TorchFunctionMode):
    """Counts scaled dot-product attention as fused; on the meta device torch takes the plain form, which keeps all scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            q, k, v = args[:3]
            return _FlashAttention.apply(q, k, v)
        return func(*args, **(kwargs or {}))


class _Counter:
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


def saved_bytes(
    network: Network, args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, checkpointing: bool = False
) -> int:
    """Bytes that one forward pass keeps for its backward pass.

    Args:
        network: on the meta device, in the precision of the computation.
        args, kwargs: of its `forward`, on the meta device.
        checkpointing: whether blocks keep only their inputs, and one block at a time is recomputed.
    """
    counter = _Counter([*network.parameters(), *network.buffers()])
    within: list[int] = []  # bytes that each block keeps
    inputs = 0
    hooks = []
    for block in network.blocks() if checkpointing else ():

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal inputs
            given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
            inputs += sum(leaf.numel() * leaf.element_size() for leaf in given)
            within.append(-counter.bytes)

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            within[-1] += counter.bytes

        hooks += [
            block.register_forward_pre_hook(before, with_kwargs=True),
            block.register_forward_hook(after, with_kwargs=True),
        ]
    try:
        with (
            choice.plain(),
            torch.enable_grad(),
            _FusedAttention(),
            torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor),
        ):
            network.train()(*args, **(kwargs or {}))
    finally:
        for hook in hooks:
            hook.remove()
    return counter.bytes - sum(within) + inputs + max(within, default=0)


def activations_per_sample(
    recipe: Recipe, *, precision: Precision, checkpointing: bool = False
) -> tuple[float, list[str]]:
    """Bytes that one sample's forward pass keeps for its backward pass: those of the largest network, as one learns at a time.

    Returns:
        Bytes, and the names of networks that are not counted, because they offer no `example_inputs` or take too many operations.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    most, uncounted = 0.0, []
    for name, spec in recipe.trained().items():
        made = network_on_meta(*network_class(spec), f"networks.{name}")
        place(made, torch.device("meta"), dtype)

        def kept(samples: int, network: Network = made) -> int | None:
            inputs = example_inputs(network, recipe, samples)
            if inputs is None:
                return None
            with Bounded():
                return saved_bytes(network, cast(inputs, dtype, min_dims=2), checkpointing=checkpointing)

        try:
            two, one = (refused(f"networks.{name}: a sample cannot be computed", partial(kept, n)) for n in (2, 1))
        except TooManyOperations:
            uncounted.append(name)
            continue
        if two is None or one is None:
            uncounted.append(name)
            continue
        most = max(most, float(two - one))  # what does not grow with the batch is no sample's
    return most, uncounted
