"""Text from anywhere: bytes to characters, captions and prompts to one line. All text that people give is read through here.

Bytes are UTF-8 unless a byte-order mark says UTF-8, UTF-16 or UTF-32, or an `encoding` is named. Marks never stay in the text. A caption is
its words with single blanks between them; what is no character (surrogates, control codes) is replaced or left out, and text with NULs is
refused: it is UTF-16 whose mark is missing, or no text at all.
"""

from __future__ import annotations

import codecs
import io
import re
import unicodedata
from collections.abc import Iterator

MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16's, with which it begins
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

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
        raise TextError(f"not {encoding}: {error}; save it as UTF-8, or name the source's `encoding`") from error
    if whole and "\0" in text:
        raise TextError(
            f"contains NUL bytes as {encoding}: not text, or UTF-16 without a byte order mark; save it as UTF-8, or name the "
            "source's `encoding`"
        )
    return text


def is_escaped(text: str) -> bool:
    """Whether bytes in it could not be decoded."""
    return not text.isascii() and _ESCAPED.search(text) is not None


def replace_surrogates(text: str) -> str:
    """Text that can be written: lone surrogates as U+FFFD."""
    return text if text.isascii() else _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def clean_text(text: str) -> str:
    """Text of a caption: words with single blanks between them. Empty where nothing in it can be seen.

    Every separator of Unicode ends a word, lines (U+2028), paragraphs and NEL among them. Lone surrogates become U+FFFD; control codes and
    byte-order marks inside of the text are left out.

    Raises:
        TextError: NULs.
    """
    if "\0" in text:
        raise TextError(
            "contains NUL bytes: not text, or UTF-16 without a byte order mark; save it as UTF-8, or name the source's `encoding`"
        )
    if not text.isascii():
        text = replace_surrogates(text).replace("\N{ZERO WIDTH NO-BREAK SPACE}", "")
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
