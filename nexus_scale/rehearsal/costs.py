"""FLOPs and tokens of a sample, counted on the meta device."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from nexus_scale.config.recipe import Recipe, network_class
from nexus_scale.contracts import Network
from nexus_scale.rehearsal import flops
from nexus_scale.rehearsal.meta import network_on_meta, refused

log = logging.getLogger(__name__)


def example_inputs(network: Network, recipe: Recipe, samples: int, device: str = "meta") -> tuple[Any, ...] | None:
    """Arguments of the network's forward for so many samples of the recipe's lengths; None where it gives none."""
    return network.example_inputs(samples, _text_tokens(recipe), torch.device(device), recipe.data.tokens)


def _text_tokens(recipe: Recipe) -> int:
    """Of a sample; CLIP's number where the recipe leaves it open."""
    return recipe.data.text_tokens or 77


def costs(recipe: Recipe) -> dict[str, float]:
    """FLOPs of one sample's forward and backward (three forwards) through all networks that are trained, and its tokens, counted
    on the meta device; networks that give no example inputs, or take too long to count, count as nothing."""
    total, tokens = 0.0, 0.0
    for name, spec in recipe.trained().items():
        network = network_on_meta(*network_class(spec), f"networks.{name}")
        inputs = refused(f"networks.{name}: a sample cannot be computed", partial(example_inputs, network, recipe, 1))
        if inputs is None:
            continue
        try:
            counted = refused(f"networks.{name}: a sample cannot be computed", partial(flops.count, network, *inputs))
            total += 3.0 * counted.flops
        except flops.TooManyOperations as error:
            log.warning("FLOPs of networks.%s count as none: a sample takes %s", name, error)
        # one sample's tokens, however many networks read them
        tokens = max(tokens, float(network.tokens(_text_tokens(recipe), recipe.data.tokens) or 0))
    return {"flops_per_sample": total, "tokens_per_sample": tokens}
