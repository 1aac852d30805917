"""A recipe's sampler, guidance and sample sizes, and whether they fit the network."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nexus_scale.config import registry
from nexus_scale.config.kinds import is_number, shown
from nexus_scale.config.recipe import Component, Recipe, overrides_of
from nexus_scale.contracts import OF_LATENTS, Cond, Draws, Guidance, Objective, Request, Sampler, UserError, Word
from nexus_scale.interop.scheduler_folders import scheduler_at
from nexus_scale.kernels import choice
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.processes.paths import find_path
from nexus_scale.rehearsal.batches import REHEARSED_SIZES, explained, networks_on_meta, one_of_each_bucket

log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------- guidance


def guidance_of(spec: float | Mapping[str, Any], where: str = "sample.guidance") -> Guidance:
    """The guidance that is asked for: 4.0, or {scale: 4.0, channels: 3, interval: [0.2, 0.8], rescale: 0.7, by: weak}.

    Raises:
        UserError: an unknown key, or a value that is no finite number.
    """
    values: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"scale": spec}
    scale, channels, interval, rescale, by, image = (values.pop(name, default) for name, default in _GUIDANCE.items())
    whole = channels is None or (isinstance(channels, int) and not isinstance(channels, bool) and channels >= 1)
    if values or not is_number(scale) or not is_number(image) or not whole:
        raise UserError(
            f"{where}: got {spec!r}; expected a finite number, or {{scale: 4.0, channels: 3, interval: [0.2, 0.8]}} and what else of "
            f"{list(_GUIDANCE)}"
        )
    if not is_number(rescale) or not 0 <= rescale <= 1:
        raise UserError(f"{where}.rescale: got {rescale!r}; expected a share from 0 to 1, such as 0.7")
    if not isinstance(by, str):
        raise UserError(f"{where}.by: got {by!r}; expected the name of an average or of a frozen network")
    between = None if interval is None else _interval(interval, where)
    return Guidance(float(scale), channels, between, float(rescale), by, image=float(image))


_GUIDANCE: Mapping[str, Any] = {
    "scale": 1.0,
    "channels": None,
    "interval": None,
    "rescale": 0.0,
    "by": "",
    "image": 1.0,
}


def guidance_named(text: str, option: str = "--guidance") -> float | dict[str, Any]:
    """Guidance as the command line has it: `4.0`, or settings that change the recipe's, `scale=4,interval=[0.2,0.8],by=weak`.

    Raises:
        UserError: neither a number nor settings of guidance; a scale beyond 1000.
    """
    try:
        value: float | dict[str, Any] = float(text)
    except ValueError:
        value, others = overrides_of(_pairs(text)) if "=" in text else ({}, {"": text})
        if others or not value or "name" in value:
            raise UserError(
                f"{option} {shown(text)}: expected a number, such as 4.0, or settings such as scale=4,interval=[0.2,0.8]"
            ) from None
    scale = guidance_of(value, option).scale
    if abs(scale) > 1000:
        raise UserError(f"{option} {shown(text)}: expected a scale from -1000 to 1000")
    return value


def _interval(given: Any, where: str) -> tuple[float, float]:
    pair = list(given) if isinstance(given, list | tuple) else []
    if len(pair) != 2 or not all(map(is_number, pair)) or not 0 <= pair[0] < pair[1]:
        raise UserError(
            f"{where}.interval: got {given!r}; expected [low, high], times with 0 <= low < high between which samples are guided, "
            "such as [0.2, 0.8] (on EDM's path, sigmas)"
        )
    return float(pair[0]), float(pair[1])


def chosen_guidance(
    recipe: Recipe,
    objective: Objective,
    guidance: float | Mapping[str, Any] | None = None,
    true_guidance: float | None = None,
) -> Guidance:
    """The recipe's guidance, or the one asked for: a scale, or settings by name that change the recipe's. A distilled network is told
    `guidance`; `true_guidance` guides it besides, at twice the cost.

    Raises:
        UserError: not finite; of a network without conditions; true guidance of a network that is told none; by a network that there is
            not.
    """
    asked = dict(guidance) if isinstance(guidance, Mapping) else {}
    guidance = None if isinstance(guidance, Mapping) else guidance
    for name, value in (("guidance", guidance), ("true guidance", true_guidance)):
        if value is not None and not is_number(value):
            raise UserError(f"{name}: got {value}; expected a finite number, such as 4.0; 1 is none")
    draws = drawn_by(recipe, objective)
    own = recipe.sample.arguments.get("guidance", 1.0) if recipe.sample else 1.0
    chosen = guidance_of({**(own if isinstance(own, Mapping) else {"scale": own}), **asked})
    _check_guide(recipe, chosen.by)
    if chosen.image != 1 and not draws.guides_pictures:
        raise UserError(
            f"guidance.image: the network of recipe {recipe.name} is told no picture to change; leave it out"
        )
    if draws.embeds_guidance:
        return replace(chosen, scale=chosen.scale if true_guidance is None else true_guidance, embedded=guidance)
    if true_guidance is not None:
        raise UserError(
            f"true guidance {true_guidance}: the network of recipe {recipe.name} is told no guidance scale, so all guidance is true; "
            f"give guidance {true_guidance}"
        )
    chosen = chosen if guidance is None else replace(chosen, scale=guidance)
    guided = "guidance" in draws.takes and bool(draws.conditions or chosen.by)
    if chosen.scale != 1 and not guided:
        raise UserError(
            f"guidance {chosen.scale}: the network of recipe {recipe.name} has no conditions to be guided by; leave it out, or guide it by "
            "a weaker network or average: {scale: 2.0, by: NAME}"
        )
    return chosen


def _check_guide(recipe: Recipe, name: str) -> None:
    """Raises a UserError where what guides is neither an average nor a frozen network."""
    known = [*recipe.averages(), *recipe.frozen()]
    if name and name not in known:
        raise UserError(
            f"sample.guidance.by: {shown(name)} is neither an average nor a frozen network of recipe {recipe.name}; "
            f"{registry.nearest(name, known) if known else 'it has none'}"
        )


# ------------------------------------------------------------------------------------------------- drawing


def drawn_by(recipe: Recipe, objective: Objective) -> Draws:
    """The objective's `draws`.

    Raises:
        UserError: it draws nothing.
    """
    if objective.draws is None:
        raise UserError(f"recipe {recipe.name}: objective {recipe.objective.name} draws nothing")
    return objective.draws


def refuse(recipe: Recipe, draws: Draws, asked: Mapping[str, Word]) -> None:
    """Refuses by name what the family does not take, before anything is computed.

    Args:
        asked: options as the user wrote them, with what each asks for.
    Raises:
        UserError: names the options, why, and what to do.
    """
    wrong: dict[str, list[str]] = {}
    for option, word in asked.items():
        if word not in draws.takes:
            wrong.setdefault(_why_not(draws, word), []).append(option)
    if wrong:
        why, options = next(iter(wrong.items()))
        them = "it" if len(options) == 1 else "them"
        raise UserError(f"{' and '.join(options)}: recipe {recipe.name} {why}; leave {them} out")


def _why_not(draws: Draws, word: Word) -> str:
    """The reason, as the end of a sentence that begins with the recipe."""
    if word in ("prompt", "label", "guidance", "negative") and not draws.conditions:
        return "has no conditions"
    if word == "true_guidance" and "guidance" in draws.takes:
        return "is told no guidance scale, so all its guidance is true and --guidance asks for it"
    if word == "voice":
        return "does not speak"
    if word in ("prosody", "timbre"):
        return "does not draw prosody and timbre apart (objective naturalspeech3)"
    if word == "edit":
        return "changes no recordings (objective infilling)"
    if word == "begin":
        return "draws nothing that goes on from a sound or a clip"
    if word == "melody":
        return "is told no melody"
    if word == "control":
        return "is told no picture to follow"
    if word in OF_LATENTS:
        return "draws from no latents that have a way between them"
    if word == "reverse":
        return "does not translate pictures both ways"
    if word == "mask":
        return "draws into no picture"
    if word == "sizes":
        return "is told nothing of the size or the crop of images"
    if word == "label":
        return "is told no class beside its prompts"
    if draws.walks == "logits":
        return "draws token by token"
    if word in ("size", "length"):
        return f"draws samples of one {word}"
    if word in ("image", "strength") and draws.walks:
        return "draws from noise alone"
    return "draws at once, without sampler and guidance"


def sampler_named(text: str, option: str = "--sampler", recipe: Recipe | None = None) -> Component:
    """A sampler and its settings as the command line has them: `ode`, or `ode:steps=10,method=heun`, or a folder of diffusers with the
    scheduler that it is to step as.

    Args:
        recipe: whose path and target a folder's scheduler must have, and whose number of steps it takes.
    Raises:
        UserError: no such sampler, or not key=value after the colon; a scheduler that none of ours equals, or of other noise.
    """
    if recipe is not None and text not in registry.names("samplers") and FilePath(text).exists():
        return _of_scheduler(FilePath(text), option, recipe)
    name, _, rest = text.partition(":")
    if name not in registry.names("samplers"):
        raise UserError(f"{option} {shown(text)}: {registry.nearest(name, list(registry.names('samplers')))}")
    settings, others = overrides_of(_pairs(rest)) if rest else ({}, {})
    if others or {"name", "guidance"} & set(settings):
        raise UserError(f"{option} {shown(text)}: expected settings of the sampler, such as ode:steps=10,method=heun")
    return Component.model_validate({"name": name, **settings})


def _of_scheduler(place: FilePath, option: str, recipe: Recipe) -> Component:
    found, told = scheduler_at(place), recipe.objective.arguments
    path, target = find_path(told.get("path", "rectified_flow")), told.get("target", "velocity")
    if find_path(found.path) != path or found.target != target:
        raise UserError(
            f"{option} {place}: its {found.class_name} is of {find_path(found.path)} with target {found.target}; expected that of recipe "
            f"{recipe.name}, {path} with target {target}"
        )
    own = recipe.sample.arguments if recipe.sample else {}
    return Component.model_validate(found.sample | {key: own[key] for key in ("steps",) if key in own})


def settings_of(text: str) -> dict[str, Any]:
    """Settings as the command line has them: `scale=4,interval=[0.2,0.8]`; raises a UserError for other text."""
    settings, others = overrides_of(_pairs(text))
    if others:
        raise UserError(f"{shown(text)}: expected settings such as scale=4,interval=[0.2,0.8]")
    return settings


def _pairs(text: str) -> list[str]:
    """The text split at commas outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def sampler_of(recipe: Recipe, steps: int | None = None, named: Component | None = None) -> Sampler:
    """The recipe's sampler, or the `named` one; `steps` overrides its number of steps.

    Raises:
        UserError: the recipe has none, or wrong arguments.
    """
    section = named or recipe.sample
    if section is None:
        raise UserError(
            f"recipe {recipe.name} has no `sample:` section; add one, for example {{name: ode, steps: 25, guidance: 4.0}}"
        )
    arguments = {key: value for key, value in section.arguments.items() if key != "guidance"}
    if steps is not None:
        arguments["steps"] = steps
    return _made(section.name, arguments)


def _made(name: str, arguments: dict[str, Any]) -> Sampler:
    cls = registry.find("samplers", name)
    sampler: Sampler = registry.made(cls, registry.check_arguments(cls, arguments, "sample"), "sample")
    return sampler


def request_of(
    recipe: Recipe,
    objective: Objective,
    *,
    steps: int | None = None,
    guidance: Guidance | float | None = None,
    sampler: Component | None = None,
) -> Request:
    """The request that the recipe makes; `steps`, `guidance` and `sampler` override its own.

    Raises:
        UserError: the family needs a sampler, and neither the recipe nor the call names one.
    """
    if not drawn_by(recipe, objective).walks:
        return Request()
    if not isinstance(guidance, Guidance):
        guidance = chosen_guidance(recipe, objective, guidance)
    return Request(sampler=sampler_of(recipe, steps, sampler), guidance=guidance)


# ------------------------------------------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Size:
    """A size of the data: `shape` of a sample in model space, `cond` of one sample as a batch of one, how many `samples` have it.
    `masked`: samples are padded, and a mask says how much of each is real. `given`: what it is made of or goes on from, of one sample."""

    shape: tuple[int, ...]
    cond: Cond
    samples: int
    masked: bool = False
    given: Mapping[str, Tensor] = field(default_factory=dict)

    def resized(self, shape: tuple[int, ...]) -> Size:
        """Another size; conditions that lie beside the sample, place by place, have it, too."""

        def of(value: Tensor) -> Tensor:
            beside = value.ndim == len(shape) + 1 and value.shape[-2:] == self.shape[-2:]
            return value.new_zeros(*value.shape[:-2], *shape[-2:]) if beside else value

        return replace(self, shape=shape, cond={name: of(value) for name, value in self.cond.items()})


def sizes_of(dataset: Any, objective: Objective) -> list[Size]:
    """The sizes of the data, the most frequent first; of equally frequent ones the largest first."""
    sizes: dict[tuple[int, ...], Size] = {}
    for batch, count in one_of_each_bucket(dataset):
        cond, request = objective.request_like(batch.on("cpu"), Request())
        before = sizes.get(request.shape)
        samples = count if before is None else before.samples + count
        sizes[request.shape] = Size(request.shape, cond, samples, request.lengths is not None, request.given)
    return sorted(sizes.values(), key=lambda size: (-size.samples, -math.prod(size.shape)))


# ------------------------------------------------------------------------------------------------- what fits


def check_sampling(
    recipe: Recipe, objective: Objective, steps: int | None = None, named: Component | None = None
) -> None:
    """Checks that the recipe's sampler, or the `named` one, can draw what the network predicts, over the whole of its walk.

    Raises:
        UserError: it cannot; names target, path and sampler, and what would fit.
    """
    section = named or recipe.sample
    if section is None:
        return
    walks = objective.draws.walks if objective.draws else ""
    if not walks:
        log.warning("sample: is not used: objective %s shows what it makes of data", recipe.objective.name)
        return
    sampler = sampler_of(recipe, steps, named)
    if sampler.walks != walks:
        fitting = [name for name in registry.names("samplers") if registry.find("samplers", name).walks == walks]
        raise UserError(
            f"sample.name: {section.name} cannot draw for objective {recipe.objective.name}; expected {' or '.join(fitting)}"
        )
    if walks != "denoise" and "guidance" not in drawn_by(recipe, objective).takes:
        if "guidance" in section.arguments:
            raise UserError(f"sample.guidance: {section.name} draws tokens without guidance; remove it")
        return
    guidance = chosen_guidance(recipe, objective)
    _warn_of_guidance(recipe, objective, guidance)
    reason = objective.misfit(sampler, guidance)
    if reason is not None and walks != "denoise":
        raise UserError(f"sample: {_words(section)} cannot draw {reason}")
    if reason is not None:
        raise UserError(
            f"sample: {_words(section)} cannot draw {reason}\nwhat fits: {_what_fits(objective, section, sampler)}"
        )


def _warn_of_guidance(recipe: Recipe, objective: Objective, guidance: Guidance) -> None:
    begun = any(network.init_from is not None for network in recipe.built().values())
    if guidance.is_double and not guidance.by and not drawn_by(recipe, objective).drops and not begun:
        log.warning(
            "sample.guidance is %g and objective.condition_drop is 0: the network never learns to do without its conditions, and what it "
            "is guided away from means nothing; set condition_drop to 0.1, or guidance to 1",
            guidance.scale,
        )


def _words(section: Component) -> str:
    return "{" + ", ".join([f"name: {section.name}", *(f"{k}: {v}" for k, v in section.arguments.items())]) + "}"


TRIED: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("ode", {}),
    ("ode", {"spacing": "trailing"}),
    *(("ancestral", {"variance": v, "spacing": s}) for v in ("small", "none") for s in ("trailing", "leading")),
    ("dpm", {"spacing": "trailing"}),
    ("dpm", {"spacing": "leading"}),
)
"""Samplers to suggest where another does not fit."""


def _what_fits(objective: Objective, section: Component, sampler: Sampler) -> str:
    steps = min(max(1, sampler.steps), 25)
    samplers = [
        _words(Component.model_validate({"name": name, **arguments}))
        for name, arguments in TRIED
        if objective.misfit(_made(name, {"steps": steps, **arguments}), Guidance()) is None
    ]
    own = {key: value for key, value in section.arguments.items() if key not in ("guidance", "steps")}
    offers = [f"sample: {' or '.join(samplers)}"] if samplers else []
    offers += objective.refitted(_made(section.name, own | {"steps": steps}))
    return "; ".join(offers) or "another path and target, such as rectified_flow with velocity"


def rehearse_drawing(
    recipe: Recipe, objective: Objective, dataset: Any, decode: Callable[[Tensor], Tensor] | None = None
) -> None:
    """Rehearses one sampling step in each size of the data on the meta device, and one decode of the first size.

    Args:
        decode: latents (B, C, ...) to images; None: no decoder.
    Raises:
        UserError: the network, its conditions, the sampler and the decoder do not fit; names the size.
    """
    if recipe.sample is None or objective.draws is None or objective.draws.walks != "denoise":
        return
    nets = networks_on_meta(recipe, objective)
    sizes = sizes_of(dataset, objective)[:REHEARSED_SIZES]
    for size in sizes:
        rehearse_size(recipe, objective, nets, size)
    if decode is not None:
        rehearse_decoding(decode, sizes[0].shape)


def rehearse_size(
    recipe: Recipe, objective: Objective, nets: Mapping[str, torch.nn.Module], size: Size, where: str = "sample"
) -> None:
    """Rehearses one sampling step of a size, with networks on the meta device.

    Raises:
        UserError: the network takes no such size, or not its conditions.
    """
    cond = {name: value.to("meta") for name, value in size.cond.items()}
    rng = ProgressRng(recipe.seed, 0, "draw", torch.arange(1), torch.device("meta"))
    lengths = torch.full((1,), size.shape[1], device="meta") if size.masked else None
    given = {name: value.to("meta") for name, value in size.given.items()}
    request = replace(request_of(recipe, objective, steps=1), shape=size.shape, lengths=lengths, given=given)
    what = f"{where}: a sample of {size.shape} cannot be drawn"
    with choice.plain(), torch.no_grad(), explained(what, objective, cond):
        objective.generate(nets, cond, request, rng)


def rehearse_decoding(decode: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape (3, ...) that a sample of `shape` decodes to, found without computing it.

    Raises:
        UserError: the decoder takes no such sample.
    """
    try:
        with choice.plain(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return tuple(decode(mode.from_tensor(torch.zeros(1, *shape))).shape[1:])
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        raise UserError(f"data.encoders: a sample of {shape} cannot be decoded: {error}") from error
