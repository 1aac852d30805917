"""Every registered class is walked with bad values for each of its arguments: what is wrong is told before anything starts, in no time."""

from __future__ import annotations

import inspect
import os
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch

from nexus_scale import main_job, train
from nexus_scale.callbacks.made import SERVICES, check_callbacks
from nexus_scale.config import recipe as recipes
from nexus_scale.config import registry
from nexus_scale.contracts import UserError
from nexus_scale.engine.networks import build_bare, build_network
from nexus_scale.engine.settings import NetSpec
from nexus_scale.processes.couplings import COUPLINGS, find_coupling
from nexus_scale.processes.paths import PATHS, find_path
from nexus_scale.processes.times import TIME_SHIFTS, TIMES, find_time_shift, find_times
from nexus_scale.rehearsal.meta import network_on_meta

CONFIGS = recipes.configs_root()
SECONDS = 10.0
"""Of one refusal, on a machine that does other things beside."""


def tiny_recipes() -> Iterator[recipes.Recipe]:
    for path in sorted(CONFIGS.rglob("*.yaml")):
        if path.parent != CONFIGS and path.parent.name not in ("_base", "cluster", "data", "suites"):
            yield recipes.load_recipe(path.relative_to(CONFIGS).with_suffix("").as_posix(), tiny=True)


def small() -> dict[tuple[str, str], dict[str, Any]]:
    """Arguments that do, for each network, objective, sampler and callback: those of the recipes' tiny blocks."""
    found: dict[tuple[str, str], dict[str, Any]] = {("callbacks", "evaluate"): {"real": "pictures"}}
    for recipe in tiny_recipes():
        for network in recipe.built().values():
            found.setdefault(("models", network.name), network.arguments)
        found.setdefault(("objectives", recipe.objective.name), recipe.objective.arguments)
        if recipe.sample is not None:
            sampler = {k: v for k, v in recipe.sample.arguments.items() if k != "guidance"}
            found.setdefault(("samplers", recipe.sample.name), sampler)
    for room in ("samplers", "callbacks"):
        for name in registry.names(room):
            found.setdefault((room, name), {})
    return found


SMALL = small()
OF_WEIGHTS = frozenset({"sngan_critic"})
"""Networks with buffers that are computed of their first weights."""
ADAPTERS = {entry.name: entry for recipe in tiny_recipes() for entry in recipe.adapters().values()}
TINY = recipes.load_recipe("mmdit/tiny_openmoji", tiny=True)
OBJECTIVE = train.make_objective(TINY, None)


@pytest.fixture(autouse=True)
def four_more_gibibytes() -> Iterator[None]:
    """What a value makes a class allocate ends this test, not whatever else the machine runs: one of a vocoder took 22 GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 4 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def test_a_gigantic_value_ends_its_test_alone() -> None:
    with pytest.raises(RuntimeError, match="allocate"):
        torch.ones(5 * 2**30, dtype=torch.uint8)


def test_every_registered_class_is_walked() -> None:
    registered = {(room, name) for room in registry.ROOMS for name in registry.names(room)}
    parts = {
        (room, name) for room, name in registered - set(SMALL) if not hasattr(registry.find(room, name), "init_weights")
    }
    assert set(SMALL) == registered - parts, "give it a recipe"
    assert parts == {("models", "convnext")}
    with pytest.raises(UserError, match="a part that networks are made of"):
        network_on_meta(registry.find("models", "convnext"), {}, "networks.model")


def make(room: str, name: str, arguments: Mapping[str, Any]) -> Any:
    """What a dry run makes of it."""
    cls = registry.find(room, name)
    if room == "models":
        made = {"base": recipes.network_class(ADAPTERS[name])[1]["base"]} if name in ADAPTERS else {}
        checked = registry.check_arguments(cls, arguments, "networks.model", frozenset(made))
        return network_on_meta(cls, {**checked, **made}, "networks.model")
    if room == "callbacks":
        recipe = TINY.model_copy(update={"callbacks": {"validate": {}, name: dict(arguments)}})
        recipes.check(recipe, SERVICES)
        return check_callbacks(recipe, OBJECTIVE)
    takes = inspect.signature(cls.__init__).parameters
    given = {key: value for key, value in {"latents": None, "global_batch": 4}.items() if key in takes}
    checked = registry.check_arguments(cls, arguments, name, frozenset(given))
    return registry.made(cls, {**checked, **given}, name)


@pytest.mark.parametrize("name", [name for room, name in sorted(SMALL) if room == "models"])
def test_without_first_values_a_network_has_the_same_buffers(name: str) -> None:
    cls = registry.find("models", name)
    made = {"base": recipes.network_class(ADAPTERS[name])[1]["base"]} if name in ADAPTERS else {}
    spec = NetSpec(lambda: cls(**SMALL["models", name], **made), frozen=True)
    bare, whole = build_bare("model", spec, 0), build_network("model", spec, 0)
    assert (bare is None) == (name in OF_WEIGHTS)
    if bare is not None:
        assert all(parameter.is_meta and not parameter.requires_grad for parameter in bare.parameters())
        shapes = {key: (value.shape, vars(value)) for key, value in whole.named_parameters()}
        assert {key: (value.shape, vars(value)) for key, value in bare.named_parameters()} == shapes
        assert dict(bare.named_buffers()).keys() == dict(whole.named_buffers()).keys()
        for key, buffer in bare.named_buffers():
            assert torch.equal(buffer, whole.get_buffer(key)), key


def arguments_of(cls: type[Any], room: str) -> dict[str, Any]:
    hints = get_type_hints(cls.__init__, include_extras=True)
    given = SERVICES if room == "callbacks" else {"latents", "global_batch", "base"}
    return {
        name: hints[name]
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in given
    }


NEVER = (float("nan"), float("inf"), -float("inf"), 2**70, ["x", {}], {"no such name": [1]}, -(10**9))
"""What no argument takes."""
LARGE = (0, 10**9, 1e300, [10**9] * 2)
"""What is refused or taken, but at once."""


@pytest.mark.parametrize(("room", "name"), sorted(SMALL), ids=str)
def test_a_bad_argument_is_told(room: str, name: str) -> None:
    make(room, name, SMALL[room, name])
    arguments = arguments_of(registry.find(room, name), room)
    for argument, hint in arguments.items():
        wrong = NEVER if "Mapping" not in str(hint) and "dict" not in str(hint) else NEVER[:4]
        for value in (*wrong, *(() if "bool" in str(hint) else (True,)), *LARGE):
            begun = time.process_time()
            try:
                make(room, name, {**SMALL[room, name], argument: value})
            except UserError as error:
                words = str(error)
            else:
                words = f"{name}.{argument}"
                assert any(value is one for one in LARGE), f"{name}.{argument}: {value!r} was taken"
            assert any(word in words for word in (*arguments, "does not accept", "parameters", "shape")), words
            assert len(words) < 2000
            assert time.process_time() - begun < SECONDS, f"{name}.{argument}: {value!r}"


@pytest.mark.parametrize(
    ("find", "kinds"),
    [
        (find_path, PATHS),
        (find_times, TIMES),
        (find_coupling, COUPLINGS),
        (lambda spec: find_time_shift(spec, "shift"), TIME_SHIFTS),
    ],
)
def test_a_bad_argument_of_a_process_is_told(find: Any, kinds: Mapping[str, type[Any]]) -> None:
    given = {"stratified": {"intervals": 2}, "square_root": {"base_tokens": 4}}
    for name, cls in kinds.items():
        find({"name": name, **given.get(name, {})})
        for argument in inspect.signature(cls).parameters:
            for value in (*NEVER, "many", None):
                with pytest.raises(UserError):
                    find({"name": name, **given.get(name, {}), argument: value})


def test_a_billion_blocks_are_not_begun() -> None:
    begun = time.process_time()
    cls = registry.find("models", "dit")
    deep = registry.check_arguments(cls, {"depth": 10**9, "hidden_size": 32}, "networks.model")
    with pytest.raises(
        UserError, match=r"networks.model: has more than 20,000 modules and parameters; expected a smaller depth"
    ):
        network_on_meta(cls, deep, "networks.model")
    assert time.process_time() - begun < SECONDS
    with torch.device("meta"):  # and no hook stays behind
        assert len(list(torch.nn.ModuleList(torch.nn.Identity() for _ in range(30_000)))) == 30_000


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["callbacks.watchdog.deadlines={forwards: 3}"], "deadlines: no stage 'forwards'; did you mean 'forward'"),
        (["callbacks.watchdog.deadlines={forward: 0}"], "deadlines.forward: input should be greater than 0"),
        (["callbacks.watchdog.beat_seconds=0"], "beat_seconds: input should be greater than 0"),
        (["callbacks.goodput.beat_seconds=1e9"], "beat_seconds: input should be less than"),
        (["callbacks.validate.weights=[emma]"], "callbacks.validate.weights: no network 'emma'; did you mean 'ema'"),
        (["callbacks.validate=null", "callbacks.checkpoint.keep_best={}"], "keep_best: needs the figures of callbacks.validate"),
        (["callbacks.metrics.wandb={projekt: a}"], "wandb.projekt: unknown key"),
        (["networks.model.init_from={format: safetensor, path: x}"], "networks.model.init_from.format"),
        (["networks.model.init_from={format: safetensors}"], "networks.model.init_from.path"),
        (["sample={name: ode, steps: 1000000000}"], "sample.steps: input should be less than"),
        (["sample.guidance=.nan"], "sample.guidance: input should be a valid number; got nan"),
        (["sample.guidance=true"], "sample.guidance: got true"),
        (["objective.times={name: logit_normal, mean: .inf}"], "mean: input should be a valid number"),
        (["objective.path={name: scaled_linear, steps: 1000000000}"], "path.steps: input should be less than"),
        (["data.encoders={moments: {rn: x}}"], "data.encoders.moments: unknown key 'rn'; did you mean 'run'"),
        (["data.encoders={moments: {run: a, folder: b}}"], "data.encoders.moments: expected either `run` or `folder`"),
        (["data.encoders={moments: {run: ../a}}"], "data.encoders.moments.run"),
        (["data.encoders={text: [{package: a}, {packag: b}]}"], "data.encoders.text.1: unknown key 'packag'"),
        (["data.encoders={text: [{package: a, pad_to: 0}]}"], "data.encoders.text.0.pad_to"),
        (["data.encoders={phonemes: {language: 5}}"], "data.encoders.phonemes.language: input should be text; got 5"),
        (["prepare=[{job: train}]"], "'recipe' is missing"),
        (["prepare=[{job: train, recipe: nowhere}]"], "nowhere: no such file"),
        (["prepare=[{job: train, recipe: vae/tiny_openmoji, set: {networks: {model: {depth: -1}}}}]"], "vae/tiny_openmoji: "),
    ],
)  # fmt: skip
def test_what_a_constructor_refuses_is_found_by_the_dry_run(overrides: list[str], words: str, tmp_path: Path) -> None:
    paths = [f"cluster.paths.runs={tmp_path / 'runs'}", f"cluster.paths.data={tmp_path / 'data'}"]
    with pytest.raises(UserError) as caught:
        main_job.resolve("mmdit/tiny_openmoji", [*paths, "cluster.workers=0", *overrides], tiny=True)
    assert words in str(caught.value) and caught.value.code == 2, caught.value
    assert not os.listdir(tmp_path)
