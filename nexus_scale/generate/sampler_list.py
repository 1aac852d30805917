"""The samplers that there are, with what each needs: found by trying them, so that the list says what is so."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nexus_scale.config import registry
from nexus_scale.config.recipe import Recipe
from nexus_scale.contracts import NoiseSampler, Rng, Sampler, UserError
from nexus_scale.generate.drawing import check_sampling, sampler_named
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.processes.paths import Path, find_path
from nexus_scale.train import make_objective

STEPS = 10
"""Of the walks that are tried."""
KINDS: Mapping[str, str | Mapping[str, Any]] = {
    "a chain": "ddpm_linear",
    "a path that ends in noise alone": "rectified_flow",
    "EDM's path": "edm",
}


@dataclass(frozen=True)
class Row:
    """A sampler.

    Attributes:
        about: what it does, in a sentence or two.
        evaluations: of the network in ten steps, at most; None for those of tokens.
        noise: whether it draws noise on the way, by its defaults.
        walks: of `KINDS`, what it can draw along; empty for those of tokens.
        settings: with their defaults.
        misfit: why it cannot draw what a recipe's network predicts, "" if it can; None without a recipe.
    """

    name: str
    about: str
    evaluations: int | None
    noise: bool
    walks: list[str]
    settings: dict[str, Any]
    misfit: str | None


class _Tried:
    """A predictor of data that are 0, which counts its calls."""

    def __init__(self, path: Path, learns_variance: bool) -> None:
        self.path, self.learns_variance, self.calls = path, learns_variance, 0

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        self.calls += 1
        answer = torch.zeros_like(x), x / self.path.sigma(t).view(-1, 1)
        return (*answer, torch.zeros_like(x)) if self.learns_variance else answer


def _walk(sampler: Sampler, kind: str, rng: Rng | None) -> int | None:
    """How often the network is asked in a walk; None where there is no such walk."""
    path, walk = find_path(KINDS[kind]), cast(NoiseSampler, sampler)
    tried = _Tried(path, walk.learns_variance)
    try:
        x0 = walk.sample(tried, torch.ones(1, 2), path=path, rng=rng)
    except (UserError, ValueError, ArithmeticError):
        return None
    return tried.calls if bool(x0.isfinite().all()) else None


def draws_noise(sampler: Sampler) -> bool:
    """Whether it draws noise on the way."""
    rng = ProgressRng(0, 0, "draw", torch.arange(1), torch.device("cpu"))
    return any(_walk(sampler, kind, rng) is not None and _walk(sampler, kind, None) is None for kind in KINDS)


def rows(recipe: Recipe | None = None) -> list[Row]:
    """All samplers, by name; with a recipe, whether each draws what its network predicts."""
    return [_row(name, recipe) for name in sorted(registry.names("samplers"))]


def _row(name: str, recipe: Recipe | None) -> Row:
    cls = registry.find("samplers", name)
    parameters = inspect.signature(cls.__init__).parameters.values()
    settings = {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
    about = " ".join(str(inspect.getdoc(inspect.getmodule(cls))).split("\n\n")[0].split())
    if cls.walks != "denoise":
        return Row(name, about, None, True, [], settings, _misfit(name, recipe))
    sampler = cls(steps=STEPS)
    rng = ProgressRng(0, 0, "draw", torch.arange(1), torch.device("cpu"))
    calls = {kind: _walk(sampler, kind, rng) for kind in KINDS}
    walked = [kind for kind, count in calls.items() if count is not None]
    most = max(count or 0 for count in calls.values())
    return Row(name, about, most, draws_noise(sampler), walked, settings, _misfit(name, recipe))


def _misfit(name: str, recipe: Recipe | None) -> str | None:
    if recipe is None:
        return None
    try:
        check_sampling(recipe, make_objective(recipe, None), named=sampler_named(name))
    except UserError as error:
        return str(error).splitlines()[0]
    return ""


def as_json(found: list[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in found]


def show(found: list[Row]) -> str:
    """The list for a person."""
    lines = []
    for row in found:
        asked = f"{row.evaluations} evaluations in {STEPS} steps; " if row.evaluations else ""
        noise = "draws noise on the way" if row.noise else "no noise on the way"
        along = f"; walks {', '.join(row.walks)}" if row.walks else ""
        lines += [f"{row.name}: {row.about}", f"    {asked}{noise}{along}"]
        lines.append("    " + ", ".join(f"{name}={value}" for name, value in row.settings.items()))
        if row.misfit is not None:
            lines.append(f"    cannot draw this recipe: {row.misfit}" if row.misfit else "    draws this recipe")
    return "\n".join(lines)
