"""Frozen networks whose linear layers hold their weights in 8 bits: `bits: 8` of an entry of `networks`, by torchao, for one small GPU.

Each row is whole numbers from -127 to 127 times a scale of its own; products are taken in the precision that computes, to which the weight
is brought layer by layer, and gradients flow through to inputs. Adapters stand on such a layer as on any.

Source: Dettmers et al. 2022, "LLM.int8()", section 2, without its outliers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nexus_scale.contracts import Network, UserError

WITHOUT = "pip install 'nexus-scale[eight-bits]', or leave bits out"


def library() -> Any:
    """torchao's module of quantisation.

    Raises:
        UserError: it is not installed.
    """
    try:
        from torchao import quantization
    except ImportError:
        raise UserError(f"networks.<name>.bits: 8 needs torchao, which is not installed; {WITHOUT}") from None
    return quantization


def check(bits_of: Mapping[str, int | None], ranks: int, sharding: bool) -> None:
    """Checks, before anything starts, that networks can be held in 8 bits where they ask for it.

    Args:
        bits_of: frozen networks' `bits` by name.
        sharding: ZeRO-3 shards weights where there are several ranks.
    Raises:
        UserError: they are sharded, or torchao is not installed; names the network.
    """
    for name in (name for name, bits in bits_of.items() if bits):
        if sharding and ranks > 1:
            raise UserError(
                f"networks.{name}.bits: 8 on {ranks} ranks, over which ZeRO-3 shards weights; in 8 bits it cannot: set cluster.engine to "
                "replicated, train on one rank, or leave bits out"
            )
        library()


def layers_of(network: Network) -> dict[str, nn.Linear]:
    """The layers that are held in 8 bits: linear ones of the repeated blocks, where nearly all weights lie."""
    inside = {id(part) for block in network.blocks() for part in block.modules()}
    named = network.named_modules()
    return {name: module for name, module in named if isinstance(module, nn.Linear) and id(module) in inside}


def quantised(weight: Tensor) -> nn.Parameter:
    """A weight (N, K) in 8 bits, which computes as one of its own precision."""
    ao = library()
    holder = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    holder.weight = nn.Parameter(weight, requires_grad=False)
    ao.quantize_(holder, ao.Int8WeightOnlyConfig(set_inductor_config=False))
    return holder.weight


@torch.no_grad()
def hold_in_eight_bits(network: Network, device: torch.device, dtype: torch.dtype) -> None:
    """Brings a network's weights to 8 bits on the device, layer by layer, so that it never lies there whole in more; in place.

    Raises:
        UserError: it has no linear layers in blocks.
    """
    layers = layers_of(network)
    if not layers:
        raise UserError(f"bits: 8 of {type(network).__name__}: it has no linear layers in blocks; leave bits out")
    for layer in layers.values():
        layer.weight = quantised(layer.weight.detach().to(device, dtype))
    eight = {id(layer.weight) for layer in layers.values()}
    for parameter in network.parameters():
        if id(parameter) not in eight:
            parameter.data = parameter.data.to(device, dtype)
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
