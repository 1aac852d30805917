"""What other programs know of a family: `interop/<name>.py` says it of the network that is registered as <name>, as `FAMILY`.

Whoever exports or imports finds a family by its name: adding one is adding its file.
"""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nexus_scale.config import registry
from nexus_scale.contracts import ReadShard, UserError
from nexus_scale.interop.formats import Format
from nexus_scale.interop.layout import Layout
from nexus_scale.interop.pipelines import Pipeline, Tuning
from nexus_scale.processes.latents import LatentStats

Readers = Mapping[str, Callable[[int, int], Tensor]]
"""By name of a parameter of ours, what reads values [start, stop) of it."""
Begin = Callable[[Any, Any, ReadShard, str], Readers]
"""Of our network, another one (both on the meta device), what reads its weights, and how errors call them: what reads ours. Parameters
that are not among them start fresh. Raises a UserError where the two do not fit."""


class Beside(NamedTuple):
    """What a run has beside its network: `texts`, its text encoders as they lie (`encoders.TextEncoderFolder`), and its `codec`
    (`encoders.OwnCodec`), None where it has none."""

    texts: Sequence[Any]
    codec: Any


@dataclass(frozen=True)
class Family:
    """A family's formats and what its exports are made of.

    Attributes:
        formats: how other programs store it, by the name that `init_from` and `nexus export --format` know; the first is the default.
        pipeline: the pipeline of diffusers that an export is made whole for; or what finds it from the network's arguments.
            `pipelines`: others, by the objective of a run.
        tuning: of the network's arguments, how its pipeline's published weights learn on; None: of such a network not at all.
        kohya: of our network, where its tensors lie in what kohya's scripts call them by; None: in diffusers' names.
        together: by format, what writes all networks of a run into one file.
        whole: by format, what puts a run's text encoders and codec beside the network that was written into a folder, where one class loads
            all of them; it returns why it does not, or nothing.
        scale: of an autoencoder: `scaling_factor` of a config that leaves it out.
        normalised: of an autoencoder: settings by which a pipeline normalises as a run has learnt.
        alone: of an autoencoder: settings of its own export, which knows no data and so no scale of latents.
        reads: of an adapter without a format, what reads its parameters from a file of a kind (`init_from`'s `format`).
        writes: of such adapters of a run, by the parts of the pipeline that they are of, what writes them into a folder; it is given the
            run's text encoders.
        begins_from: how a network begins with the weights of a run of another family, or of other sizes, by the family's name.
    """

    formats: Mapping[str, Format] = field(default_factory=dict)
    pipeline: Pipeline | Callable[[Mapping[str, Any]], Pipeline] | None = None
    pipelines: Mapping[str, Pipeline] = field(default_factory=dict)
    tuning: Callable[[Mapping[str, Any]], Tuning | None] = lambda arguments: None
    kohya: Callable[[Any], Layout | None] = lambda net: None
    together: Mapping[str, Callable[[Mapping[str, nn.Module], Path], Path]] = field(default_factory=dict)
    whole: Mapping[str, Callable[[Path, Beside], str]] = field(default_factory=dict)
    scale: float = 1.0
    normalised: Callable[[LatentStats | None], dict[str, Any]] = lambda latents: {}
    alone: Mapping[str, Any] = field(default_factory=dict)
    reads: Callable[[str, Path, Any], ReadShard] | None = None
    writes: Callable[[Path, Mapping[str, Any], Sequence[Any]], Path] | None = None
    begins_from: Mapping[str, Begin] = field(default_factory=dict)

    def pipeline_of(self, arguments: Mapping[str, Any], objective: str = "") -> Pipeline | None:
        """The pipeline for a network of these arguments that was trained by this objective."""
        found = self.pipelines.get(objective, self.pipeline)
        return found if found is None or isinstance(found, Pipeline) else found(arguments)


@cache
def families() -> tuple[str, ...]:
    """Registered networks that have a file here."""
    files = {file.stem for file in Path(__file__).parent.glob("*.py")}
    return tuple(sorted(files & set(registry.names("models"))))


def family(name: str) -> Family:
    """What other programs know of the network registered as `name`; nothing where it has no file here."""
    if name not in families():
        return Family()
    found: Family = importlib.import_module(f"{__package__}.{name}").FAMILY
    return found


def known(among: Sequence[str]) -> str:
    """Families and those of their formats that are `among` these, for an error."""
    found = {name: [form for form in family(name).formats if form in among] for name in families()}
    return ", ".join(f"{name} ({', '.join(forms)})" for name, forms in found.items() if forms)


def named(library: str, part: str, name: object) -> str | None:
    """The family that a library has as the part (`vae`, `codec`) which its config calls `name`; None where there is none."""
    for each in families():
        form = family(each).formats.get(library)
        if form is not None and form.part == part and name == (form.model_type or form.class_name):
            return each
    return None


def begins_alike(fresh: Sequence[str] = (), may_differ: Sequence[str] = (), wider: Sequence[str] = ()) -> Begin:
    """How a network begins with one of its own family and sizes, which may lack a part of it: a student with its teacher.

    Args:
        fresh: what names of parameters begin with that start fresh where the other one lacks them.
        may_differ: arguments of the constructor in which the two may differ.
        wider: weights (out, in, ...) that may have more inputs than the other's, to which they begin as deaf: at zero.
    """

    def begin(ours: Any, theirs: Any, read: ReadShard, what: str) -> Readers:
        for name in inspect.signature(type(ours).__init__).parameters:
            got, there = getattr(ours, name, None), getattr(theirs, name, None)
            if isinstance(there, bool | int | float | str | tuple) and got != there and name not in may_differ:
                raise UserError(f"{what}: {name} is {there!r} there and {got!r} in the recipe; set {name}: {there}")
        shapes = {name: parameter.shape for name, parameter in theirs.named_parameters()}
        wanted = {name: parameter.shape for name, parameter in ours.named_parameters()}
        taken = [name for name in wanted if name in shapes or not name.startswith(tuple(fresh))]
        found: dict[str, Callable[[int, int], Tensor]] = {}
        for name in taken:
            got, there = wanted[name], shapes.get(name)
            if name in wider and there is not None and got[1] > there[1] and got[:1] + got[2:] == there[:1] + there[2:]:
                found[name] = partial(_widened, read, name, there, got)
            elif there != got:
                raise UserError(f"{what}: {name} is {there} there and {got} in the recipe")
            else:
                found[name] = partial(read, name)
        return found

    return begin


def _widened(read: ReadShard, name: str, there: Sequence[int], wanted: Sequence[int], start: int, stop: int) -> Tensor:
    """Values of a weight whose further inputs are zero."""
    weight = torch.zeros(*wanted)
    weight[:, : there[1]] = read(name, 0, math.prod(there)).view(*there)
    return weight.flatten()[start:stop]
