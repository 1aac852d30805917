"""Recipe (what is trained) and Cluster (where it runs): load, merge, check, dump.

A recipe and a cluster are two files; their sections are in schema.py. Merge order: defaults, then the file that `base:` names (and what
that one's base names), then the file itself, then `key=value` from the command line, where `cluster.key=value` goes to the cluster. An
unknown key is an error that names the file, the key and the nearest valid one. The same recipe gives the same curve on any cluster.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

import xxhash
from pydantic import BaseModel, ValidationError

from nexus_scale.config import registry
from nexus_scale.config.kinds import Undecided, annotation_of, check_kind, decided, shown
from nexus_scale.config.plain_yaml import parse_yaml, read_yaml
from nexus_scale.config.schema import (  # the sections are to be had here, too  # noqa: F401
    ENCODERS,
    NAME,
    AdamW,
    Adapter,
    Average,
    BadData,
    Cluster,
    Component,
    Computing,
    Data,
    Frozen,
    InitFrom,
    Job,
    Network,
    Optimizer,
    Paths,
    Recipe,
    Schedule,
    Source,
    Split,
    SyntheticData,
    SyntheticField,
    TextEncoder,
)
from nexus_scale.config.secret_names import refuse_secrets_in
from nexus_scale.contracts import UserError
from nexus_scale.io.plain_text import clean_text, decode_text, lines_of

# ------------------------------------------------------------------------------------------------- reading


def configs_root() -> Path:
    """The configs/ folder of the source tree, or the wheel's copy."""
    package = Path(__file__).resolve().parent.parent
    beside = package.parent / "configs"
    return beside if beside.is_dir() else package / "configs"


def find_config(name: str, kind: str = "") -> Path:
    """Path of a config: an existing file, or a name below configs/ (`mmdit/tiny_openmoji`, `cluster/local_cpu`).

    Raises:
        UserError: there is none; lists the nearest.
    """
    root = configs_root()
    for candidate in (Path(name), root / kind / name, root / kind / f"{name}.yaml", root / name, root / f"{name}.yaml"):
        if _is_file(candidate):
            return candidate
    if Path(name).is_absolute() or len(name) > 200:
        raise UserError(f"{shown(name)}: no such file")
    folder = root / kind
    known = [
        p.relative_to(folder).with_suffix("").as_posix()
        for p in sorted(folder.rglob("*.yaml"))
        if p.parent.name not in ("_base", *(() if kind else ("cluster", "suites")))
    ]
    told = name if name.isprintable() else shown(name)
    raise UserError(f"{told}: no such file, and no such config; {registry.nearest(name, known)}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long, or contains a NUL
        return False


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping. A component of another `name` (or an average) replaces the whole one."""
    out = dict(copy.deepcopy(dict(below)))
    for key, value in above.items():
        old = out.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            renamed = "name" in value and value["name"] != old.get("name")
            out[key] = copy.deepcopy(dict(value)) if renamed else merge(old, value)
        else:
            out[key] = copy.deepcopy(value)
    return out


DEEPEST_KEY = 16
"""Parts of a dotted key of the command line."""


def overrides_of(pairs: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`key.key=value` pairs as nested mappings: those of the recipe and those of the cluster (`cluster.`)."""
    recipe: dict[str, Any] = {}
    cluster: dict[str, Any] = {}
    for pair in pairs:
        dotted, sign, text = pair.partition("=")
        keys = dotted.split(".")
        if not sign or not all(keys) or len(keys) > DEEPEST_KEY:
            raise UserError(f"{shown(pair)}: expected key=value, for example steps=200 or cluster.workers=1")
        target = recipe
        if keys[0] == "cluster" and len(keys) > 1:
            target, keys = cluster, keys[1:]
        for key in keys[:-1]:
            target = target.setdefault(key, {})
            if not isinstance(target, dict):
                raise UserError(f"{shown(pair)}: {key} is given both a value and keys of its own")
        if isinstance(target.get(keys[-1]), dict):
            raise UserError(f"{shown(pair)}: {keys[-1]} is given both a value and keys of its own")
        target[keys[-1]] = parse_yaml(text, shown(pair).strip("'"))
    return recipe, cluster


def _refuse_unknown(kind: Any, value: Any, where: str, prefix: str = "") -> None:
    """Refuses keys that the sections of a type do not have, at any depth. Values outside sections are checked elsewhere."""
    try:
        kind = decided(kind, value)
    except Undecided:
        return
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if isinstance(value, Mapping):
            _refuse_unknown_keys(kind, value, where, prefix)
        return
    arguments = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        sections = [choice for choice in arguments if choice is not NoneType]
        if value is not None and len(sections) == 1:
            _refuse_unknown(sections[0], value, where, prefix)
    elif get_origin(kind) is list and isinstance(value, list):
        for item in value:
            _refuse_unknown(arguments[0], item, where, prefix)
    elif get_origin(kind) is dict and isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_unknown(arguments[1], item, where, f"{prefix}{key}.")


def _refuse_unknown_keys(section: type[BaseModel], values: Mapping[str, Any], where: str, prefix: str) -> None:
    for key, value in values.items():
        if key in section.model_fields:
            _refuse_unknown(annotation_of(section.model_fields[key]), value, where, f"{prefix}{key}.")
        elif section.model_config.get("extra") != "allow":
            near = registry.nearest(str(key), list(section.model_fields))
            raise UserError(f"{where}: unknown key {f'{prefix}{key}'!r}; {near}")


MOST_BASES = 16


def _with_bases(path: Path) -> dict[str, Any]:
    """A recipe's values over those of its base, and so on down."""
    chain: list[Path] = []
    layers: list[dict[str, Any]] = []
    below: Path | None = path
    while below is not None:
        chain.append(below.resolve())
        values = read_yaml(below)
        base = values.pop("base", None)
        check_kind(str | None, base, f"{below}: base")
        layers.append(values)
        below = None if base is None else _base_of(below, base)
        if below is not None and below.resolve() in chain:
            names = " -> ".join(map(str, [*chain[chain.index(below.resolve()) :], below.resolve()]))
            raise UserError(f"{path}: its bases form a circle: {names}")
        if len(chain) == MOST_BASES and below is not None:
            raise UserError(f"{path}: a chain of more than {MOST_BASES} bases; the last is {chain[-1]}")
    merged = layers.pop()
    while layers:
        merged = merge(merged, layers.pop())
    return merged


def _base_of(recipe: Path, base: str) -> Path:
    """The path of a base: a file beside the recipe, or any name that a recipe may have."""
    for beside in (recipe.parent / base, recipe.parent / f"{base}.yaml"):
        if _is_file(beside):
            return beside
    try:
        return find_config(base)
    except UserError as error:
        raise UserError(f"{recipe}: base: {error}") from None


def recipe_from(values: Mapping[str, Any], where: str) -> Recipe:
    """Checks keys, types and bounds.

    Raises:
        UserError: an unknown, missing or ill-typed key, or a value out of bounds.
    """
    refuse_secrets_in(values, where)
    recipe: Recipe = _checked(Recipe, values, where)
    if recipe.data.synthetic is not None:
        values_of_a_sample = 0
        for name, spec in recipe.data.synthetic.fields.items():
            place = f"data.synthetic.fields.{name}"
            field: SyntheticField = _checked(SyntheticField, spec, where, place)
            _without_point(spec, where, place)
            values_of_a_sample += math.prod(field.shape)
        if values_of_a_sample > MOST_VALUES_OF_A_SAMPLE:
            raise UserError(
                f"{where}: data.synthetic.fields: a sample has {values_of_a_sample:,} values; expected at most "
                f"{MOST_VALUES_OF_A_SAMPLE:,}"
            )
    return recipe


MOST_VALUES_OF_A_SAMPLE = 6 * 10**7
"""Limit for synthetic data; a clip of 49 frames of 480 x 720 has 50 million."""


def _without_point(value: Any, where: str, place: str) -> None:
    """Requires whole numbers in a mapping that is passed on unchanged: 8.0 is not a size."""
    if isinstance(value, float):
        raise UserError(f"{where}: {place}: expected a whole number without a decimal point; got {value}")
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        _without_point(one, where, f"{place}.{key}")


def cluster_from(values: Mapping[str, Any], where: str) -> Cluster:
    """Checks keys, types and bounds, as recipe_from does."""
    refuse_secrets_in(values, where)
    cluster: Cluster = _checked(Cluster, values, where)
    return cluster


def _checked(section: type[BaseModel], values: Any, where: str, key: str = "") -> Any:
    """The section made from the values at `key` (empty: the whole file) of the file `where`."""
    _refuse_unknown(section, values, f"{where}: {key}" if key else where)
    try:
        check_kind(section, values, key)
        return section.model_validate(values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {line}" for line in registry.explain(error, key))) from None


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None, *, tiny: bool = False) -> Recipe:
    """A recipe by path or by name below configs/. `tiny` applies its `tiny:` block before the overrides."""
    path = find_config(name)
    values, where = _with_bases(path), str(path)
    recipe = recipe_from(values, where)  # so that a mistake in the file is not blamed on the overrides
    # A recipe that removed its base's sampler has none to shrink.
    tiny_block = {k: v for k, v in recipe.tiny.items() if k != "sample" or recipe.sample is not None}
    small = merge(values, tiny_block)
    recipe = recipe_from(small, f"{where} with its tiny block")  # checked whether or not --tiny is given
    if tiny:
        values, where = small, f"{where} with its tiny block"
        if recipe.data.synthetic is not None:  # synthetic data replace the files and need no job and no encoder
            values["data"] = {k: v for k, v in values["data"].items() if k not in ("train", "validation", "encoders")}
            values["prepare"] = []
    if overrides:
        values, where = merge(values, overrides), f"{where} with the command line"
    recipe = recipe_from(at_home(values, where), where)
    for place, optimizer in _optimizers(recipe):
        if optimizer.schedule.name == "wsd" and optimizer.schedule.decay_steps is None:
            raise UserError(
                f"{where}: {place}.schedule: wsd needs `decay_steps`, the length of its final decay; a tenth of this run is "
                f"{max(1, recipe.steps // 10)}"
            )
    return recipe


def _optimizers(recipe: Recipe) -> list[tuple[str, Optimizer]]:
    """The optimizers that a recipe names, with their places."""
    own = [
        (f"networks.{name}.optimizer", network.optimizer)
        for name, network in recipe.trained().items()
        if network.optimizer is not None
    ]
    return [("optimizer", recipe.optimizer), *own]


def load_cluster(name: str, overrides: Mapping[str, Any] | None = None) -> Cluster:
    """A cluster by path or by name below configs/cluster/."""
    path = find_config(name, "cluster")
    values = read_yaml(path)
    cluster = cluster_from(values, str(path))  # so that a mistake in the file is not blamed on the command line
    return cluster_from(merge(values, overrides), f"{path} with the command line") if overrides else cluster


OF_PATHS = ("data", "prepare")
"""Sections of a recipe in which text that begins with `~` is a path."""


def at_home(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Paths with a leading `~` or `~user` replaced by the home directory."""

    def expanded(value: Any, place: str) -> Any:
        if isinstance(value, Mapping):
            return {key: expanded(one, f"{place}.{key}") for key, one in value.items()}
        if isinstance(value, list):
            return [expanded(one, f"{place}.{i}") for i, one in enumerate(value)]
        if not isinstance(value, str) or not value.startswith("~"):
            return value
        try:
            return str(Path(value).expanduser())
        except RuntimeError:
            raise UserError(
                f"{where}: {place}: the home directory of this user is not known; got {shown(value)}"
            ) from None

    out = dict(values)
    for section in OF_PATHS:
        if section in out:
            out[section] = expanded(out[section], section)
    return out


# ------------------------------------------------------------------------------------------------- checking


GIVEN = frozenset({"latents", "no_text", "global_batch"})
"""Arguments of objectives that the program gives, of the data."""

OF_ADAPTERS = frozenset({"base"})
"""Arguments of adapters that the program gives."""


def check(recipe: Recipe, callbacks_injected: frozenset[str] = frozenset()) -> None:
    """Checks everything that can be known before any worker starts: families, arguments, roles.

    Raises:
        UserError: what is wrong, where, and what would be right.
    """
    for name, network in recipe.built().items():
        given = OF_ADAPTERS if isinstance(network, Adapter) else frozenset[str]()
        registry.check_arguments(registry.find("models", network.name), network.arguments, f"networks.{name}", given)
    for name, average in recipe.averages().items():
        if (of := average.average_of) not in recipe.trained():
            near = registry.nearest(of, list(recipe.trained()))
            raise UserError(f"networks.{name}.average_of: no trained network {shown(of)}; {near}")
    registry.check_arguments(
        registry.find("objectives", recipe.objective.name),
        recipe.objective.arguments,
        "objective",
        GIVEN,
    )
    if recipe.sample is not None:
        sampler = {k: v for k, v in recipe.sample.arguments.items() if k != "guidance"}
        guidance = recipe.sample.arguments.get("guidance", 1.0)
        try:
            check_kind(float | dict[str, Any], guidance, "sample.guidance")
        except UserError:
            raise UserError(
                f"sample.guidance: got {shown(guidance)}; expected a number, or {{scale: 4.0, channels: 3}}"
            ) from None
        registry.check_arguments(registry.find("samplers", recipe.sample.name), sampler, "sample")
    for field, encoder in recipe.data.encoders.items():
        place = f"data.encoders.{field}"
        _without_point(encoder, recipe.name, place)
        if isinstance(encoder, Mapping):
            _checked(ENCODERS.get(field, TextEncoder), encoder, recipe.name, place)
        elif field in ENCODERS:
            raise UserError(f"{place}: got more than one; expected one")
        else:
            for i, one in enumerate(encoder):
                _checked(TextEncoder, one, recipe.name, f"{place}.{i}")
    for field in recipe.data.on_the_fly:
        if field not in recipe.data.encoders and recipe.data.synthetic is None:
            raise UserError(
                f"data.on_the_fly: {field!r} needs its encoder; add data.encoders.{field}, or leave it out of on_the_fly"
            )
    for name, arguments in recipe.callbacks.items():
        if arguments is not None:
            registry.check_arguments(
                registry.find("callbacks", name), arguments, f"callbacks.{name}", callbacks_injected
            )


def network_class(network: Network | Frozen | Adapter) -> tuple[type[Any], dict[str, Any]]:
    """A network's class and checked arguments; of an adapter also `base`, which makes the network that it adapts."""
    cls = registry.find("models", network.name)
    if not isinstance(network, Adapter):
        return cls, registry.check_arguments(cls, network.arguments, network.name)
    own = registry.check_arguments(cls, network.arguments, network.name, OF_ADAPTERS)
    return cls, {**own, "base": partial(_made, network.base)}


def computing(network: Network | Frozen | Adapter) -> Network | Frozen:
    """The entry of the network that computes: of an adapter its base's."""
    return network.base if isinstance(network, Adapter) else network


def _made(network: Frozen) -> Any:
    cls, arguments = network_class(network)
    return cls(**arguments)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    if number < 1:
        raise ValueError(f"divisors of {number}: expected a positive number")
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def accumulation(global_batch: int, workers: int, micro_batch: int | None) -> tuple[int, int]:
    """Micro-batch and number of micro-batches per worker and step.

    Raises:
        UserError: the global batch does not divide; lists what does.
    """
    if global_batch % workers:
        near = [w for w in divisors(global_batch) if w <= max(2 * workers, 8)]
        raise UserError(
            f"global_batch {global_batch} does not divide among {workers} workers; numbers that do: {near}; change cluster.workers or "
            "global_batch"
        )
    share = global_batch // workers
    micro = micro_batch or share
    if share % micro:
        fits = divisors(share)
        raise UserError(
            f"micro_batch {micro} does not divide the {share} samples that each of {workers} workers takes of global_batch "
            f"{global_batch}; sizes that do: {fits if len(fits) <= 40 else [*fits[:20], '...', *fits[-20:]]}"
        )
    return micro, share // micro


# ------------------------------------------------------------------------------------------------- identity


CURVE = ("seed", "global_batch", "networks", "objective", "optimizer", "data")
"""The parts of a recipe that a run may not change: they determine its curve."""


def identity(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that determine the curve, as plain values.

    The policy for bad data is not among them: a run that stopped at the limit may resume with a higher one. Neither is the
    location of a network's weights.
    """
    values: dict[str, Any] = json.loads(json.dumps({key: dump(recipe)[key] for key in CURVE}))
    del values["data"]["bad"]
    if not values["data"]["on_the_fly"]:
        del values["data"]["on_the_fly"]  # as before this key existed
    for spec in values["networks"].values():
        spec.pop("engine", None)
    return values


def identity_of(written: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An `identity` written by any version, as this version would write it.

    A key that did not exist yet gets its default, which keeps the older behaviour.


    Raises:
        UserError: it has keys or values that this version does not know.
    """
    return identity(recipe_from({"name": "written", "steps": 1, **written}, where))


def recipe_hash(recipe: Recipe) -> str:
    """XXH3-128 of the parts that determine the curve, hexadecimal."""
    return xxhash.xxh3_128_hexdigest(json.dumps(identity(recipe), sort_keys=True).encode())


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """`key: old -> new`, one line for each value that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines: list[str] = []
        for key in sorted(set(old) | set(new)):
            lines += differences(old.get(key, "(absent)"), new.get(key, "(absent)"), f"{where}.{key}".strip("."))
        return lines
    return [] if old == new else [f"{where}: {old!r} -> {new!r}"]


def dump(section: BaseModel) -> dict[str, Any]:
    """Plain values that read back to an equal recipe or cluster."""
    values: dict[str, Any] = section.model_dump(mode="json", exclude_none=False)
    return values


LARGEST_PROMPTS = 64 << 20
"""Largest file of prompts, in bytes."""


def prompts_of(path: Path) -> Sequence[str]:
    """Prompts of a text file, one per line.

    Raises:
        UserError: no such file, or none in it.
    """
    try:
        if path.stat().st_size > LARGEST_PROMPTS:
            raise UserError(
                f"{path}: has {path.stat().st_size:,} bytes; expected prompts of at most {LARGEST_PROMPTS:,}"
            )
        lines = [clean_text(line) for _, line in lines_of(decode_text(path.read_bytes()))]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as text: {error}") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise UserError(f"{path}: contains no prompts; expected one per line")
    return prompts
