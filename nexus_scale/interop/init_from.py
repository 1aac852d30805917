"""A published checkpoint of any size as the start of a run: read in slices, each rank's own, straight into its partitions.

    networks:
      model: {name: flux, ..., init_from: {format: diffusers, path: /models/FLUX.1-dev}}

`diffusers` is a folder that diffusers saved (a pipeline's or the network's own), `original` a safetensors file of the original
release, `safetensors` a file, or a folder of files, under our own parameters' names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nexus_scale.config.schema import InitFrom
from nexus_scale.contracts import Engine, ReadShard, Shard, UserError
from nexus_scale.interop.folders import network_folder, weight_files
from nexus_scale.interop.layout import SafetensorsFiles, reader, whole
from nexus_scale.interop.published import formats, known


def _at_home(path: str) -> Path:
    """`~` becomes the home directory here and not in the recipe, whose identity would then be the machine's."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"init_from.path: the home directory of this user is not known; got {path!r}") from None


@contextmanager
def opened(spec: InitFrom, net: nn.Module, root: Path) -> Iterator[ReadShard]:
    """`read(name, start, stop)` of the network's parameters, while the files are open.

    Args:
        net: the network, on any device, the meta device too: its names, shapes and sizes are what is looked at.
        root: of relative paths.
    Raises:
        UserError: a family without this layout, no such file, other sizes, tensors missing or too many.
    """
    path, name = root / _at_home(spec.path), type(net).__module__.rpartition(".")[2]
    what = f"init_from {path}"
    if spec.format == "safetensors":
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise UserError(f"{what}: no safetensors there")
        with SafetensorsFiles(files) as tensors:
            yield reader({key: whole(key, p.shape) for key, p in net.named_parameters()}, tensors, what)
        return
    form = formats(name).get(spec.format)
    if form is None:
        there = known(("diffusers", "original"))
        raise UserError(
            f"{what}: no {spec.format!r} layout for {type(net).__name__}; there are {there}, or safetensors"
        )
    if form.class_name:
        path = network_folder(path, form.part)
        arguments, files = form.model_args(form.read_config(path)), weight_files(path, form.file)
    else:
        files = [path]
        with SafetensorsFiles(files, prefix=form.prefix) as tensors:
            arguments = form.args_of_shapes(tensors.shapes())
    _check_sizes(net, {**{k: v for k, v in arguments.items() if k not in form.free}, **form.fixed}, what)
    with SafetensorsFiles(files, prefix=form.prefix, ignored=tuple(form.computed(net))) as tensors:
        read = reader(form.layout(net), tensors, what)
        with SafetensorsFiles(files, prefix=form.prefix) as everything:
            form.check_copies(net, read, everything, what)
        yield read


def _check_sizes(net: nn.Module, published: Mapping[str, Any], what: str) -> None:
    """Sizes that weights do not show, such as the scale of positions, are compared as well."""
    for name, value in published.items():
        if (got := getattr(net, name)) != value:
            raise UserError(
                f"{what}: {name} is {value!r} there and {got!r} in the recipe; set networks.<name>.{name}: {value}"
            )


def first_weights(engine: Engine, readers: Mapping[str, ReadShard], averages: Mapping[str, Sequence[str]]) -> ReadShard:
    """What `engine.load_shards` takes to begin with published weights: theirs for the networks of `readers` and for those
    networks' averages, and for all else what the engine has.

    Args:
        readers: by network.
        averages: by network, the names of its averages.
    """
    held = engine.shards()
    sources = {f"{net}/": (read, ".fp32") for net, read in readers.items()}
    sources |= {
        f"{name}/": (readers[net], ".ema") for net, names in averages.items() if net in readers for name in names
    }

    def read(name: str, start: int, stop: int) -> Tensor:
        prefix, _, rest = name.partition("/")
        published, kind = sources.get(f"{prefix}/", (None, ""))
        if published is not None and rest.endswith(kind):
            return published(rest.removesuffix(kind), start, stop)
        if name.endswith(".optimizer_steps"):
            return torch.zeros(stop - start, dtype=torch.int64)
        return _own(held, name, start, stop)

    return read


def _own(held: Mapping[str, Shard], name: str, start: int, stop: int) -> Tensor:
    shard = held.get(name)
    if shard is None or start < shard.start or stop > shard.start + len(shard.local):
        raise UserError(
            f"init_from: {name} is not held by this rank in the part asked for; with several networks, of which one is "
            "replicated, give each of them init_from"
        )
    return shard.local[start - shard.start : stop - shard.start].clone().cpu()
