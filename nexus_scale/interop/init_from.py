"""Weights of any size from elsewhere, as the start of a run or for good: read in slices, each rank's own, straight into its partitions.

    networks:
      model: {name: flux, ..., init_from: {format: diffusers, path: /models/FLUX.1-dev}}
      teacher: {name: dit, ..., frozen: true, init_from: {format: run, path: large_teacher, weights: ema}}

`diffusers` is a folder that diffusers saved (a pipeline's or the network's own), `transformers` one that transformers saved, `original` a
file of the original release (safetensors, or torch's own .pth, read as weights alone), `safetensors` a file, or a folder of files, under
our own parameters' names, and `run` a run of ours, as its newest checkpoint has it. A run may be of another family, and runs and folders of
other sizes, where the network's family says how it begins with them (`Family.begins_from`).
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from nexus_scale.config import registry
from nexus_scale.config.plain_yaml import read_yaml
from nexus_scale.config.recipe import network_class, recipe_from
from nexus_scale.config.schema import Adapter as AdapterEntry
from nexus_scale.config.schema import InitFrom, Network, Recipe
from nexus_scale.contracts import Adapter, ReadShard, RunFolder, UserError
from nexus_scale.engine import distributed
from nexus_scale.engine.checkpoint import Checkpoint, newest_of
from nexus_scale.engine.networks import persistent_buffers
from nexus_scale.interop.changes import fill_from
from nexus_scale.interop.folders import network_folder, weight_files
from nexus_scale.interop.formats import Format
from nexus_scale.interop.layout import SafetensorsFiles, opened_files, reader, whole
from nexus_scale.interop.published import Begin, Readers, family, known
from nexus_scale.io.plain_json import read_json_or

log = logging.getLogger(__name__)


def _at_home(path: str) -> Path:
    """`~` becomes the home directory here and not in the recipe, whose identity would then be the machine's."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"init_from.path: the home directory of this user is not known; got {path!r}") from None


@contextmanager
def opened(spec: InitFrom, net: nn.Module, root: Path, runs_root: Path | None = None) -> Iterator[ReadShard]:
    """`read(name, start, stop)` of the network's parameters, and of the buffers of its state that are there, while the files are open. It
    raises KeyError for others. A collective where it is of a run.

    Args:
        net: the network, on any device, the meta device too: its names, shapes and sizes are what is looked at.
        root: of relative paths.
        runs_root: of relative paths of runs; `root` without it.
    Raises:
        UserError: a family without this layout, no such file or run, other sizes, tensors missing or too many.
    """
    if spec.format == "run":
        yield _of_a_run(RunFolder((runs_root or root) / _at_home(spec.path)), spec.weights, net)
        return
    path, name = root / _at_home(spec.path), type(net).__module__.rpartition(".")[2]
    what = f"init_from {path}"
    if spec.format == "safetensors":
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{what}: no safetensors there")
        with SafetensorsFiles(files) as tensors:
            kept = {key: buffer for key, buffer in persistent_buffers(net) if key in tensors.shapes()}
            state = {**dict(net.named_parameters()), **kept}
            yield reader({key: whole(key, value.shape) for key, value in state.items()}, tensors, what)
        return
    if (own := family(name).reads) is not None:
        yield own(spec.format, path, net)
        return
    changes = (
        isinstance(net, Adapter) and not family(name).formats
    )  # of layers, which are called as in the base's format
    if changes:
        name = type(net.base).__module__.rpartition(".")[2]
    kind = spec.format if not changes or spec.format in family(name).formats else next(iter(family(name).formats), "")
    form, begin = _format_of(path, name, kind)
    if form is None:
        there = known(("diffusers", "original", "transformers"))
        raise UserError(
            f"{what}: no {spec.format!r} layout for {type(net).__name__}; there are {there}, or safetensors"
        )
    if changes:
        yield fill_from(path, form, net, spec.weights)
        return
    if form.class_name:
        path = network_folder(path, form.part)
        arguments, files = form.model_args(form.read_config(path)), weight_files(path, form.file)
    else:
        files = [path]
        with opened_files(files, prefix=form.prefix, renamed=form.old_names) as tensors:
            arguments = form.args_of_shapes(tensors.shapes())
    if begin is not None and _shapes(other := form.network_of(arguments)) != _shapes(net):
        with opened_files(
            files, prefix=form.prefix, renamed=form.old_names, ignored=(*form.computed(other), *form.others)
        ) as tensors:
            yield _begun(net, begin(net, other, reader(form.layout(other), tensors, what), what), what)
        return
    _check_sizes(net, {**{k: v for k, v in arguments.items() if k not in form.free}, **form.fixed}, what)
    with opened_files(
        files, prefix=form.prefix, renamed=form.old_names, ignored=(*form.computed(net), *form.others)
    ) as tensors:
        read = reader(form.layout(net), tensors, what)
        with opened_files(files, prefix=form.prefix, renamed=form.old_names) as everything:
            form.check_copies(net, read, everything, what)
        yield read


def _format_of(path: Path, name: str, kind: str) -> tuple[Format | None, Begin | None]:
    """A family's own format of that kind and how it begins with one of its own; or where the folder is of a network of another family that
    it begins with, that one's."""
    known = family(name)
    for other, begin in known.begins_from.items():
        form = family(other).formats.get(kind)
        if other != name and form is not None and form.class_name and _is_of(path, form):
            return form, begin
    return known.formats.get(kind), known.begins_from.get(name)


def _is_of(path: Path, form: Format) -> bool:
    """Whether the folder, or its part of a pipeline, is of the format's class."""
    config = read_json_or(network_folder(path, form.part) / "config.json", dict, {})
    return config.get("_class_name") == form.class_name


def _shapes(net: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in net.named_parameters()}


def _of_a_run(run: RunFolder, weights: str | None, net: nn.Module) -> ReadShard:
    """The weights of a run's newest checkpoint.

    Raises:
        UserError: no such run, network or average; a network of another family or other sizes.
    """
    what = f"init_from {run.path}"
    if not run.recipe.is_file():
        raise UserError(
            f"{what}: no run folder there (no recipe.yaml); give the name of a run, or the path of its folder", code=5
        )
    recipe = recipe_from(read_yaml(run.recipe), str(run.recipe))
    chosen, of = _chosen(recipe, weights, what)
    theirs, source = recipe.trained()[of], f"{what}, network {of!r}"
    begin = family(type(net).__module__.rpartition(".")[2]).begins_from.get(theirs.name)
    if begin is None:
        _check_arguments(net, theirs, source)
        return _stored(newest_of(run, what), net, chosen, "fp32" if chosen == of else "ema", what)
    cls, arguments = network_class(theirs)
    with torch.device("meta"):
        other = cls(**arguments)
    read = _stored(newest_of(run, what), other, chosen, "fp32" if chosen == of else "ema", what)
    return _begun(net, begin(net, other, read, source), source)


def _begun(net: nn.Module, found: Readers, source: str) -> ReadShard:
    """Reads what a network takes over from another one; says what starts fresh."""
    fresh = [name for name, _ in net.named_parameters() if name not in found]
    if fresh and distributed.rank() == 0:
        modules = sorted({_numbers_left_out(name.rpartition(".")[0]) for name in fresh})
        log.info("%s: %d parameters are not there and start fresh: %s", source, len(fresh), ", ".join(modules))
    return lambda name, start, stop: found[name](start, stop)


def _numbers_left_out(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)


def _stored(checkpoint: Checkpoint, net: nn.Module, chosen: str, kind: str, what: str) -> ReadShard:
    """Reads weights of a checkpoint that are a network's of these shapes."""
    names = {name: (f"{chosen}/{name}.{kind}", parameter.shape) for name, parameter in net.named_parameters()}
    names |= {name: (f"{chosen}/{name}.buffer", buffer.shape) for name, buffer in persistent_buffers(net)}
    there = set(checkpoint.names)
    for stored, shape in names.values():
        if stored not in there or checkpoint.shape(stored) != tuple(shape):
            got = checkpoint.shape(stored) if stored in there else "nothing"
            raise UserError(
                f"{what}: {stored} is {got} there and {tuple(shape)} in the recipe; make the networks' sizes equal"
            )
    return lambda name, start, stop: checkpoint.read(names[name][0], start, stop)


def _chosen(recipe: Recipe, weights: str | None, what: str) -> tuple[str, str]:
    """Which weights of a run: their name, and the trained network that they are of. By themselves those of its only network, averaged
    where it has an average."""
    trained, averages = list(recipe.trained()), recipe.averages()
    if weights is None:
        if len(trained) > 1:
            raise UserError(f"{what}: trains {', '.join(trained)}; say which by weights: {trained[0]}")
        return recipe.average_of(trained[0]) or trained[0], trained[0]
    if weights not in trained and weights not in averages:
        raise UserError(f"{what}: no weights {weights!r}; {registry.nearest(weights, [*trained, *averages])}")
    return weights, averages[weights].average_of if weights in averages else weights


def _check_arguments(net: nn.Module, theirs: Network | AdapterEntry, what: str) -> None:
    """That networks agree in what shapes do not show, such as their number of heads."""
    cls, arguments = network_class(theirs)
    if not isinstance(net, cls):
        raise UserError(f"{what}: is a {cls.__name__} and not a {type(net).__name__}; set name: {theirs.name}")
    with torch.device("meta"):
        other = cls(**arguments)
    for name in inspect.signature(cls.__init__).parameters:
        got, there = getattr(net, name, None), getattr(other, name, None)
        if isinstance(there, bool | int | float | str) and got != there:
            raise UserError(f"{what}: {name} is {there!r} there and {got!r} in the recipe; set {name}: {there}")


CHUNK = 1 << 20
"""Values that are hashed together."""


def fingerprint(net: nn.Module, read: ReadShard) -> str:
    """A hash of a network's weights, 16 hexadecimal digits: by names and values alone, whatever files they come from and however many
    ranks share the reading. A collective.

    Args:
        net: the network, on any device.
        read: as `opened` gives it.
    """
    rank, ranks = distributed.rank_and_world_size()
    sizes = [(name, value.numel()) for name, value in (*net.named_parameters(), *persistent_buffers(net))]
    chunks = [(name, start, min(start + CHUNK, size)) for name, size in sizes for start in range(0, size, CHUNK)]
    total = 0
    for name, start, stop in chunks[rank::ranks]:
        with contextlib.suppress(KeyError):
            digest = xxhash.xxh3_64(f"{name} {start} ".encode())
            digest.update(read(name, start, stop).double().numpy().data)
            total += digest.intdigest()
    signed = (total + 2**63) % 2**64 - 2**63
    return f"{int(distributed.sum_over_ranks(torch.tensor(signed)).item()) % 2**64:016x}"


def _check_sizes(net: nn.Module, published: Mapping[str, Any], what: str) -> None:
    """Sizes that weights do not show, such as the scale of positions, are compared as well."""
    for name, value in published.items():
        if (got := getattr(net, name)) != value:
            raise UserError(
                f"{what}: {name} is {value!r} there and {got!r} in the recipe; set networks.<name>.{name}: {value}"
            )
