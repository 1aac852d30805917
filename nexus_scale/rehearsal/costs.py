"""FLOPs and tokens of a sample, counted on the meta device."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch

from nexus_scale.config.recipe import Recipe, network_class
from nexus_scale.rehearsal import flops
from nexus_scale.rehearsal.meta import network_on_meta, refused

log = logging.getLogger(__name__)


def example_inputs(network: Any, recipe: Recipe, samples: int) -> tuple[Any, ...]:
    """Arguments of the network's forward for so many samples of the recipe's lengths, on the meta device."""
    text_tokens, lengths = _lengths(network, recipe)
    inputs: tuple[Any, ...] = network.example_inputs(samples, text_tokens, torch.device("meta"), **lengths)
    return inputs


def _lengths(network: Any, recipe: Recipe) -> tuple[int, dict[str, Any]]:
    """Text tokens of a sample, of CLIP's number where the recipe leaves it open; where it has several sequences, the length of each."""
    several = "lengths" in inspect.signature(network.example_inputs).parameters
    return recipe.data.text_tokens or 77, {"lengths": recipe.data.tokens} if several else {}


def costs(recipe: Recipe) -> dict[str, float]:
    """FLOPs of one sample's forward and backward (three forwards) through all networks that are trained, and its tokens, counted
    on the meta device; networks that give no example inputs, or take too long to count, count as nothing."""
    total, tokens = 0.0, 0.0
    for name, spec in recipe.trained().items():
        network: Any = network_on_meta(*network_class(spec), f"networks.{name}")
        if not hasattr(network, "example_inputs"):
            continue

        def forward(network: Any = network) -> int:
            return flops.count(network, *example_inputs(network, recipe, 1)).flops

        try:
            total += 3.0 * refused(f"networks.{name}: a sample cannot be computed", forward)
        except flops.TooManyOperations as error:
            log.warning("FLOPs of networks.%s count as none: a sample takes %s", name, error)
        if hasattr(network, "tokens"):  # one sample's tokens, however many networks read them
            text_tokens, lengths = _lengths(network, recipe)
            tokens = max(tokens, float(network.tokens(text_tokens, **lengths)))
    return {"flops_per_sample": total, "tokens_per_sample": tokens}
