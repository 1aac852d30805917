"""Builds a recipe's callbacks by name, with the services that their constructors name."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_scale.callbacks.watchdog import StageClock
from nexus_scale.config import registry
from nexus_scale.config.recipe import Recipe
from nexus_scale.contracts import Callback, Objective, RunFolder, UserError
from nexus_scale.run.resume import MEASURING, KeepBest

SERVICES = frozenset(
    {
        "run", "stage", "context", "objective", "validation", "checkpoints", "state", "draw", "record", "flops_per_sample",
        "tokens_per_sample", "peak_flops", "data_root", "global_batch", "steps", "seed", "averages", "batch",
    }
)  # fmt: skip
"""Constructor arguments that the program supplies; all others come from the recipe."""


def make_callbacks(wanted: Mapping[str, dict[str, Any] | None], services: Mapping[str, Any]) -> list[Callback]:
    """Callbacks by name and arguments, in order, with the services that they take."""
    made: list[Callback] = []
    for name, arguments in wanted.items():
        if arguments is None:
            continue
        cls = registry.find("callbacks", name)
        asked = set(inspect.signature(cls.__init__).parameters) & set(services)
        checked = registry.check_arguments(cls, arguments, f"callbacks.{name}", SERVICES)
        given = {service: services[service] for service in asked}
        made.append(registry.made(cls, {**checked, **given}, f"callbacks.{name}"))
    return made


def asks_for(wanted: Mapping[str, dict[str, Any] | None], service: str) -> bool:
    """Whether an active callback takes this service."""
    names = [name for name, arguments in wanted.items() if arguments is not None]
    return any(service in inspect.signature(registry.find("callbacks", name).__init__).parameters for name in names)


def check_files(recipe: Recipe, data_root: Path) -> None:
    """Raises a UserError where callbacks read data that are not there."""
    for name, arguments in recipe.callbacks.items():
        if arguments is not None:
            registry.find("callbacks", name).check_files(arguments, data_root)


def check_callbacks(recipe: Recipe, objective: Objective) -> None:
    """What the constructors of callbacks refuse, found without a run: they get stand-ins for what the program gives, and do nothing
    before `before_run`.

    Raises:
        UserError: names the callback and its argument.
    """
    stand_ins: dict[str, Any] = {
        **dict.fromkeys(SERVICES),
        "run": RunFolder(Path(os.devnull)),
        "stage": StageClock(),
        "batch": lambda: None,
        "context": {},
        "record": {},
        "objective": objective,
        "validation": lambda count: iter(()),
        "state": dict,
        "global_batch": recipe.global_batch,
        "steps": recipe.steps,
        "seed": recipe.seed,
        "averages": tuple(recipe.averages()),
        "flops_per_sample": 0.0,
        "tokens_per_sample": 0.0,
    }
    make_callbacks(recipe.callbacks, stand_ins)
    validate = recipe.callbacks.get("validate")
    for weights in (validate or {}).get("weights") or ():
        if weights not in recipe.networks:
            words = registry.nearest(weights, list(recipe.networks))
            raise UserError(f"callbacks.validate.weights: no network {weights!r}; {words}")
    if (recipe.callbacks.get("samples") or {}).get("beside") and not recipe.adapters():
        raise UserError(
            "callbacks.samples.beside: shows what adapted networks draw without their adapters; this recipe has none"
        )
    best = (recipe.callbacks.get("checkpoint") or {}).get("keep_best")
    if best is not None:
        callback = MEASURING[KeepBest.model_validate(best).metric.partition("/")[0]]
        if recipe.callbacks.get(callback) is None:
            raise UserError(
                f"callbacks.checkpoint.keep_best: needs the figures of callbacks.{callback}, which this recipe does not have"
            )
