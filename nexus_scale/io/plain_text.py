"""Decodes text from users: bytes to characters, captions and prompts to one line. All user text is read through here.

Bytes are UTF-8 unless a byte-order mark says UTF-8, UTF-16 or UTF-32, or an `encoding` is given. The mark is removed. A caption is
its words separated by single spaces. Surrogates and control codes are replaced or removed. Text with NUL bytes is
refused: it is UTF-16 without a byte-order mark, or not text.
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
    """The text is damaged, or has a different encoding."""


def decode_text(data: bytes, encoding: str = "utf-8", whole: bool = True) -> str:
    """The characters of a file, without its byte-order mark.

    Args:
        whole: whether one damaged byte or NUL is an error. Otherwise they stay in the text (see `is_escaped`), so that each line
            can be checked by itself.
    Raises:
        TextError: the bytes do not fit this encoding, or contain NULs.
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
    """The text with lone surrogates replaced by U+FFFD, so that it can be encoded."""
    return text if text.isascii() else _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def clean_text(text: str) -> str:
    """A caption's words separated by single spaces; empty if nothing in it is visible.

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
