"""Each argument that a recipe gives reaches the object that it is for: with another value, another object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nexus_scale import train
from nexus_scale.callbacks.made import SERVICES, make_callbacks
from nexus_scale.callbacks.watchdog import StageClock
from nexus_scale.config import recipe as recipes
from nexus_scale.config import registry
from nexus_scale.contracts import Phase, RunFolder, UserError
from nexus_scale.generate.drawing import check_sampling, sampler_of
from nexus_scale.main_job import check_recipe
from nexus_scale.rehearsal.batches import maker
from tests.config.test_every_recipe import distinct

DEEPEST = 6


def facts(value: Any, depth: int = 0) -> Any:
    """All that can be told apart of an object, as plain values."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth > DEEPEST:
        return type(value).__name__
    if isinstance(value, Tensor):
        return [
            list(value.shape),
            str(value.dtype),
            value.requires_grad,
            None if value.is_meta else value.double().sum().item(),
        ]
    if isinstance(value, Mapping):
        return {str(key): facts(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [facts(inner, depth + 1) for inner in value]
    if isinstance(value, nn.Module):
        own = {key: facts(inner, depth + 1) for key, inner in vars(value).items() if not key.startswith("_")}
        state = {name: facts(tensor) for name, tensor in value.state_dict(keep_vars=True).items()}
        inner = [(name, type(module).__name__, facts_of_layer(module)) for name, module in value.named_modules()]
        return [own, state, inner]
    if inspect.isfunction(value):
        return repr(value.__code__)
    if type(value).__module__.startswith("nexus_scale") and hasattr(value, "__dict__"):
        return [type(value).__name__, {key: facts(inner, depth + 1) for key, inner in vars(value).items()}]
    return type(value).__name__


def facts_of_layer(module: nn.Module) -> dict[str, Any]:
    return {key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str | tuple)}


def unreached(make: Callable[[dict[str, Any]], Any], cls: type[Any], arguments: Mapping[str, Any]) -> list[str]:
    """Names of arguments without which the object would be the same, although they are not their defaults."""
    whole, found = facts(make(dict(arguments))), []
    for name, value in arguments.items():
        parameter = inspect.signature(cls.__init__).parameters[name]
        default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
        given = list(value) if isinstance(value, tuple) else value
        if parameter.default is inspect.Parameter.empty or given == default:
            continue
        without = {key: one for key, one in arguments.items() if key != name}
        # The default may be derived from other arguments and happen to be what was given: then a third value tells.
        if all(facts_or_none(make, other) in (None, whole) for other in (without, {**arguments, name: another(value)})):
            found.append(name)
    return found


def facts_or_none(make: Callable[[dict[str, Any]], Any], arguments: dict[str, Any]) -> Any:
    try:
        return facts(make(arguments))
    except (UserError, ValueError):
        return "refused"  # so it was read


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2
    return "uniform" if isinstance(value, Mapping) else value


def on_meta(like: recipes.Network | recipes.Adapter, values: Mapping[str, Any]) -> nn.Module:
    made = type(like)(**{**{key: getattr(like, key) for key in ("name", "adapts") if hasattr(like, key)}, **values})
    if isinstance(made, recipes.Adapter) and isinstance(like, recipes.Adapter):
        made._base = like.base
    with torch.device("meta"):
        return maker(made)()


@pytest.mark.parametrize("name", sorted(distinct()))
def test_each_argument_of_a_recipe_reaches_its_object(name: str, tmp_path: Path) -> None:
    recipe = recipes.load_recipe(name, tiny=True)
    for role, network in recipe.trained().items():
        cls, _ = recipes.network_class(network)
        make = partial(on_meta, network)
        assert unreached(make, cls, network.arguments) == [], role
    objective = registry.find("objectives", recipe.objective.name)
    assert (
        unreached(
            lambda given: train.make_objective(
                recipe.model_copy(update={"objective": recipes.Component(name=recipe.objective.name, **given)}), None
            ),
            objective,
            recipe.objective.arguments,
        )
        == []
    )
    if recipe.sample is not None:
        sampler = registry.find("samplers", recipe.sample.name)
        given = {key: value for key, value in recipe.sample.arguments.items() if key != "guidance"}
        assert unreached(lambda given: sampler(**registry.check_arguments(sampler, given, "x")), sampler, given) == []
        assert facts(sampler_of(recipe)) == facts(sampler(**registry.check_arguments(sampler, given, "x")))


def services(tmp_path: Path) -> dict[str, Any]:
    return dict.fromkeys(SERVICES) | {
        "run": RunFolder(tmp_path), "stage": StageClock(), "context": {}, "seed": 0, "steps": 10, "global_batch": 4, "averages": (),
        "objective": type("O", (), {"phases": lambda self, step: [Phase("main", trains="model")]})(), "record": {},
        "flops_per_sample": 1.0, "tokens_per_sample": 1.0,
    }  # fmt: skip


VALUES: dict[str, Any] = {
    "weights": ["ema"],
    "keep_best": {"count": 2},
    "to": "memory://runs/x",
    "busy": "skip",
    "at_end": False,
    "action": "report",
    "spike": {},
    "modes": {},
    "figures": ["kernel"],
}


NEEDED: dict[str, dict[str, Any]] = {"evaluate": {"real": "a folder"}}
"""Arguments without a default."""


@pytest.mark.parametrize("name", sorted(registry.names("callbacks")))
def test_each_argument_of_a_callback_reaches_it(name: str, tmp_path: Path) -> None:
    cls = registry.find("callbacks", name)
    own = {k: p for k, p in inspect.signature(cls.__init__).parameters.items() if k not in {"self", *SERVICES}}

    def made(arguments: dict[str, Any]) -> Any:
        (callback,) = make_callbacks({name: {**NEEDED.get(name, {}), **arguments}}, services(tmp_path))
        callback.close()
        return callback

    plain = facts(made({}))
    tried = 0
    for key, parameter in own.items():
        for value in candidates(key, parameter.default):
            try:
                other = facts(made({key: value}))
            except (UserError, TypeError):
                continue
            tried += 1
            assert other != plain, f"callbacks.{name}.{key}: {value!r} changes nothing"
            break
        else:
            pytest.fail(f"no value tried is one for callbacks.{name}.{key}")
    assert tried == len(own)


def candidates(key: str, default: Any) -> list[Any]:
    if key in VALUES:
        return [VALUES[key]]
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, int | float):
        return [default + 1, default / 2]
    return [3, 0.5, "other", "stop", ["other"], {"save": 5.0}]


def test_a_setting_that_is_stored_and_dropped_is_found() -> None:
    class Deaf:
        def __init__(self, *, heard: int = 1, unheard: int = 2):
            self.heard = heard

    Deaf.__module__ = "nexus_scale.planted"
    assert unreached(lambda given: Deaf(**given), Deaf, {"heard": 5, "unheard": 7}) == ["unheard"]


# ------------------------------------------------------------------------------------------------- names that lead nowhere


def test_weights_to_validate_are_looked_for_at_start() -> None:
    changed = {"callbacks": {"validate": {"weights": ["emma"]}}}
    with pytest.raises(UserError, match=r"callbacks\.validate\.weights: no network 'emma'; did you mean 'ema'"):
        check_recipe(recipes.load_recipe("mmdit/tiny_openmoji", changed, tiny=True))
    check_recipe(
        recipes.load_recipe(
            "mmdit/tiny_openmoji", {"callbacks": {"validate": {"weights": ["model", "ema"]}}}, tiny=True
        )
    )


def test_a_sampler_that_is_not_used_is_said(caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipes.load_recipe("vae/tiny_openmoji", {"sample": {"name": "ode"}}, tiny=True)
    check_sampling(recipe, train.make_objective(recipe, None))
    assert "sample: is not used" in caplog.text


def test_guidance_away_from_what_training_never_shows_is_said(caplog: pytest.LogCaptureFixture) -> None:
    recipe = recipes.load_recipe("mmdit/tiny_openmoji", {"objective": {"condition_drop": 0.0}}, tiny=True)
    check_sampling(recipe, train.make_objective(recipe, None))
    assert "objective.condition_drop is 0" in caplog.text
    caplog.clear()
    recipe = recipes.load_recipe("mmdit/tiny_openmoji", tiny=True)
    check_sampling(recipe, train.make_objective(recipe, None))
    assert not caplog.text


def test_a_recipe_without_the_sampler_of_its_base_is_tiny_too(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: mmdit/tiny_openmoji\nname: mine\nsample: null\n")
    assert recipes.load_recipe(str(file)).sample is None and recipes.load_recipe(str(file), tiny=True).sample is None
    file.write_text("base: mmdit/tiny_openmoji\nname: mine\nsample: {name: dpm, spacing: leading}\n")
    small = recipes.load_recipe(str(file), tiny=True)
    assert small.sample is not None and small.sample.arguments == {"spacing": "leading", "steps": 4}
