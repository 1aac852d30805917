"""Jobs that make data: each file is one job, a recipe's `prepare:` names it, and it is a command too.

Every job has the same face:

    run(<options>, *, data_root, runs_root, progress=None)   does what is not done yet
    done(<options>, *, data_root, runs_root) -> bool         whether that would be nothing
    main(argv=None) -> int                                   `python data_pipelines/<job>.py --help`

Paths in the options are relative to `data_root`, names of runs to `runs_root`; absolute paths are taken as they are.
`progress(done, total)` is called as the work goes on.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.registry import nearest

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
    return Job(name, _checked(name, module, module.run), _checked(name, module, module.done))


def _checked(name: str, module: ModuleType, function: Callable[..., Any]) -> Callable[..., Any]:
    parameters = dict(inspect.signature(function).parameters)
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values()):
        parameters |= inspect.signature(module.options_of).parameters
    named = [key for key, each in parameters.items() if each.kind is inspect.Parameter.KEYWORD_ONLY]
    options = [key for key in named if key not in GIVEN]

    @functools.wraps(function)
    def call(**values: Any) -> Any:
        for key in values:
            if key not in named:
                raise UserError(f"prepare: {name}: unknown key {key!r}; {nearest(key, options)}")
        for key in options:
            if parameters[key].default is inspect.Parameter.empty and key not in values:
                raise UserError(f"prepare: {name}: {key!r} is missing")
        return function(**values)

    return call
