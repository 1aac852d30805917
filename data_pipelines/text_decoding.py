"""Captions, labels and JSON, whoever wrote them, as values that can be written again. nexus_scale.io.plain_text decodes the text itself."""

from __future__ import annotations

import codecs
import json
import math
import re
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.io.plain_text import TextError, clean_text, decode_text, replace_surrogates

NO_CAPTION = "an empty or missing caption"

_LARGEST = 2**63 - 1
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}", re.ASCII)


def check_encoding(name: str, where: str) -> None:
    """Raises UserError unless `name` is an encoding of text that this Python knows."""
    try:
        known = codecs.lookup(name)
        "".encode(name)
    except (LookupError, ValueError, UnicodeError):
        known = None
    if known is None or not getattr(known, "_is_text_encoding", True):
        raise UserError(
            f"{where}: encoding {name!r}: unknown; expected one such as utf-8, utf-16, cp1252 or shift_jis."
        )


def json_of(data: bytes | str, encoding: str = "utf-8") -> Any:
    """The JSON value of a text. Lone surrogates become U+FFFD. Numbers that are not finite stay, so that they differ from null; `plain`
    makes them null.

    Raises:
        TextError: no JSON, or nested too deeply.
    """
    text = decode_text(data, encoding) if isinstance(data, bytes) else data
    try:
        return plain(json.loads(text), finite=False)
    except TextError:
        raise
    except (ValueError, RecursionError) as error:
        raise TextError(f"no JSON: {error}") from error


def json_object(data: bytes | str, encoding: str = "utf-8") -> dict[str, Any]:
    """The JSON object of a text, see `json_of`.

    Raises:
        TextError: no JSON, or another value.
    """
    value = json_of(data, encoding)
    if not isinstance(value, dict):
        raise TextError(f"expected a JSON object, got {type(value).__name__}")
    return value


def plain(value: Any, finite: bool = True) -> Any:
    """A value of a table or of JSON as JSON can hold it: surrogates become U+FFFD; with `finite`, numbers that are not finite become
    None."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, float):
        return value if math.isfinite(value) or not finite else None
    if isinstance(value, dict):
        return {plain(str(name)): plain(part, finite) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part, finite) for part in value]
    return value


def caption_of(value: Any, encoding: str = "utf-8") -> str:
    """The caption in a column's value; empty where it is null, NaN, or has no visible character.

    Raises:
        TextError: it is no text: a list, a mapping, damaged bytes.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        value = decode_text(value, encoding)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TextError(f"a caption that is a {type(value).__name__}, expected text")
    return clean_text(value if isinstance(value, str) else str(value))


def label_of(value: Any) -> int | str | None:
    """The label in a column's value: a whole number from 0 on that fits 64 bits, or a name. None where it is no class: null, blank, a
    fraction, a list, or a negative number, which many sets use for "none".

    Raises:
        TextError: a number that is too large.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str):
        name = clean_text(value)
        if not _WHOLE.fullmatch(name):
            return name or None
        value = int(name)
    if not isinstance(value, int):
        return None
    if not -_LARGEST <= value <= _LARGEST:
        raise TextError(f"label {str(value)[:40]}: expected a number that fits 64 bits")
    return int(value) if value >= 0 else None
