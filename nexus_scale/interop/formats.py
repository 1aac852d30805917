"""A family's format in another library, as tables: where its tensors lie, and what its arguments are called there.

A `Format` is data. Everything that reads or writes weights walks it: `to_theirs` and `to_ours` for tensors in memory, `write` and `read`
for folders and files, `layout` and `check_copies` for a rank that reads its own part (`init_from`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nexus_scale.config import registry
from nexus_scale.contracts import ReadShard, UserError
from nexus_scale.interop.folders import (
    DIFFUSERS_WEIGHTS,
    network_folder,
    parsed_config,
    read_tensors,
    weight_files,
    write_json,
    write_tensors,
)
from nexus_scale.interop.layout import (
    Layout,
    Rows,
    SafetensorsFiles,
    apart,
    left_out,
    of_now,
    opened_files,
    swapped,
    to_ours,
    to_theirs,
    whole,
)
from nexus_scale.io.durable import atomic_write

State = Mapping[str, Tensor]
Shape = tuple[int, ...]

# ------------------------------------------------------------------------------- what a row of a table may be
#
# A table maps our modules to theirs, whose `.weight` and `.bias` go along; or one parameter of ours to one of theirs, by its whole name.
# `#` stands for the number of a block, the same in both names.


class Apart(NamedTuple):
    """Our fused tensor is theirs one after another, in equal parts; with `rows`, each but the last has as many rows as that attribute.

    `fused` is what they call it where they keep it whole, which is read too.
    """

    names: tuple[str, ...]
    rows: str | None = None
    fused: str | None = None


class Swapped(NamedTuple):
    """Our first half is their second: (shift, scale) <-> (scale, shift)."""

    name: str


class Patches(NamedTuple):
    """A convolution there, whose kernel we hold as a matrix."""

    name: str


class Pointwise(NamedTuple):
    """A convolution of kernel 1 there, which we hold as a matrix."""

    name: str


class Stacked(NamedTuple):
    """Our first dimension counts their tensors; `#` in the name is their number."""

    name: str


Row = str | Apart | Swapped | Patches | Pointwise | Stacked | tuple[Rows, ...]
Table = Mapping[str, Row]


class Key(NamedTuple):
    """A setting of their config: what they assume where it is left out, and our argument, or what makes it of our network; `valid`: the
    values that we have, where weights do not tell."""

    default: Any
    ours: str | Callable[[Any], Any]
    valid: tuple[Any, ...] | None = None


class Copy(NamedTuple):
    """A tensor of theirs that repeats one of ours, or the `entry`-th in it; `differs` is the error where it does not."""

    of: str
    differs: str
    entry: int | None = None


class Made(NamedTuple):
    """A tensor of theirs that we compute, `make(net)`.

    Attributes:
        tolerance: by which a stored one may differ from it; None: by anything.
        differs: the error where it does.
        needed, written: whether it must be stored, and whether we store it.
    """

    make: Callable[[Any], Tensor]
    tolerance: float | None = None
    differs: str = ""
    needed: bool = False
    written: bool = True


class Shapes(dict[str, Shape]):
    """The shapes of a checkpoint, from which a format without a config is told its arguments."""

    what: str = "checkpoint"

    def of(self, key: str) -> Shape:
        """Raises a UserError where there is no such tensor."""
        if key not in self:
            raise UserError(f"{self.what}: {key} is missing; the checkpoint is incomplete or of another architecture")
        return self[key]

    def count(self, pattern: str) -> int:
        """Different numbers that the group of `pattern` finds at the beginning of keys."""
        return len({match[1] for key in self if (match := re.match(pattern, key))})


# ------------------------------------------------------------------------------------------------ a format


@dataclass(frozen=True)
class Format:
    """How one library stores one family.

    Attributes:
        network: registered name of the family.
        what: how errors call its weights.
        table: of a network of ours; see `Row`.
        class_name: theirs; of a folder with a config. `also`: what folders written elsewhere call it besides.
        config: their settings by name, those that vary; `section.name` is one of a section of its own.
        constants: their settings that our network has only one value of.
        none_means: settings that may be null, and the setting whose value they then have.
        arguments: ours that are no single setting of theirs, from their config.
        loose: settings that need not come back as they were.
        from_shapes: our arguments, of a format that has no config.
        fixed: arguments of ours that have only one value there.
        free: arguments that no weight depends on.
        computed: tensors beside the table.
        prepared: the same network's weights and arguments as the format can hold them, on the way out.
        old_names: parts of tensors' names in older files, with what stands there now.
        others: what names of other networks' tensors in the same files begin with, ending with a dot; they are left alone.
        variants: another spelling of their tensors brought to the table's, on the way in.
        file: name of the weights, `prefix` of keys in it.
        part: folder of the network in a pipeline.
        model_type: transformers' word for the class, in place of `_class_name`.
        beside: further JSON files, from their config.
        carried: files of `interop/carried/` that the folder is read with.
        example: Python that loads a network's own folder and calls it; `folder` is in scope.
        named_by: of a format without a config: whose names tensors have.
    """

    network: str
    what: str
    table: Callable[[Any], Table]
    class_name: str = ""
    config: Mapping[str, Key] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    none_means: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Callable[[Mapping[str, Any]], Any]] = field(default_factory=dict)
    loose: Sequence[str] = ()
    from_shapes: Callable[[Shapes], dict[str, Any]] | None = None
    fixed: Mapping[str, Any] = field(default_factory=dict)
    free: Sequence[str] = ()
    computed: Callable[[Any], Mapping[str, Copy | Made]] = lambda net: {}
    prepared: Callable[[State, dict[str, Any]], tuple[State, dict[str, Any]]] = lambda state, args: (state, args)
    old_names: Mapping[str, str] = field(default_factory=dict)
    others: Sequence[str] = ()
    variants: Callable[[Any, dict[str, Tensor]], dict[str, Tensor]] = lambda net, state: state
    file: str = DIFFUSERS_WEIGHTS
    prefix: str = ""
    part: str = "transformer"
    model_type: str | None = None
    beside: Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Any]]] = lambda config: {}
    carried: Sequence[str] = ()
    example: str = ""
    also: Sequence[str] = ()
    named_by: str = "the original release, whose code makes"

    # ---------------------------------------------------------------------------------------- networks, layouts

    def network_of(self, model_args: Mapping[str, Any]) -> Any:
        """Our network of these arguments, on the meta device."""
        with torch.device("meta"):
            return registry.find("models", self.network)(**model_args)

    def layout(self, net: Any) -> Layout:
        """Where each tensor of our network lies in theirs, without `prefix`."""
        table = self.table(net)
        return {name: _rows(table, name, tuple(p.shape), net) for name, p in net.state_dict().items()}

    # --------------------------------------------------------------------------------------------- their config

    def config_of(self, net: Any, **more: Any) -> dict[str, Any]:
        """Their config of our network, JSON values; `more` are settings that no network knows."""
        if self.model_type is not None:
            name = {"architectures": [self.class_name], "model_type": self.model_type, "torch_dtype": "float32"}
        else:
            name = {"_class_name": self.class_name, "_diffusers_version": "0.42.1"}
        return {**name, **_in_sections(self._settings(net)), **more}

    def _settings(self, net: Any) -> dict[str, Any]:
        """Their settings of our network by name, those of sections too."""
        own = {key: _read(net, each.ours) for key, each in self.config.items()}
        settings: dict[str, Any] = _json({**own, **self.constants})
        return settings

    def model_args(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of our network from their config.

        Raises:
            UserError: of another class, or with settings that our network does not have.
        """
        self.check_class(config, Path("config.json"))
        full = {key: each.default for key, each in self.config.items()} | dict(self.constants) | _by_name(config)
        full |= {key: full[other] for key, other in self.none_means.items() if full[key] is None}
        for key, only in self.constants.items():
            if _json(full[key]) != _json(only):
                raise UserError(f"config.json: {key} is {full[key]!r}; {self._ours} has only {only!r} here")
        for key, each in self.config.items():
            if each.valid is not None and full[key] not in each.valid:
                valid = " or ".join(map(repr, each.valid))
                raise UserError(f"config.json: {key} is {full[key]!r}; {self._ours} has only {valid} here")
        try:
            args = {each.ours: _tuple(full[key]) for key, each in self.config.items() if isinstance(each.ours, str)}
            args |= {name: of(full) for name, of in self.arguments.items()}
            again = self._settings(self.network_of(args))
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"config.json: its settings are not of a {self.class_name} that {self._ours} can be: {error}"
            ) from None
        for key in self.config:
            if key not in self.loose and _json(full[key]) != again[key]:
                raise UserError(f"config.json: {key} is {full[key]!r}; {self._ours} has only {again[key]!r} here")
        return args

    def check_class(self, config: Any, file: Path) -> None:
        """Raises a UserError where a config is of another class; a live model's does not name its own."""
        key, valid = ("model_type", self.model_type) if self.model_type else ("_class_name", self.class_name)
        got = config.get(key, valid) if isinstance(config, Mapping) else type(config).__name__
        if got != valid and got not in self.also:
            raise UserError(
                f"{file}: {key} is {got!r}; expected {valid!r}"
                if self.model_type
                else f"{file}: is of {got!r}; expected {valid}"
            )

    @property
    def _ours(self) -> str:
        return registry.find("models", self.network).__name__

    # ------------------------------------------------------------------------------------------ tensors in memory

    def to_theirs(
        self, state: State, model_args: Mapping[str, Any], **more: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A config and a state dict that their class takes; tensors may share memory with `state`.

        Args:
            state: of our network.
            model_args: its constructor's arguments; defaults may be left out.
            more: settings for the config that no network knows.
        Raises:
            UserError: what their class cannot express; a state dict of another network.
        """
        expected = set(self.network_of(model_args).state_dict())
        if expected != set(state):
            missing, extra = sorted(expected - set(state))[:3], sorted(set(state) - expected)[:3]
            raise UserError(
                f"the {self._ours} state dict does not fit its arguments: missing {missing}, not expected {extra}"
            )
        state, args = self.prepared(state, dict(model_args))
        net = self.network_of(args)
        for name, only in self.fixed.items():
            if (got := getattr(net, name)) != only:
                raise UserError(
                    f"{self.class_name or self.what} has {name} {only!r} fixed; got {got!r}: this network cannot be exported"
                )
        config = self.config_of(net, **more) if self.class_name else {}
        return config, self.theirs_of(net, state)

    def theirs_of(self, net: Any, state: State) -> dict[str, Tensor]:
        """Their tensors, with `prefix`, of a network as the format can hold it."""
        theirs = to_theirs(self.layout(net), state)
        for key, each in self.computed(net).items():
            if isinstance(each, Copy):
                theirs[key] = state[each.of] if each.entry is None else state[each.of][each.entry]
            elif each.written:
                theirs[key] = each.make(net)
        return {f"{self.prefix}{key}": tensor for key, tensor in theirs.items()}

    def to_ours(
        self, config: Mapping[str, Any] | None, state: State, model_args: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The inverse of `to_theirs`.

        Args:
            config: theirs; None for a format without one.
            model_args: read off the tensors' shapes unless given, where there is no config.
        Returns:
            Arguments of our network, and its state dict.
        Raises:
            UserError: a config or weights that are not this family's.
        """
        left = {key.removeprefix(self.prefix): tensor for key, tensor in state.items() if key.startswith(self.prefix)}
        named = {of_now(key, self.old_names): tensor for key, tensor in (left or state).items()}
        left = {key: tensor for key, tensor in named.items() if not left_out(key, self.others)}
        if config is not None:
            args = self.model_args(config)
        else:
            args = dict(model_args or self.args_of_shapes({key: tuple(t.shape) for key, t in left.items()}))
        net = self.network_of(args)
        left = self.variants(net, _unfused(self.table(net), left, self.what))
        beside = self.computed(net)
        stored = {key: left.pop(key) for key in beside if key in left}
        shapes = {name: tuple(p.shape) for name, p in net.state_dict().items()}
        ours = to_ours(self.layout(net), left, shapes, self.what)
        for key, each in beside.items():
            self._compare(key, each, stored.get(key), net, ours)
        return args, ours

    def args_of_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Any]:
        """Our arguments from the shapes of a checkpoint, keys without `prefix`."""
        assert self.from_shapes is not None, self.what
        named = Shapes(shapes)
        named.what = self.what
        return self.from_shapes(named)

    def _compare(self, key: str, each: Copy | Made, stored: Tensor | None, net: Any, ours: State) -> None:
        if stored is None:
            if isinstance(each, Made) and each.needed:
                raise UserError(
                    f"{self.what}: {key} is missing; the checkpoint is incomplete or of another architecture"
                )
            return
        if isinstance(each, Copy):
            source = ours[each.of] if each.entry is None else ours[each.of][each.entry]
            if not torch.equal(stored, source):
                raise UserError(f"{self.what}: {each.differs}")
        elif each.tolerance is not None:
            expected = each.make(net)
            if stored.shape != expected.shape or (stored.float() - expected).abs().max() > each.tolerance:
                raise UserError(f"{self.what}: {key} {each.differs}")

    def check_copies(self, net: Any, read: ReadShard, files: SafetensorsFiles, what: str) -> None:
        """That what they store several times is the same everywhere, tensor by tensor.

        Raises:
            UserError: they were trained apart.
        """
        there = files.shapes()
        for key, each in self.computed(net).items():
            if isinstance(each, Copy) and key in there:
                size = math.prod(there[key])
                start = size * (each.entry or 0)
                if not torch.equal(files.values(key, 0, size).float(), read(each.of, start, start + size)):
                    raise UserError(f"{what}: {each.differs}")

    # -------------------------------------------------------------------------------------------------- folders

    def write(self, folder: Path | str, state: State, model_args: Mapping[str, Any], **more: Any) -> Path:
        """Writes what their class loads: its config, where it has one, and the weights. Returns the folder.

        Raises as `to_theirs`.
        """
        folder = Path(folder)
        config, tensors = self.to_theirs(state, model_args, **more)
        write_tensors(folder / self.file, own_memory(tensors))
        if config:
            write_json(folder / "config.json", config)
        for name, values in self.beside(config).items():
            write_json(folder / name, values)
        self.carry_into(folder)
        return folder

    def carry_into(self, folder: Path) -> None:
        """Writes the code that the folder is read with, where no library has it."""
        for name in self.carried:
            carry(name, folder)

    @property
    def names(self) -> list[str]:
        """Where the class is found and what it is called, as a pipeline's index has it."""
        return [Path(self.carried[0]).stem if self.carried else "diffusers", self.class_name]

    def read(
        self, path: Path | str, model_args: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Arguments and state dict of our network from a folder of theirs, alone or within a pipeline, or from a file that has no config.

        Raises:
            UserError: no such folder, not safetensors, or not of this family.
        """
        if not self.class_name:
            with opened_files([Path(path)], prefix=self.prefix) as files:
                return self.to_ours(None, files.tensors(), model_args)
        folder = network_folder(path, self.part)
        return self.to_ours(self.read_config(folder), read_tensors(weight_files(folder, self.file)))

    def read_config(self, folder: Path) -> dict[str, Any]:
        """Their config of a network's own folder.

        Raises:
            UserError: not there, not JSON, or of another class.
        """
        config = parsed_config(folder, self.class_name)
        key = "model_type" if self.model_type else "_class_name"
        named = isinstance(config, dict) and key in config
        self.check_class(config if named or not isinstance(config, dict) else {key: None}, folder / "config.json")
        return dict(config)


# ------------------------------------------------------------------------------------------- walking a table


def _rows(table: Table, name: str, shape: Shape, net: Any) -> tuple[Rows, ...]:
    """Where one of our tensors lies."""
    row, tail = _row(table, name)
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)

    def named(theirs: str) -> str:
        parts = iter(numbers)
        return re.sub("#", lambda _: next(parts), theirs) + tail

    if isinstance(row, str):
        return whole(named(row), shape)
    if isinstance(row, Swapped):
        return swapped(named(row.name), shape)
    if isinstance(row, Patches):
        patch = net.patch_size
        kernel = (shape[0], shape[-1] // patch**2, patch, patch)
        return whole(named(row.name), kernel if tail == ".weight" else shape)
    if isinstance(row, Pointwise):
        return whole(named(row.name), (*shape, 1, 1) if tail == ".weight" else shape)
    if isinstance(row, Stacked):
        one = shape[1:] or (1,)
        return tuple(Rows(row.name.replace("#", str(k)) + tail, 0, one[0], one) for k in range(shape[0]))
    if isinstance(row, Apart):
        count = len(row.names)
        each = shape[0] // count if row.rows is None else getattr(net, row.rows)
        counts = [*[each] * (count - 1), shape[0] - each * (count - 1)]
        return apart([named(part) for part in row.names], counts, shape[1:])
    return row


def _row(table: Table, name: str) -> tuple[Row, str]:
    """A tensor's row, and what of its name goes along. The row of one block comes before that of all blocks."""
    module, _, kind = name.rpartition(".")
    for key, tail in ((name, ""), (hashed(name), ""), (module, f".{kind}"), (hashed(module), f".{kind}")):
        if key in table:
            return table[key], tail
    raise AssertionError(f"{name} is in no row of the table")


def hashed(name: str) -> str:
    """A name with `#` for its numbers, as tables have it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "#", name)


def _unfused(table: Table, state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """The state dict with tensors that they keep whole cut into the table's parts; both may be there if they agree.

    Raises:
        UserError: they differ.
    """
    for row in table.values():
        if not isinstance(row, Apart) or row.fused is None:
            continue
        pattern = re.escape(row.fused).replace(r"\#", r"(\d+)") + r"(\.\w+)"
        for key in [key for key in state if re.fullmatch(pattern, key)]:
            match = re.fullmatch(pattern, key)
            assert match is not None
            names = [part.replace("#", match[1]) + match[2] for part in row.names]
            for name, part in zip(names, state.pop(key).chunk(len(names)), strict=True):
                if name in state and not torch.equal(state[name], part):
                    raise UserError(
                        f"{what}: {key} and {', '.join(names)} differ; remove the stale ones (unfuse_qkv_projections() before saving)"
                    )
                state[name] = part
    return state


def fused(table: Callable[[Any], Table]) -> Callable[[Any], Table]:
    """The table of a network that they keep fused where they can."""
    return lambda net: {
        ours: row.fused if isinstance(row, Apart) and row.fused else row for ours, row in table(net).items()
    }


def _read(net: Any, ours: str | Callable[[Any], Any]) -> Any:
    return getattr(net, ours) if isinstance(ours, str) else ours(net)


def _in_sections(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config of settings by name, `section.name` in their sections."""
    config: dict[str, Any] = {}
    for name, value in settings.items():
        section, _, own = name.rpartition(".")
        (config.setdefault(section, {}) if section else config)[own] = value
    return config


def _by_name(config: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse: a config's settings, and those of its sections by `section.name`."""
    inner = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    named = {f"{section}.{name}": value for section, values in inner.items() for name, value in values.items()}
    return {**named, **config}


def _json(value: Any) -> Any:
    """As JSON gives it back: tuples are lists."""
    if isinstance(value, Mapping):
        return {key: _json(inner) for key, inner in value.items()}
    return [_json(inner) for inner in value] if isinstance(value, list | tuple) else value


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def carry(name: str, folder: Path, changes: Mapping[str, str] | None = None) -> None:
    """Writes a file of `interop/carried/` into a folder, with words of it changed."""
    source = (Path(__file__).parent / "carried" / name).read_text(encoding="utf-8")
    for before, after in (changes or {}).items():
        assert before in source, before
        source = source.replace(before, after)
    atomic_write(folder / name, source)


def own_memory(tensors: State) -> dict[str, Tensor]:
    """safetensors takes no tensor for two: what shares memory is copied."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        place = tensor.data_ptr()
        own[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return own


def own_format(
    network: str, what: str, from_shapes: Callable[[Shapes], dict[str, Any]], free: Sequence[str] = ()
) -> Format:
    """A file of our own names, `model.safetensors`, for a network whose weights no other program has."""
    return Format(
        network,
        what,
        lambda net: {name: name for name in net.state_dict()},
        from_shapes=from_shapes,
        free=free,
        file="model.safetensors",
        named_by="nexus-scale, which makes",
    )
