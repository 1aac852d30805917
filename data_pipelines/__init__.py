"""Jobs that make data: each file is one job, a recipe's `prepare:` names it, and it is a command too.

Every job has the same face:

    run(<options>, *, data_root, runs_root, progress=None)   does what is not done yet
    done(<options>, *, data_root, runs_root) -> bool         whether that would be nothing
    main(argv=None) -> int                                   `python data_pipelines/<job>.py --help`

Paths in the options are relative to `data_root`, names of runs to `runs_root`; absolute paths are taken as they are, but for `output`,
which is a name below `data_root`. `run` has its output to itself (`output_folder.makes_folder`).
`progress(done, total)` is called as the work goes on.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from data_pipelines.output_folder import output_name
from nexus_scale.config.recipe import NAME
from nexus_scale.config.registry import explain, nearest
from nexus_scale.contracts import UserError

JOBS = (
    "cut_segments",
    "fetch_cifar10",
    "fetch_emoji_clips",
    "fetch_fashion_mnist",
    "ingest_clips",
    "ingest_images",
    "ingest_speech",
    "pair_utterances",
    "precompute_codes",
    "precompute_latents",
    "precompute_phonemes",
    "precompute_text",
    "rasterise_openmoji",
    "synthesise_speech",
)
TRAIN = "train"
TRAIN_OPTIONS: Mapping[str, tuple[Any, Any]] = {
    "recipe": (str, ...),
    "run": (str | None, None),
    "set": (dict[str, Any], {}),
}
"""Types and defaults of `{job: train, recipe: ...}`: a run that the jobs after it need, which `main_job` trains."""
GIVEN = ("data_root", "runs_root", "progress")
"""What the caller of a job gives, not the recipe."""


@dataclass(frozen=True)
class Job:
    """A job by name. `run` and `done` check the names of their options before they begin."""

    name: str
    run: Callable[..., Any]
    done: Callable[..., bool]


def load_job(name: str) -> Job:
    """The job `name`.

    Raises:
        UserError: there is no such job; names the nearest.
    """
    if name not in JOBS:
        raise UserError(f"prepare: no job {name!r} in {Path(__file__).parent.name}/; {nearest(name, list(JOBS))}")
    module = importlib.import_module(f"{__name__}.{name}")
    return Job(name, _checked(name, module.run), _checked(name, module.done))


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """What can be known of a job's options before it begins: their names, that none is missing, their types, and its output's name.

    Args:
        name: of a job, or `train`, which is a run that other jobs need.
        options: as a recipe's `prepare:` has them.
    Raises:
        UserError: names the job, the key, what was got and what was expected.
    """
    if name == TRAIN:
        declared: dict[str, tuple[Any, Any]] = dict(TRAIN_OPTIONS)
    else:
        load_job(name)
        declared = _declared(importlib.import_module(f"{__name__}.{name}"))
    _check_names(name, options, declared)
    # Strict: nothing is guessed from text or truth values. YAML's 1 is a float too, and its lists are tuples.
    fields: dict[str, Any] = dict(declared)
    schema = create_model(name, __config__=ConfigDict(strict=True, arbitrary_types_allowed=True), **fields)
    try:
        schema(**options)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, f"prepare: {name}"))) from None
    for key, value in options.items():
        if any(not math.isfinite(number) for number in _numbers(value)):
            raise UserError(f"prepare: {name}.{key}: got {value!r}, expected finite numbers")
        if isinstance(value, Mapping) and "run" in value and not _is_plain(value["run"]):
            raise UserError(
                f"prepare: {name}.{key}.run: got {value['run']!r}, expected the plain name of a run, without a path"
            )
    if "output" in options:
        try:
            output_name(options["output"])
        except UserError as error:
            raise UserError(f"prepare: {name}: {error}") from None


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(NAME, name) is not None


def _declared(module: ModuleType) -> dict[str, tuple[Any, Any]]:
    """Type and default of each option of a job, `...` where it must be given."""
    found: dict[str, tuple[Any, Any]] = {}
    for function in (module.run, getattr(module, "options_of", None)):
        if function is not None:
            hints = get_type_hints(inspect.unwrap(function))
            for key, each in inspect.signature(function).parameters.items():
                if each.kind is inspect.Parameter.KEYWORD_ONLY and key not in GIVEN:
                    found[key] = hints[key], ... if each.default is inspect.Parameter.empty else each.default
    return found


def _check_names(name: str, options: Iterable[str], declared: Mapping[str, tuple[Any, Any]]) -> None:
    for key in options:
        if key not in declared:
            raise UserError(f"prepare: {name}: unknown key {key!r}; {nearest(str(key), list(declared))}")
    for key, (_, default) in declared.items():
        if default is ... and key not in options:
            raise UserError(f"prepare: {name}: {key!r} is missing")


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)


def _checked(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    declared = _declared(importlib.import_module(f"{__name__}.{name}"))

    @functools.wraps(function)
    def call(**values: Any) -> Any:
        _check_names(name, [key for key in values if key not in GIVEN], declared)
        return function(**values)

    return call
