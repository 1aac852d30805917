"""Rows of CSV, TSV, JSONL and Parquet tables, each with its place. Every row is used or counted as dropped; a broken row does not swallow
the next.

CSV is RFC 4180: a field in quotes may hold commas, line ends and doubled quotes. Where a quote is not closed, only that line
is dropped. In a TSV, quotes are ordinary characters unless they enclose a whole field in which every quote is doubled, as spreadsheets
write them. Lines end in LF, CR LF or CR. Blank lines are skipped. The columns are those of all rows together.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.accounts import Account
from data_pipelines.text_decoding import json_object, plain
from nexus_scale.contracts import UserError
from nexus_scale.io.plain_text import TextError, decode_text, is_escaped, lines_of

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
MAX_FIELD = 1 << 27
"""Characters in one CSV field; Python's own limit is 131,072."""
MAX_LINES = 1000
"""Lines in one quoted field."""

UNCLOSED = "a row whose quote is not closed"
MANY_COLUMNS = "a row of more columns than the header"
NO_JSON = "a line that is no JSON object"
BAD_ENCODING = "a row whose text cannot be decoded"

Row = dict[str, Any]


class Place(NamedTuple):
    """A row and where it stands: `table.csv:17`."""

    where: str
    row: Row


def read_table(
    path: Path, encoding: str, account: Account, starts_row: Callable[[Row], bool], named: Collection[str] = ()
) -> list[Place]:
    """The rows of a table, in order.

    Args:
        account: counts every row as read, and those that cannot be read as dropped.
        starts_row: whether the values of a line, by column, look like a row. Such a line inside an open quote shows that the quote is a
            mistake.
        named: columns that are text even where the Parquet file declares bytes.
    Raises:
        UserError: the file as a whole cannot be read.
    """
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            rows = _parquet(path, account, named)
        else:
            text = decode_text(path.read_bytes(), encoding, whole=False)
            rows = (
                _jsonl(path, text, account)
                if kind == ".jsonl"
                else _separated(path, text, "\t" if kind == ".tsv" else ",", account, starts_row)
            )
        return [place for place in rows if _is_text(place, account, encoding)]
    except (OSError, TextError, MemoryError) as error:
        raise UserError(f"{path}: cannot be read as {kind.lstrip('.')}: {error}", 3) from error


def _is_text(place: Place, account: Account, encoding: str) -> bool:
    """Whether all texts of a row could be decoded."""
    damaged = [name for name, value in place.row.items() if isinstance(value, str) and is_escaped(value)]
    if damaged:
        account.drop(
            place.where, BAD_ENCODING, detail=f"column {damaged[0]!r} is not {encoding}; name the source's `encoding`"
        )
    return not damaged


def _parquet(path: Path, account: Account, named: Collection[str]) -> Iterator[Place]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def text(kind: Any) -> bool:
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    def kept(field: Any) -> bool:
        # Values that JSON cannot hold (pictures, lists of boxes, times) would only take memory.
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        simple = text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        return simple or pa.types.is_null(kind) or field.name in named

    try:
        file = pq.ParquetFile(path)
        names = [field.name for field in file.schema_arrow if kept(field)]
        if len(set(names)) < len(names):
            raise UserError(f"{path}: got columns {names}, expected no name twice", 3)
        number = 0
        for batch in file.iter_batches(columns=names):
            columns = []
            for column in batch.columns:
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                # Read as bytes first, so that a text that is not UTF-8 costs one row and not the file.
                columns.append((column.cast(pa.large_binary()) if text(column.type) else column).to_pylist())
            for values in zip(*columns, strict=True):
                number += 1
                account.read += 1
                decoded = (v.decode("utf-8", "surrogateescape") if isinstance(v, bytes) else v for v in values)
                yield Place(f"{path.name}:{number}", dict(zip(names, decoded, strict=True)))
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {error}", 3) from error


def _jsonl(path: Path, text: str, account: Account) -> Iterator[Place]:
    for number, line in lines_of(text):
        if line.strip():
            account.read += 1
            where = f"{path.name}:{number}"
            if is_escaped(line):
                account.drop(where, BAD_ENCODING)
                continue
            try:
                yield Place(where, json_object(line))
            except TextError as error:
                account.drop(where, NO_JSON, detail=str(error))


# ------------------------------------------------------------------------------------------------- CSV and TSV


def _separated(
    path: Path, text: str, delimiter: str, account: Account, starts_row: Callable[[Row], bool]
) -> Iterator[Place]:
    csv.field_size_limit(MAX_FIELD)
    lines = [line for _, line in lines_of(text)]
    at = next((number for number, line in enumerate(lines) if line.strip()), None)
    if at is None:
        return
    header, at = _record(lines, at, delimiter, lambda values: False)
    if header is None:
        raise UserError(f"{path}:{at}: a quote in the header is not closed; correct the first line", 3)
    header = [name.strip() for name in header]
    if len(set(header)) < len(header):
        raise UserError(f"{path}: got columns {header}, expected no name twice", 3)

    def fits(values: list[str]) -> bool:
        return len(values) == len(header) and starts_row(dict(zip(header, values, strict=True)))

    while at < len(lines):
        if not lines[at].strip():
            at += 1
            continue
        where = f"{path.name}:{at + 1}"
        account.read += 1
        values, at = _record(lines, at, delimiter, fits)
        if values is None:
            account.drop(where, UNCLOSED)
            continue
        while len(values) > len(header) and not values[-1].strip():
            values.pop()
        if len(values) > len(header):
            account.drop(
                where,
                MANY_COLUMNS,
                detail=f"{len(values)} columns, expected {len(header)}: quote what holds a separator",
            )
            continue
        yield Place(where, {**dict.fromkeys(header), **dict(zip(header, values, strict=False))})


def _record(
    lines: Sequence[str], at: int, delimiter: str, fits: Callable[[list[str]], bool]
) -> tuple[list[str] | None, int]:
    """The fields of the record that begins at a line (None where its quotes are wrong), and the number of the line after it."""
    values, is_open = _fields(lines[at], delimiter)
    if not is_open:
        return values, at + 1
    for after in range(at + 1, min(len(lines), at + MAX_LINES)):
        if fits(_loose(lines[after], delimiter)):
            break  # this line is a row: the quote was left open
        if '"' not in lines[after]:
            continue
        values, is_open = _fields("".join(lines[at : after + 1]), delimiter)
        if not is_open:
            if values is None:
                break
            return values, after + 1
    return (_loose(lines[at], delimiter) if delimiter == "\t" else None), at + 1


def _fields(text: str, delimiter: str) -> tuple[list[str] | None, bool]:
    """The fields of one record (None where its quotes are wrong), and whether it ends inside quotes."""
    if '"' not in text:
        return text.rstrip("\r\n").split(delimiter), False
    try:
        rows = list(csv.reader([text], delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            return None, True
        return (
            (_loose(text, delimiter), False)
            if delimiter == "\t" and text.rstrip("\r\n").count("\n") == 0
            else (None, False)
        )
    return (rows[0] if rows else [""]), False


def _loose(line: str, delimiter: str) -> list[str]:
    """The fields of a line in which quotes are ordinary characters, except around a whole field whose inner quotes are doubled."""
    fields = line.rstrip("\r\n").split(delimiter)
    return [
        field[1:-1].replace('""', '"')
        if len(field) >= 2 and field[0] == field[-1] == '"' and '"' not in field[1:-1].replace('""', "")
        else field
        for field in fields
    ]


def scalars(row: Row) -> Row:
    """The values of a row that JSON can hold (text, numbers, booleans), without nulls and numbers that are not finite."""
    said = {name: plain(value) for name, value in row.items() if isinstance(value, str | int | float | bool)}
    return {plain(str(name)): value for name, value in said.items() if value is not None}
