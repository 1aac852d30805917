"""How a recipe draws: its sampler, its guidance, the sizes that its data have; and whether all of these fit each other.

What a family draws follows from its objective alone: one with a `predictor` is sampled from noise through the recipe's sampler and
guidance, one with `continued` draws tokens, one with `reconstruct` shows what the network makes of data.
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nexus_scale.config import registry
from nexus_scale.config.kinds import is_number
from nexus_scale.config.recipe import Component, Recipe
from nexus_scale.contracts import Objective, Rng, UserError
from nexus_scale.kernels import choice
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.processes.gaussian import TARGETS
from nexus_scale.rehearsal.batches import REHEARSED_SIZES, explained, networks_on_meta, one_of_each_bucket
from nexus_scale.samplers.guidance import guide_batched

log = logging.getLogger(__name__)

EMBEDDED = "guidance"
"""The constant of an objective by which a distilled network is told its guidance scale."""


# ------------------------------------------------------------------------------------------------- guidance


@dataclass(frozen=True)
class Guidance:
    """`scale`: of classifier-free guidance, two forwards a step unless it is 0 or 1. `channels`: how many of the first channels it is
    for; None: all. `embedded`: the scale that a distilled network is told instead; None: what its objective says."""

    scale: float = 1.0
    channels: int | None = None
    embedded: float | None = None

    @property
    def is_double(self) -> bool:
        """Whether a step costs two forwards."""
        return self.scale not in (0.0, 1.0)


def guidance_of(spec: float | Mapping[str, Any]) -> tuple[float, int | None]:
    """Scale, and how many of the first channels it is for (None: all), from `sample.guidance`: 4.0 or {scale: 4.0, channels: 3}.

    Raises:
        UserError: an unknown key, or a value that is no finite number.
    """
    values: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"scale": spec}
    scale, channels = values.pop("scale", 1.0), values.pop("channels", None)
    whole = channels is None or (isinstance(channels, int) and not isinstance(channels, bool) and channels >= 1)
    if values or not is_number(scale) or not whole:
        raise UserError(f"sample.guidance: got {spec!r}; expected a finite number, or {{scale: 4.0, channels: 3}}")
    return float(scale), channels


def embeds_guidance(objective: Objective) -> bool:
    """Whether the objective's network is told a guidance scale that it was distilled to obey."""
    return EMBEDDED in getattr(objective, "constants", {})


def chosen_guidance(
    recipe: Recipe, objective: Objective, guidance: float | None = None, true_guidance: float | None = None
) -> Guidance:
    """What is drawn with: the recipe's, or `guidance`, which a distilled network is told; `true_guidance` guides that by two forwards.

    Raises:
        UserError: not finite; of a network without conditions; true guidance of a network that is told none.
    """
    for name, value in (("guidance", guidance), ("true guidance", true_guidance)):
        if value is not None and not is_number(value):
            raise UserError(f"{name}: got {value}; expected a finite number, such as 4.0; 1 is none")
    assert recipe.sample is not None
    scale, channels = guidance_of(recipe.sample.arguments.get("guidance", 1.0))
    if embeds_guidance(objective):
        return Guidance(scale if true_guidance is None else true_guidance, channels, guidance)
    if true_guidance is not None:
        raise UserError(
            f"true guidance {true_guidance}: the network of recipe {recipe.name} is told no guidance scale, so all guidance is true; "
            f"give guidance {true_guidance}"
        )
    scale = scale if guidance is None else guidance
    if scale != 1 and not getattr(objective, "conditions", ()):
        raise UserError(
            f"guidance {scale}: the network of recipe {recipe.name} has no conditions to be guided by; leave it out"
        )
    return Guidance(scale, channels)


# ------------------------------------------------------------------------------------------------- drawing


def sampler_of(recipe: Recipe, steps: int | None = None) -> Any:
    """The recipe's sampler, with another number of steps where one is given.

    Raises:
        UserError: the recipe has none, or wrong arguments.
    """
    if recipe.sample is None:
        raise UserError(
            f"recipe {recipe.name} has no `sample:` section; add one, for example {{name: ode, steps: 25, guidance: 4.0}}"
        )
    arguments = {key: value for key, value in recipe.sample.arguments.items() if key != "guidance"}
    if steps is not None:
        arguments["steps"] = steps
    return _made(recipe.sample.name, arguments)


def _made(name: str, arguments: dict[str, Any]) -> Any:
    cls = registry.find("samplers", name)
    return registry.made(cls, registry.check_arguments(cls, arguments, "sample"), "sample")


def sample_latents(
    objective: Objective,
    nets: Mapping[str, Any],
    recipe: Recipe,
    cond: Mapping[str, Tensor],
    noise: Tensor,
    *,
    steps: int | None = None,
    guidance: Guidance | float | None = None,
    negative: Mapping[str, Tensor] | None = None,
    rng: Rng | None = None,
) -> Tensor:
    """From noise to data under guidance.

    Args:
        cond: conditions, each (B, ...).
        noise: x at t_max, (B, C, H, W) float32.
        steps, guidance: of the sampler; None takes the recipe's.
        negative: conditions to be guided away from, each (B, ...); None: the unconditional ones.
        rng: what samplers that add noise on the way draw it from.
    Returns:
        (B, C, H, W) float32 in model space.
    """
    sampler = sampler_of(recipe, steps)
    if not isinstance(guidance, Guidance):
        guidance = chosen_guidance(recipe, objective, guidance)
    family: Any = objective
    given = family.condition(cond)  # without what else a batch holds
    null = family.null_condition(given) if negative is None else family.condition(negative)
    if guidance.embedded is not None:
        given, null = (_told(one, guidance.embedded) for one in (given, null))
    return _walked(objective, nets, sampler, guidance, given, null, noise, rng)


def _walked(
    objective: Objective,
    nets: Mapping[str, Any],
    sampler: Any,
    guidance: Guidance,
    given: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    noise: Tensor,
    rng: Rng | None,
) -> Tensor:
    """The sampler's walk from noise to data, with what the objective predicts under `given` conditions, guided away from `null`."""
    family: Any = objective
    asked = {"variance": True} if getattr(sampler, "learns_variance", False) else {}
    denoise = guide_batched(
        lambda c: family.predictor(nets, c, **asked), given, null, guidance.scale, guidance.channels
    )
    draws = {"rng": rng} if getattr(sampler, "stochastic", False) else {}
    x0: Tensor = sampler.sample(denoise, noise, path=family.path, **draws)
    return x0


def _told(cond: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    return {**cond, EMBEDDED: torch.full_like(cond[EMBEDDED], scale)}


# ------------------------------------------------------------------------------------------------- sizes


def input_of(objective: Objective) -> str:
    """The field that holds the clean sample."""
    name: str = getattr(objective, "input", "moments")
    return name


def shape_in(fields: Mapping[str, Tensor], field: str) -> tuple[int, ...]:
    """(C, H, W) or (C, F, H, W) of what a network makes in the place of a batch's `field`: of moments half the channels; clips of many
    lengths, which have a mask, are stored with their frames first."""
    shape = tuple(fields[field].shape[1:])
    if f"{field}_mask" in fields:
        shape = (shape[1], shape[0], *shape[2:])
    return (shape[0] // 2 if field == "moments" else shape[0], *shape[1:])


@dataclass(frozen=True)
class Size:
    """Of samples that share a size: `shape` of one in model space, `fields` of one as a batch of its own, `samples` that have it."""

    shape: tuple[int, ...]
    fields: Mapping[str, Tensor]
    samples: int


def sizes_of(dataset: Any, field: str = "moments") -> list[Size]:
    """The sizes that the data have, the most frequent first, of equally frequent ones the largest."""
    sizes: dict[tuple[int, ...], Size] = {}
    for batch, count in one_of_each_bucket(dataset):
        fields = batch.on("cpu").fields
        shape = shape_in(fields, field)
        before = sizes.get(shape)
        sizes[shape] = Size(shape, fields, count if before is None else before.samples + count)
    return sorted(sizes.values(), key=lambda size: (-size.samples, -math.prod(size.shape)))


# ------------------------------------------------------------------------------------------------- what fits


def check_sampling(recipe: Recipe, objective: Objective, steps: int | None = None) -> None:
    """The recipe's sampler draws what the objective's network predicts, from the first time of its walk to the last. Walked with
    numbers and a network that answers zero, so that nothing is left to be found when samples are first drawn.

    Raises:
        UserError: it does not; names target, path and sampler, and what would fit.
    """
    if recipe.sample is None:
        return
    family: Any = objective
    takes = "denoise" if hasattr(family, "predictor") else "logits" if hasattr(family, "continued") else None
    if takes is None:
        log.warning("sample: is not used: objective %s shows what it makes of data", recipe.objective.name)
        return
    sampler = sampler_of(recipe, steps)
    fitting = [name for name in registry.names("samplers") if _takes(registry.find("samplers", name)) == takes]
    if recipe.sample.name not in fitting:
        raise UserError(
            f"sample.name: {recipe.sample.name} cannot draw for objective {recipe.objective.name}; expected {' or '.join(fitting)}"
        )
    if takes == "logits":
        if "guidance" in recipe.sample.arguments:
            raise UserError(f"sample.guidance: {recipe.sample.name} draws tokens without guidance; remove it")
        return
    guidance = chosen_guidance(recipe, objective)
    if (
        guidance.is_double
        and not _drops(objective)
        and not any("init_from" in spec for spec in recipe.networks.values())
    ):
        log.warning(
            "sample.guidance is %g and objective.condition_drop is 0: the network never learns to do without its conditions, and what it "
            "is guided away from means nothing; set condition_drop to 0.1, or guidance to 1",
            guidance.scale,
        )
    reason = _fault(objective, sampler, guidance)
    if reason is not None:
        raise UserError(
            f"sample: {_words(recipe.sample)} cannot draw with objective.target {family.target!r} on path {family.path}: {reason}\n"
            f"what fits: {_what_fits(objective, recipe.sample, sampler)}"
        )


def _drops(objective: Any) -> bool:
    """Whether training shows the network samples without conditions."""
    drop = getattr(objective, "condition_drop", 0.0)
    return any(drop.values()) if isinstance(drop, Mapping) else bool(drop)


def _takes(cls: type[Any]) -> str:
    """What a sampler is given: `denoise` or `logits`."""
    return list(inspect.signature(cls.sample).parameters)[1]


def _words(section: Component) -> str:
    return "{" + ", ".join([f"name: {section.name}", *(f"{k}: {v}" for k, v in section.arguments.items())]) + "}"


def _fault(objective: Any, sampler: Any, guidance: Guidance) -> str | None:
    """Why a walk fails; None where it does not."""
    positions = torch.arange(2)
    rng = ProgressRng(0, 0, "draw", positions, torch.device("cpu"))
    doubled = 2 if getattr(objective, "learns_variance", False) else 1

    def zero(x: Tensor, t: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return x.new_zeros(len(x), doubled * x.shape[1], *x.shape[2:])

    cond = {"given": torch.zeros(2, 1)}
    try:
        with torch.no_grad():
            noise = rng.normal("noise", (4, 16, 16))
            x0 = _walked(objective, {"model": zero}, sampler, guidance, cond, cond, noise, rng)
    except (UserError, ValueError, ArithmeticError, RuntimeError) as error:
        return str(error)
    return None if bool(x0.isfinite().all()) else "what is drawn is not finite"


TRIED: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("ode", {}),
    ("ode", {"spacing": "trailing"}),
    *(("ancestral", {"variance": v, "spacing": s}) for v in ("small", "none") for s in ("trailing", "leading")),
    ("dpm", {"spacing": "trailing"}),
    ("dpm", {"spacing": "leading"}),
)
"""Samplers that are offered where another does not fit."""


def _what_fits(objective: Any, section: Component, sampler: Any) -> str:
    steps = min(max(1, getattr(sampler, "steps", 25)), 25)
    samplers = [
        _words(Component.model_validate({"name": name, **arguments}))
        for name, arguments in TRIED
        if _fault(objective, _made(name, {"steps": steps, **arguments}), Guidance()) is None
    ]
    own = _made(
        section.name, {k: v for k, v in section.arguments.items() if k not in ("guidance", "steps")} | {"steps": steps}
    )
    targets = [target for target in TARGETS if target != objective.target and _with_target(objective, target, own)]
    offers = [f"sample: {' or '.join(samplers)}"] if samplers else []
    offers += [f"objective.target: {' or '.join(targets)} (another network: train it anew)"] if targets else []
    return "; ".join(offers) or "another path and target, such as rectified_flow with velocity"


def _with_target(objective: Any, target: str, sampler: Any) -> bool:
    """Whether the sampler would draw if the network predicted `target`."""
    before = objective.target
    try:
        objective.target = target
        return _fault(objective, sampler, Guidance()) is None
    finally:
        objective.target = before


def rehearse_drawing(
    recipe: Recipe, objective: Objective, dataset: Any, decode: Callable[[Tensor], Tensor] | None = None
) -> None:
    """One step of sampling in each size of the data on the meta device, and one decode of the first, with numbers that are none.

    Args:
        decode: latents (B, C, ...) to images; None: there is nothing that decodes.
    Raises:
        UserError: the network, its conditions, the sampler and the decoder do not fit; names the size.
    """
    if recipe.sample is None or not hasattr(objective, "predictor"):
        return
    nets = networks_on_meta(recipe)
    sizes = sizes_of(dataset, input_of(objective))[:REHEARSED_SIZES]
    for size in sizes:
        rehearse_size(recipe, objective, nets, size.fields, size.shape)
    if decode is not None:
        rehearse_decoding(decode, sizes[0].shape)


def rehearse_size(
    recipe: Recipe,
    objective: Objective,
    nets: Mapping[str, torch.nn.Module],
    fields: Mapping[str, Tensor],
    shape: tuple[int, ...],
    where: str = "sample",
) -> None:
    """One step of sampling of a size on the meta device, by networks that lie there.

    Args:
        fields: conditions of one sample.
        shape: of the sample.
    Raises:
        UserError: the network takes no such size, or not these conditions.
    """
    positions = torch.arange(1)
    cond = {name: value.to("meta") for name, value in fields.items()}
    rng = ProgressRng(recipe.seed, 0, "draw", positions, torch.device("meta"))
    with choice.plain(), torch.no_grad(), explained(f"{where}: a sample of {shape} cannot be drawn", objective, cond):
        sample_latents(objective, nets, recipe, cond, rng.normal("noise", shape), steps=1, rng=rng)


def rehearse_decoding(decode: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what a sample of `shape` is decoded to, (3, ...), found without computing it.

    Raises:
        UserError: the decoder takes no such sample.
    """
    try:
        with choice.plain(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return tuple(decode(mode.from_tensor(torch.zeros(1, *shape))).shape[1:])
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        raise UserError(f"data.encoders: a sample of {shape} cannot be decoded: {error}") from error
