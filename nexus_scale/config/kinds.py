"""Strict types for recipe values: text is text, a number is finite, and true is not a number.

Pydantic alone takes `true` for 1, "5" for 5 and infinity for a number. What it checks beyond that, bounds above all, stays its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import BaseModel, GetCoreSchemaHandler, PlainValidator, TypeAdapter
from pydantic.fields import FieldInfo

from nexus_scale.contracts import UserError

LARGEST = 2**63 - 1
"""The largest whole number that files, generators and torch accept."""
_LIKE_A_NUMBER = frozenset("0123456789+-")


class Undecided(ValueError):
    """A value fits none of several types. `key`: the key that decides, empty for the whole value; `expected`: what would fit."""

    def __init__(self, key: str, expected: str):
        super().__init__(f"{key}: input should be {expected}".removeprefix(": "))
        self.key, self.expected = key, expected


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Stands beside a union in `Annotated` and tells by a value which type of the union it is of: mistakes are those of that type
    alone. `choose(value)` returns the type, or raises Undecided."""

    choose: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        made = tuple(kind for kind in get_args(source) if isinstance(kind, type) and issubclass(kind, BaseModel))

        def validated(value: Any) -> Any:
            return value if isinstance(value, made) else TypeAdapter(self.choose(value)).validate_python(value)

        return handler.generate_schema(Annotated[Any, PlainValidator(validated)])


def by_name(*sections: type[BaseModel], default: str | None = None) -> Callable[[Any], Any]:
    """A `choose` for sections with different `name`s; a mapping without one has the name `default`."""
    known = {section.model_fields["name"].default: section for section in sections}

    def choose(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise Undecided("", "a mapping")
        name = value.get("name", default)
        if not isinstance(name, str) or name not in known:
            raise Undecided("name", f"one of {', '.join(map(repr, known))}")
        return known[name]

    return choose


def decided(annotation: Any, value: Any) -> Any:
    """The type for a value, if the annotation has several and says how to choose.

    Raises:
        Undecided: it is of none of them.
    """
    if get_origin(annotation) is not Annotated:
        return annotation
    kind, *beside = get_args(annotation)
    markers = [marker for marker in beside if isinstance(marker, OneOf)]
    return markers[0].choose(value) if markers else kind


def check_kind(annotation: Any, value: Any, where: str) -> None:
    """Whether a plain value has the kind of a type, including the items of lists and mappings.

    Raises:
        UserError: names the place, what stands there, and what was expected.
    """
    for place, got, expected in _faults(annotation, value, where):
        words = f"{place}: input should be {expected}; got {shown(got)}{_hint(got, expected)}"
        raise UserError(words.removeprefix(": "))


def shown(value: Any) -> str:
    """A value as error messages show it: short, in YAML notation."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a whole number beyond 64 bits"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:120]}..."


def _hint(got: Any, expected: str) -> str:
    if expected == "text" and isinstance(got, bool):
        return " (yes, no, on and off are truth values; put the word in quotes)"
    if expected == "text" and isinstance(got, int | float):
        return " (put it in quotes)"
    if ("number" in expected or "integer" in expected) and isinstance(got, str) and got[:1] in _LIKE_A_NUMBER:
        return " (numbers are plain decimals, without quotes)"
    if isinstance(got, float) and not math.isfinite(got):
        return " (infinity and nan are no numbers here)"
    return ""


_Fault = tuple[str, Any, str]


def _faults(annotation: Any, value: Any, where: str) -> Iterator[_Fault]:
    """Place, value and expected kind of each value with the wrong kind."""
    origin = get_origin(annotation)
    if origin is Annotated:
        try:
            kind = decided(annotation, value)
        except Undecided as error:
            got = value.get(error.key) if error.key else value
            yield f"{where}.{error.key}".strip("."), got, error.expected
            return
        yield from _faults(kind, value, where)
    elif origin in (Union, UnionType):
        yield from _none_of(get_args(annotation), value, where)
    elif origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in get_args(annotation)):
            yield where, value, _words(annotation)
    elif annotation in _SCALARS:
        if not _SCALARS[annotation][0](value):
            yield where, value, _SCALARS[annotation][1]
    elif origin in (list, tuple, Sequence):
        yield from _in_list(origin, get_args(annotation), value, where)
    elif origin in (dict, Mapping):
        yield from _in_mapping(get_args(annotation), value, where)
    elif fields := _fields(annotation):
        if isinstance(value, Mapping):
            for name, one in value.items():
                yield from _faults(fields.get(str(name), Any), one, f"{where}.{name}".removeprefix("."))
        elif not isinstance(value, annotation):
            yield where, value, "a mapping"
    elif annotation is Any:
        yield from _not_plain(value, where)


def _none_of(choices: Sequence[Any], value: Any, where: str) -> Iterator[_Fault]:
    found = []
    for choice in choices:
        faults = list(_faults(choice, value, where))
        if not faults:
            return
        found.append(faults)
    within = [faults for faults in found if faults[0][0] != where]  # the right choice, with a mistake inside it
    if within:
        yield from within[0]
    else:
        yield where, value, " or ".join(dict.fromkeys(_words(choice) for choice in choices))


def _in_list(origin: Any, arguments: tuple[Any, ...], value: Any, where: str) -> Iterator[_Fault]:
    if not isinstance(value, list | tuple):
        yield where, value, "a list"
        return
    each = arguments[0] if origin is not tuple or arguments[1:] == (...,) else None
    for i, one in enumerate(value):
        kind = each if each is not None else arguments[i] if i < len(arguments) else Any
        yield from _faults(kind, one, f"{where}.{i}")


def _in_mapping(arguments: tuple[Any, ...], value: Any, where: str) -> Iterator[_Fault]:
    if not isinstance(value, Mapping):
        yield where, value, "a mapping"
        return
    for name, one in value.items():
        if not isinstance(name, str):
            yield where, name, "text, as keys are"
        yield from _faults(arguments[1] if arguments else Any, one, f"{where}.{name}")


def _not_plain(value: Any, where: str) -> Iterator[_Fault]:
    """Numbers that are not finite, where values of any kind are allowed."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not is_number(value):
            yield where, value, "a valid number"
    elif isinstance(value, Mapping):
        yield from _in_mapping((), value, where)
    elif isinstance(value, list | tuple):
        for i, one in enumerate(value):
            yield from _not_plain(one, f"{where}.{i}")


def annotation_of(field: FieldInfo) -> Any:
    """A section field's annotation, with the markers that pydantic keeps apart from the type."""
    markers = [marker for marker in field.metadata if isinstance(marker, OneOf)]
    return Annotated[field.annotation, *markers] if markers else field.annotation


def _fields(annotation: Any) -> dict[str, Any]:
    """Types of the fields of a section or a dataclass, by name."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {name: annotation_of(field) for name, field in annotation.model_fields.items()}
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return get_type_hints(annotation)
    return {}


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that files and torch accept; true is not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST if isinstance(value, int) else math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return is_number(value) and abs(value) <= LARGEST and value == int(value)


_SCALARS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    bool: (lambda value: isinstance(value, bool), "a valid boolean"),
    int: (_is_whole, "a valid integer"),
    float: (is_number, "a valid number"),
    str: (lambda value: isinstance(value, str), "text"),
    None: (lambda value: value is None, "null"),
    NoneType: (lambda value: value is None, "null"),
}


def _words(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _words(get_args(annotation)[0])
    if origin is Literal:
        choices = [repr(choice) if isinstance(choice, str) else shown(choice) for choice in get_args(annotation)]
        return choices[0] if len(choices) == 1 else f"one of {', '.join(choices)}"
    if annotation in _SCALARS:
        return _SCALARS[annotation][1]
    return "a list" if origin in (list, tuple, Sequence) else "a mapping"
