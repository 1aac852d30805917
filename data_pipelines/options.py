"""The options of a job, stated once: name, type, default, bounds and help of each.

The arguments of `run` and `done`, the check of a recipe's `prepare:`, the command line and its `--help` all follow from one class:

    class Options(JobOptions):
        input: str = option(description="folder of clips below the data root")
        segment_seconds: float = option(gt=0, le=3600, description="length of a segment")

An option stands on the command line as `--segment-seconds VALUE`. One that does not fit a single value names another `Flag` in its type:
`codec: Annotated[Mapping[str, Any], OneOf(run="name of a codec's run", folder="folder of an EncodecModel")]`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from data_pipelines.output_folder import output_name
from nexus_scale.config.kinds import check_kind
from nexus_scale.config.recipe import NAME
from nexus_scale.config.registry import explain, nearest
from nexus_scale.contracts import UserError

Number = int | float
"""A number kept as it was given. 4 and 4.0 sign data differently, and data that an earlier version made from a recipe's 4 must be
recognised; pydantic makes 4.0 of a plain `float`."""


option = Field
"""One option: `option(default, description=..., ge=..., le=...)`, without a default where it must be given."""


class Options(BaseModel):
    """Base of all options classes: frozen values of the declared types."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str) -> Self:
        """The options with these values, checked: names, types, bounds, and what `check` adds.

        Args:
            values: as a recipe's `prepare:` or a call of `run` gives them.
            where: what error messages begin with, such as `prepare: cut_segments`.
        Raises:
            UserError: names the option, what was got and what was expected.
        """
        fields = cls.model_fields
        for key in values:
            if key not in fields:
                raise UserError(f"{where}: unknown key {key!r}; {nearest(str(key), list(fields))}")
        for key, field in fields.items():
            if field.is_required() and key not in values:
                raise UserError(f"{where}: {key!r} is missing")
        if "output" in values:
            output_name(values["output"])
        try:
            for key, value in values.items():
                _check_value(fields[key].annotation, value, f"{where}.{key}")
            options = cls(**values)
        except ValidationError as error:
            raise UserError("\n".join(explain(error, where))) from None
        try:
            options.check()
        except UserError as error:
            raise UserError(f"{where}: {error}", error.code) from None
        return options

    def check(self) -> None:
        """Raises UserError where values do not fit each other. Types and bounds are checked before."""

    @classmethod
    def add_to(cls, command: argparse.ArgumentParser) -> None:
        """Adds an argument for each option."""
        for name, field in cls.model_fields.items():
            _flag(field).add(command, name, field)

    @classmethod
    def from_arguments(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        """The values that `of` takes, from parsed arguments of `add_to`.

        Raises:
            UserError: arguments that do not fit each other.
        """
        given = {name: _flag(field).take(arguments, name) for name, field in cls.model_fields.items()}
        return {name: value for name, value in given.items() if value is not UNSET}


class JobOptions(Options):
    """Base of the options of a job: all jobs make a folder."""

    output: str = option(description="folder to make, below the data root")


def _check_value(kind: Any, value: Any, key: str) -> None:
    check_kind(kind, value, key)
    if isinstance(value, Mapping) and "run" in value:
        run = value["run"]
        if not isinstance(run, str) or re.fullmatch(NAME, run) is None:
            raise UserError(f"{key}.run: got {run!r}, expected the plain name of a run, without a path")


# ------------------------------------------------------------------------------------------------- the command line


UNSET: Any = object()
"""The value of an option that the command line leaves to its default."""


class Flag:
    """How an option is given on the command line: as `--its-name VALUE`, or as subclasses say."""

    def add(self, command: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
        """Adds the option's arguments."""
        kind, several = _kind(field.annotation)
        if kind is bool:
            command.add_argument(dashed(name), action="store_true", help=help_of(field))
            return
        allows_none = NoneType in get_args(field.annotation) and field.default is not None
        command.add_argument(
            dashed(name),
            type=_or_none(kind) if allows_none else kind,
            nargs="+" if several else None,
            choices=get_args(field.annotation) if get_origin(field.annotation) is Literal else None,
            required=field.is_required(),
            default=None if field.is_required() else field.default,
            help=help_of(field),
        )

    def take(self, arguments: dict[str, Any], name: str) -> Any:
        """The option's value; takes what `add` added out of the parsed arguments."""
        return arguments.pop(name)


class Positional(Flag):
    """An option that the command line gives without a name before it."""

    def add(self, command: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
        command.add_argument(name, metavar=name.upper(), help=help_of(field))


class Hidden(Flag):
    """An option that the command line gives by another one."""

    def add(self, command: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
        pass

    def take(self, arguments: dict[str, Any], name: str) -> Any:
        return UNSET


@dataclass(frozen=True)
class Repeated(Flag):
    """An option of several values, each with the name before it: `--ignore a --ignore b`."""

    metavar: str | None = None

    def add(self, command: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
        command.add_argument(dashed(name), action="append", metavar=self.metavar, help=help_of(field))

    def take(self, arguments: dict[str, Any], name: str) -> Any:
        return arguments.pop(name) or UNSET


class OneOf(Flag):
    """A mapping with one key of several: `--codec-run NAME` or `--codec-folder PATH` for {run: NAME} or {folder: PATH}.

    Args:
        kinds: help by key.
    """

    def __init__(self, **kinds: str):
        self.kinds = kinds

    def add(self, command: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
        group = command.add_mutually_exclusive_group(required=field.is_required())
        for kind, words in self.kinds.items():
            group.add_argument(f"{dashed(name)}-{kind}", help=words)

    def take(self, arguments: dict[str, Any], name: str) -> Any:
        given = {kind: arguments.pop(f"{name}_{kind}") for kind in self.kinds}
        return next({kind: value} for kind, value in given.items() if value is not None)


class ListOf(Flag):
    """A list of mappings with one key each: `--package a --folder b` for [{package: a}, {folder: b}].

    Args:
        kinds: help by key.
    """

    def __init__(self, **kinds: str):
        self.kinds = kinds

    def add(self, command: argparse.ArgumentParser, name: str, field: FieldInfo) -> None:
        for kind, words in self.kinds.items():
            command.add_argument(dashed(kind), action="append", default=[], help=f"{words}; may be repeated")

    def take(self, arguments: dict[str, Any], name: str) -> Any:
        return [{kind: value} for kind in self.kinds for value in arguments.pop(kind)]


def dashed(name: str) -> str:
    """`shard_clips` as `--shard-clips`."""
    return f"--{name.replace('_', '-')}"


def help_of(field: FieldInfo) -> str:
    """What `--help` says of an option: its description, and its default where that says something."""
    default = field.default
    if field.is_required() or default is None or default is False or default == () or default == "":
        return field.description or ""
    shown = (
        " ".join(map(str, default))
        if isinstance(default, tuple)
        else f"{default:g}"
        if isinstance(default, float)
        else default
    )
    return f"{field.description or ''} (default: {shown})".strip()


def _flag(field: FieldInfo) -> Flag:
    return next((mark for mark in field.metadata if isinstance(mark, Flag)), Flag())


def _kind(annotation: Any) -> tuple[Callable[[str], Any], bool]:
    """What one value on the command line is read as, and whether several may follow each other."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        kinds = [one for one in arguments if one is not NoneType]
        return _kind(float if set(kinds) == {int, float} else kinds[0])
    if origin is Literal:
        return str, False
    if origin is Sequence:
        return arguments[0], True
    assert annotation in (str, int, float, bool), annotation
    return annotation, False


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        return None if text == "none" else kind(text)

    return read
