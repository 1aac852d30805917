"""Text from anywhere: bytes to characters, captions to one line, JSON to values that can be written again. All jobs read text through here.

Bytes are UTF-8 unless a byte-order mark says UTF-8, UTF-16 or UTF-32, or the source names another `encoding`. Marks never stay in the
text. A caption is its words with single blanks between them; what is no character (surrogates, control codes) is replaced or left out,
and text with NULs is refused: it is UTF-16 whose mark is missing, or no text at all.
"""

from __future__ import annotations

import codecs
import io
import json
import math
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from nexus_scale.contracts import UserError

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
NO_CAPTION = "an empty or missing caption"
NOT_TEXT = "text that cannot be read"

_LARGEST = 2**63 - 1
_WHOLE = re.compile(r"[+-]?[0-9]{1,19}", re.ASCII)
_SURROGATE = re.compile("[\ud800-\udfff]")
_ESCAPED = re.compile("[\udc80-\udcff]")


class TextError(ValueError):
    """Text that is damaged, or not of the encoding that it is read as."""


def decode_text(data: bytes, encoding: str = "utf-8", whole: bool = True) -> str:
    """The characters of a file, without its byte-order mark.

    Args:
        whole: whether one damaged byte or NUL damages all; otherwise they stay in the text (`is_escaped`), for its lines to be judged one
            by one.
    Raises:
        TextError: bytes that are not of this encoding, or NULs.
    """
    for mark, name in MARKS:
        if data.startswith(mark):
            data, encoding = data[len(mark) :], name
            break
    try:
        text = data.decode(encoding, "strict" if whole else "surrogateescape")
    except (UnicodeError, LookupError) as error:
        raise TextError(f"not {encoding}: {error}; name the source's `encoding`") from error
    if whole and "\0" in text:
        raise TextError(
            f"NULs in it: no text, or UTF-16 without its mark, read as {encoding}; name the source's `encoding`"
        )
    return text


def is_escaped(text: str) -> bool:
    """Whether bytes in it could not be decoded."""
    return not text.isascii() and _ESCAPED.search(text) is not None


def check_encoding(name: str, where: str) -> None:
    """Raises UserError unless `name` is an encoding of text that this Python knows."""
    try:
        known = codecs.lookup(name)
        "".encode(name)
    except (LookupError, ValueError, UnicodeError):
        known = None
    if known is None or not getattr(known, "_is_text_encoding", True):
        raise UserError(
            f"{where}: encoding {name!r}: not known; expected one such as utf-8, utf-16, cp1252 or shift_jis."
        )


def clean_text(text: str) -> str:
    """Text of a caption: words with single blanks between them. Empty where nothing in it can be seen.

    Every separator of Unicode ends a word, lines (U+2028), paragraphs and NEL among them. Lone surrogates become U+FFFD; control codes and
    byte-order marks inside of the text are left out.

    Raises:
        TextError: NULs.
    """
    if "\0" in text:
        raise TextError("NULs in it: no text, or UTF-16 without its mark; name the source's `encoding`")
    if not text.isascii():
        text = _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text).replace("\N{ZERO WIDTH NO-BREAK SPACE}", "")
    words = " ".join(text.split())
    if not words.isprintable():
        words = "".join(sign for sign in words if unicodedata.category(sign) != "Cc")
        words = " ".join(words.split())
        if all(unicodedata.category(sign)[0] in "ZC" for sign in words):
            return ""
    return words


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end): lines end at LF, CR LF or CR alone, and nowhere else; U+2028, NEL, VT and FF are text."""
    yield from enumerate(io.StringIO(text, newline=""), start=1)


def json_of(data: bytes | str, encoding: str = "utf-8") -> Any:
    """A JSON value. Lone surrogates become U+FFFD; numbers that are not finite stay, so that they differ from null (`plain` makes them so).

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
    """As `json_of`, of an object.

    Raises:
        TextError: no JSON, or another value.
    """
    value = json_of(data, encoding)
    if not isinstance(value, dict):
        raise TextError(f"expected a JSON object, got {type(value).__name__}")
    return value


def plain(value: Any, finite: bool = True) -> Any:
    """A value of any table or JSON as one that JSON can say: surrogates become U+FFFD, and with `finite` numbers that are not so None."""
    if isinstance(value, str):
        return value if value.isascii() else _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", value)
    if isinstance(value, float):
        return value if math.isfinite(value) or not finite else None
    if isinstance(value, dict):
        return {plain(str(name)): plain(part, finite) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part, finite) for part in value]
    return value


def caption_of(value: Any, encoding: str = "utf-8") -> str:
    """A caption from whatever stands in its column; empty where it is null, NaN, or has nothing that can be seen.

    Raises:
        TextError: no text: a list, a mapping, damaged bytes.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        value = decode_text(value, encoding)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise TextError(f"a caption that is a {type(value).__name__}, expected text")
    return clean_text(value if isinstance(value, str) else str(value))


def label_of(value: Any) -> int | str | None:
    """A label: a whole number that 64 bits hold, or a name. None where it is no class: null, blank, a fraction, a list.

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
        raise TextError(f"label {str(value)[:40]}: expected a number that 64 bits hold")
    return int(value)
