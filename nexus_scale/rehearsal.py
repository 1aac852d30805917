"""What a recipe and its data are tried for before a run starts: numbers that have an embedding, and shapes, on the meta device."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from nexus_scale.contracts import Objective, UserError
from nexus_scale.flops import TooManyOperations
from nexus_scale.recipe import Recipe, network_class
from nexus_scale.registry import made

log = logging.getLogger(__name__)


def maker(spec: Mapping[str, Any]) -> Callable[[], torch.nn.Module]:
    """What makes the network that an entry of `networks` describes."""
    cls, arguments = network_class(spec)

    def make() -> torch.nn.Module:
        network: torch.nn.Module = made(cls, arguments, spec["name"])
        return network

    return make


BOUNDS = {"label": "num_classes", "phonemes": "num_phonemes", "codes": "codebook_size"}
"""Fields of whole numbers, and the constructor's argument of the networks that says below what they stay."""

LOOKED_AT, LOOKED_AT_BYTES = 4096, 64 << 20
"""Samples whose whole numbers are looked at before a run starts, at most (of smaller data all), and bytes that are read for them."""


def check_numbers(recipe: Recipe, objective: Objective, dataset: Any) -> None:
    """Labels, phonemes and codes are numbers that the networks have an embedding of.

    Raises:
        UserError: names the field, the number and the network's argument.
    """
    read = {*objective.fields, *getattr(objective, "conditions", ())}
    bounds: dict[str, tuple[int, str]] = {}
    for role, spec in recipe.trained().items():
        cls, arguments = network_class(spec)
        for field, argument in BOUNDS.items():
            parameter = inspect.signature(cls.__init__).parameters.get(argument)
            if parameter is not None and field in read and field in dataset.fields:
                own = (int(arguments.get(argument, parameter.default)), f"networks.{role}.{argument}")
                bounds[field] = min(bounds.get(field, own), own)
    if not bounds:
        return
    numbers = dataset.only(list(bounds))
    for batch in numbers.fixed(min(_affordable(numbers), numbers.samples), batch=256):
        for field, (bound, argument) in bounds.items():
            values = batch[field]
            least, most = int(values.min()), int(values.max())
            if least < 0 or most >= bound:
                wrong = least if least < 0 else most
                raise UserError(
                    f"data: field {field!r} has the number {wrong}, and {argument} is {bound}: expected 0 to {bound - 1}; raise "
                    f"{argument}, or correct the data",
                    code=3,
                )


def _affordable(dataset: Any) -> int:
    """How many samples may be looked at: a sample is checked whole, and of a store whole shards are fetched for it."""
    used = [joined[part.folder] for joined in getattr(dataset, "sources", ()) for part in dataset.parts]
    if any(manifest.store is not None for manifest in used):
        return 2
    largest = max((sum(shard.bytes for shard in m.shards) // m.samples for m in used), default=1)
    return max(64, min(LOOKED_AT, LOOKED_AT_BYTES // max(1, largest)))


@contextlib.contextmanager
def explained(what: str, objective: Objective, fields: Mapping[str, torch.Tensor]) -> Iterator[list[Exception]]:
    """A rehearsal on the meta device: what fails within it becomes a user's mistake. What asks for a value, which is not there, cuts
    it short without one: then the list that comes back is not empty.

    Raises:
        UserError: `what`, the shapes of the fields, and why.
    """
    shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in fields.items())
    cut_short: list[Exception] = []
    try:
        yield cut_short
    except UserError:
        raise
    except KeyError as error:
        given = list(getattr(objective, "conditions", fields))
        raise UserError(
            f"{what} ({shapes}): the network reads {error}, which it is not given; objective.conditions are {given}: add it there "
            "and to the data, or choose a network that does without"
        ) from error
    except Exception as error:
        if (
            isinstance(error, TooManyOperations) or "meta" in str(error).lower()
        ):  # it goes on for long, or asked for a value
            log.debug("%s: not rehearsed to its end: %s", what, error)
            cut_short.append(error)
            return
        raise UserError(f"{what} ({shapes}): {error or type(error).__name__}") from error
