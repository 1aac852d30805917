"""Reads JSON files that may be truncated, damaged or of the wrong type: each is used or reported by name."""

from __future__ import annotations

import json
import logging
import math
import stat
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

log = logging.getLogger(__name__)

T = TypeVar("T")
D = TypeVar("D")

LONGEST_FILE = 256 << 20
"""Bytes. The JSON files of a run are far smaller."""

LONGEST_LINE = 16 << 20


class DamagedFile(ValueError):
    """A file exists but its contents are wrong; the message names the file and the mistake."""


def read_json(path: Path, of: type[T]) -> T | None:
    """The value of a JSON file; None if the file does not exist.

    Args:
        of: its type, checked strictly by pydantic: a number in quotes is text.
    Raises:
        DamagedFile: it cannot be read, is not JSON, or has another type.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DamagedFile(f"{path}: is not a regular file")
        if status.st_size > LONGEST_FILE:
            raise DamagedFile(f"{path}: has {status.st_size:,} bytes; expected at most {LONGEST_FILE:,}")
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read: {error.strerror or error}") from None
    try:
        value: T = _adapter(of).validate_json(data, strict=True)  # type: ignore[arg-type]
        return value
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        words = f"{where}: {first['msg']}" if where else first["msg"]
        raise DamagedFile(f"{path}: is damaged: {words}") from None


def read_json_or(path: Path, of: type[T], otherwise: D) -> T | D:
    """As `read_json`, but `otherwise` if the file is missing or damaged; damage is logged."""
    try:
        found = read_json(path, of)
    except DamagedFile as error:
        warn_once(f"{error}; ignoring it")
        return otherwise
    return otherwise if found is None else found


@lru_cache(maxsize=1000)
def warn_once(words: str) -> None:
    """Logs a warning once per process, however often a damaged file is read."""
    log.warning("%s", words)


@cache
def _adapter(of: Any) -> TypeAdapter[Any]:
    return TypeAdapter(of)


def parse_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line, or None if it is empty, truncated or damaged. NaN and infinities become None."""
    if not line or len(line) > LONGEST_LINE:
        return None
    try:
        row = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read_objects(path: Path, *, tail_bytes: int | None = None) -> Iterator[dict[str, Any]]:
    """Objects of a JSON lines file, oldest first. Other lines are skipped; an unreadable file counts as empty.

    Args:
        tail_bytes: reads only this many bytes at the end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            warn_once(f"{path}: is not a regular file; ignoring it")
            return
        with path.open("rb") as file:
            if tail_bytes is not None:
                file.seek(max(0, file.seek(0, 2) - tail_bytes))
            while line := file.readline(LONGEST_LINE + 1):
                row = parse_object(line.rstrip(b"\n"))
                if row is not None:
                    yield row
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        warn_once(f"{path}: cannot be read: {error.strerror or error}")


def is_count(value: object) -> bool:
    """Whether a JSON value can be a number of steps, samples or bytes."""
    return type(value) is int and 0 <= value < 2**53


def is_number(value: object) -> bool:
    """Whether a JSON value is a finite number that can be calculated with."""
    return type(value) in (int, float) and math.isfinite(_float(value))


def is_time(value: object) -> bool:
    """Whether a JSON value can be seconds since the epoch, or a duration."""
    return is_number(value) and 0 <= value < 1e11  # type: ignore[operator]


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
