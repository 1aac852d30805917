"""`find("models", "dit")`: the file's name is the registered name, so adding a family is adding a file.

A file `<name>.py` anywhere under a room holds one public class whose name, lower-cased, equals the file's name without
underscores (`mmdit.py` -> `MMDiT`). Its constructor is its schema: keyword-only, typed, defaults from the paper.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from nexus_scale.config.kinds import check_kind, shown
from nexus_scale.contracts import UserError

ROOMS = ("models", "objectives", "samplers", "callbacks")
_HOUSE = Path(__file__).parent.parent


@cache
def names(room: str) -> dict[str, str]:
    """Registered names of a room, each with its module."""
    assert room in ROOMS, room
    found = {}
    for file in sorted((_HOUSE / room).rglob("*.py")):
        if "layers" in file.relative_to(_HOUSE).parts:  # parts of networks, not networks
            continue
        text = file.read_text(encoding="utf-8").lower()
        if re.search(rf"^class {file.stem.replace('_', '')}\b", text, re.MULTILINE):
            found[file.stem] = ".".join(("nexus_scale", *file.relative_to(_HOUSE).with_suffix("").parts))
    return found


MANY = 40
"""More names than this are listed by their folders."""


def nearest(wrong: str, valid: list[str]) -> str:
    """'did you mean ...?', a list of the valid names (of many recipes their folders), or a note that there are none."""
    if not valid:
        return "there are none"
    close = difflib.get_close_matches(wrong[:100], valid, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    if len(valid) > MANY:
        valid = list(
            {f"{folder}/..." if inside else name for name in valid for folder, inside, _ in [name.partition("/")]}
        )
    return f"valid: {', '.join(sorted(valid))}"


def find(room: str, name: str) -> type[Any]:
    """The class registered under `name`.

    Raises:
        UserError: no such name; lists the nearest.
    """
    known = names(room)
    if name not in known:
        raise UserError(f"{room}: no {shown(name)} there; {nearest(name, list(known))}")
    module = importlib.import_module(known[name])
    for attribute, value in vars(module).items():
        if (
            inspect.isclass(value)
            and value.__module__ == module.__name__
            and attribute.lower() == name.replace("_", "")
        ):
            return value
    raise AssertionError(f"{known[name]} holds no class named like its file")


def check_arguments(
    cls: type[Any], arguments: Mapping[str, Any], where: str, injected: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Checks `arguments` against the constructor of `cls`; names in `injected` come from the program, not from the recipe.

    A number is finite, and not negative unless the constructor's annotation has bounds of its own.

    Returns:
        The arguments, coerced to the declared types (lists to tuples, ints to floats); defaults are left out.
    Raises:
        UserError: an unknown, missing or ill-typed argument; names the place, the key and the nearest valid one.
    """
    hints, schema = _schema(cls, injected)  # type: ignore[arg-type]  # a class can be hashed
    parameters = schema.model_fields
    for key in arguments:
        if key not in parameters:
            raise UserError(f"{where}.{key}: unknown key of {cls.__name__}; {nearest(str(key), list(parameters))}")
    for key, value in arguments.items():
        hint = hints.get(key, Any)
        check_kind(hint, value, f"{where}.{key}")
        if not _bounded(hint) and (negative := [n for n in _numbers(value) if n < 0]):
            raise UserError(f"{where}.{key}: expected 0 or more; got {shown(negative[0])}")
    try:
        checked = schema(**arguments)
    except ValidationError as error:
        raise UserError("\n".join(explain(error, where))) from None
    return {name: getattr(checked, name) for name in checked.model_fields_set}


@cache
def _schema(cls: type[Any], injected: frozenset[str]) -> tuple[dict[str, Any], type[BaseModel]]:
    """Types of a constructor's arguments, and the model that checks those that a recipe may give."""
    hints = get_type_hints(cls.__init__, include_extras=True)  # with bounds: Annotated[int, Field(ge=1)]
    fields: dict[str, Any] = {
        name: (hints.get(name, Any), ... if parameter.default is inspect.Parameter.empty else parameter.default)
        for name, parameter in inspect.signature(cls.__init__).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in injected
    }
    config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")
    return hints, create_model(f"{cls.__name__}Arguments", __config__=config, **fields)


def _bounded(hint: Any) -> bool:
    """Whether a type, or any part of it, has bounds of its own."""
    return get_origin(hint) is Annotated or any(map(_bounded, get_args(hint)))


def _numbers(value: Any) -> list[Any]:
    """A number, or the numbers of a list. Those of a mapping are named, and are checked by the code that reads it."""
    values = value if isinstance(value, list | tuple) else [value]
    return [one for one in values if isinstance(one, int | float)]


def made(cls: type[Any], arguments: Mapping[str, Any], where: str) -> Any:
    """An instance of `cls` from checked arguments. What its constructor refuses is a mistake in the recipe.

    Raises:
        UserError: names the place and what the constructor said.
    """
    try:
        return cls(**arguments)
    except UserError:
        raise
    except Exception as error:
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{where}: {cls.__name__} does not accept these arguments: {words}") from error


def explain(error: ValidationError, where: str) -> list[str]:
    """One line per mistake: the key, the value, what was expected."""
    lines = []
    for mistake in error.errors():
        key = ".".join([where, *map(str, mistake["loc"])]).strip(".")
        whole = mistake["type"] == "missing" or not mistake["loc"]  # the mistake is not in one value
        got = "" if whole else f"; got {shown(mistake['input'])}"
        message = mistake["msg"].removeprefix("Value error, ")
        lines.append(f"{key}: {message[0].lower()}{message[1:]}{got}".removeprefix(": "))
    return lines
