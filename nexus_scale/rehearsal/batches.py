"""What a recipe and its data are tried for before a run starts: numbers that have an embedding, and shapes, on the meta device."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nexus_scale.config import recipe as recipes
from nexus_scale.config.recipe import Recipe, network_class
from nexus_scale.config.registry import made
from nexus_scale.contracts import Batch, Network, Objective, Phase, UserError
from nexus_scale.data.order import Draw
from nexus_scale.engine.settings import NetSpec
from nexus_scale.kernels import choice
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.rehearsal.flops import TooManyOperations

log = logging.getLogger(__name__)


def maker(
    spec: recipes.Network | recipes.Frozen | recipes.Adapter, *, differentiated_twice: bool = False
) -> Callable[[], Network]:
    """What makes the network that an entry of `networks` describes."""
    cls, arguments = network_class(spec)

    def make() -> Network:
        network: Network = made(cls, arguments, spec.name)
        network.differentiated_twice = differentiated_twice
        return network

    return make


def specs_of(recipe: Recipe, objective: Objective) -> dict[str, NetSpec]:
    """What an engine builds of the recipe's networks, by name."""
    return {
        name: NetSpec(
            make=maker(network, differentiated_twice=name in objective.needs_whole),
            optimizer=None if isinstance(network, recipes.Frozen) else network.optimizer or recipe.optimizer,
            frozen=isinstance(network, recipes.Frozen),
            sharded=network.engine == "sharded",
            adapts=network.adapts if isinstance(network, recipes.Adapter) else "",
            bits=network.bits if isinstance(network, recipes.Frozen) else None,
        )
        for name, network in recipe.built().items()
    }


def networks_on_meta(recipe: Recipe, objective: Objective) -> dict[str, Network]:
    """The recipe's networks by name on the meta device, and of its averages those that are called."""
    with torch.device("meta"):
        nets = {name: maker(network)() for name, network in recipe.built().items()}
        for name, average in recipe.averages().items():
            if name in recipe.called(objective.needs):
                nets[name] = maker(recipe.trained()[average.average_of])().requires_grad_(False).eval()
    return nets


BOUNDS = {"label": "num_classes", "phonemes": "num_phonemes", "codes": "codebook_size"}
"""Fields of whole numbers, and the constructor's argument of the networks that says below what they stay."""

LOOKED_AT, LOOKED_AT_BYTES = 4096, 64 << 20
"""Samples whose whole numbers are looked at before a run starts, at most (of smaller data all), and bytes that are read for them."""


def check_numbers(recipe: Recipe, objective: Objective, dataset: Any) -> None:
    """Labels, phonemes and codes are numbers that the networks have an embedding of.

    Raises:
        UserError: names the field, the number and the network's argument.
    """
    read = {*objective.fields, *(objective.draws.conditions if objective.draws else ())}
    bounds: dict[str, tuple[int, str]] = {}
    for role, spec in recipe.trained().items():
        cls, arguments = network_class(spec)
        for field, argument in BOUNDS.items():
            parameter = inspect.signature(cls.__init__).parameters.get(argument)
            if parameter is not None and field in read and field in dataset.fields:
                bound = int(arguments.get(argument, parameter.default))
                if bound != getattr(objective, argument, bound):
                    continue  # it reads other numbers, as a network of durations does: the objective knows them apart
                own = (bound, f"networks.{role}.{argument}")
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


def check_together(recipe: Recipe, objective: Objective, dataset: Any) -> None:
    """What an objective itself knows of fields and networks that must go together.

    Raises:
        UserError: why they do not.
    """
    # made-up fields have lengths of their own each
    real = recipe.data.synthetic is None
    batch = next(iter(dataset.fixed(min(64, dataset.samples), batch=64))).on("cpu") if real else None
    if why := objective.mismatch(networks_on_meta(recipe, objective), batch):
        raise UserError(f"objective {recipe.objective.name} cannot learn from these data: {why}", code=3)


def _affordable(dataset: Any) -> int:
    """How many samples may be looked at: a sample is checked whole, and of a store whole shards are fetched for it."""
    used = [joined[part.folder] for joined in dataset.sources for part in dataset.parts]
    if any(manifest.store is not None for manifest in used):
        return 2
    largest = max((sum(shard.bytes for shard in m.shards) // m.samples for m in used), default=1)
    return max(64, min(LOOKED_AT, LOOKED_AT_BYTES // max(1, largest)))


def one_of_each_bucket(dataset: Any) -> Iterator[tuple[Batch, int]]:
    """A sample of each bucket of each source as a batch of its own, and how many samples the bucket has there."""
    reader, nothing = dataset.reader(), np.zeros(0, np.int64)
    try:
        for source, stock in enumerate(dataset.stocks):
            buckets, first, counts = np.unique(stock.bucket, return_index=True, return_counts=True)
            for bucket, number, count in zip(buckets.tolist(), first.tolist(), counts.tolist(), strict=True):
                order = Draw(dataset.buckets[bucket], np.array([source]), np.array([number]), (), nothing)
                fields, taken = reader.read(order, np.array([0]))
                place = torch.zeros(1, dtype=torch.int64)
                yield Batch(fields, place, torch.from_numpy(taken), bucket=dataset.buckets[bucket]), count
    finally:
        reader.close()


REHEARSED, REHEARSED_SIZES = 2, 32
"""Samples of a rehearsal; and sizes that are tried beside, at most."""


def batches_to_rehearse(dataset: Any) -> list[Batch]:
    """The first samples of the data, and one of each other size that they have."""
    batches = [next(iter(dataset.fixed(min(REHEARSED, dataset.samples), batch=REHEARSED)))]
    if len(dataset.buckets) > 1:
        seen = {_shapes(batches[0])}
        for batch, _ in one_of_each_bucket(dataset):
            if _shapes(batch) not in seen and len(batches) <= REHEARSED_SIZES:
                seen.add(_shapes(batch))
                batches.append(batch)
    return batches


def _shapes(batch: Batch) -> tuple[Any, ...]:
    return tuple(sorted((name, tuple(value.shape[1:])) for name, value in batch.fields.items()))


def phases_to_check(objective: Objective, steps: int) -> Iterator[tuple[int, Sequence[Phase]]]:
    """Steps of a run and their phases: of the steps 0, the powers of two and the last those that have a phase which none before had. So
    what begins later is checked before anything starts, and nothing twice."""
    asked = {0, *(1 << power for power in range(steps.bit_length()) if 1 << power < steps), max(0, steps - 1)}
    seen: list[Phase] = []
    for step in sorted(asked):
        phases = objective.phases(step)
        if any(phase not in seen for phase in phases):
            seen += phases
            yield step, phases


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
        given = list(objective.draws.conditions if objective.draws else fields)
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


def rehearse_validation(recipe: Recipe, objective: Objective, held_out: Any) -> None:
    """The objective's validation on the meta device, in each size that the held-out data have.

    Raises:
        UserError: they lack what it reads, or do not fit the networks.
    """
    # what is mirrored is read in training alone
    missing = [name for name in objective.fields if name not in held_out.fields and not name.endswith("_mirrored")]
    if missing:
        raise UserError(
            f"data.validation: objective {recipe.objective.name} reads {missing}, which these data lack; they have "
            f"{sorted(held_out.fields)}",
            code=3,
        )
    check_numbers(recipe, objective, held_out)
    check_together(recipe, objective, held_out)
    nets = networks_on_meta(recipe, objective)
    for batch in batches_to_rehearse(held_out):
        given = batch.on("meta")
        rng = ProgressRng(recipe.seed, 0, "validate", batch.positions, torch.device("meta"))
        what = f"data.validation: objective {recipe.objective.name} cannot validate on these data"
        with choice.plain(), torch.no_grad(), explained(what, objective, given.fields):
            objective.validate(nets, given, rng)
