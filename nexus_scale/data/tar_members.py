"""The members of any tar as bytes: ustar, pax and GNU, plain or compressed by gzip, bzip2, xz or zstd, one archive or several in a row.

The headers are read here because readers that search for the next valid header silently drop the rest of a damaged file. Nothing is
unpickled or written to disk, and only one member is held in memory.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nexus_scale.data.manifest import DataError

BLOCK = 512
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_CHUNK = 1 << 22
_MAX_EXTENDED = 1 << 20


@dataclass(frozen=True)
class Limits:
    """Limits on the contents of a tar; beyond them it counts as damaged or hostile."""

    member_bytes: int = 1 << 32
    members: int = 10_000_000
    total_bytes: int = 1 << 42
    kept_bytes: int = 1 << 32
    """Bytes of one member, above which it is skipped."""


class Member(NamedTuple):
    """A member of a tar.

    Attributes:
        archive: number of the archive, in a file that holds several one after the other; otherwise 0.
        data: None if it was not wanted or cannot be read.
        problem: why it cannot be read (a link, a device, an absolute name); otherwise empty.
    """

    archive: int
    name: str
    data: bytes | None
    problem: str = ""


def read_members(
    path: Path, limits: Limits | None = None, wanted: Callable[[str], bool] | None = None
) -> Iterator[Member]:
    """The members of a tar in order, without directories.

    Args:
        wanted: whether to read the member with this name; the others come without their data.
    Raises:
        DataError: the file is damaged or cut from here on, or holds more than `limits` allow. It names the member, not the file.
    """
    try:
        with closing(_open(path)) as file:
            yield from _walk(file, limits or Limits(), wanted)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{error}; the file is damaged or cut: restore it") from error


def _open(path: Path) -> Any:
    """The opened file, decompressed as its first bytes demand, whatever its name says."""
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(b"\x1f\x8b"):
        return gzip.open(path, "rb")
    if start.startswith(b"BZh"):
        return bz2.open(path, "rb")
    if start.startswith(b"\xfd7zXZ\0"):
        return lzma.open(path, "rb")
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow as pa

        return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    return path.open("rb", buffering=1 << 20)


def _read(file: Any, count: int, what: str, keep: bool = True) -> bytes:
    """`count` bytes, read in pieces, so that a wrong size takes no memory."""
    pieces, left = [], count
    while left:
        piece = file.read(min(left, _CHUNK))
        if not piece:
            raise DataError(f"{what}: got {count - left} of {count} bytes, the file is cut; restore it")
        left -= len(piece)
        if keep:
            pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _block(file: Any) -> bytes:
    """The next block; shorter only at the end of the file. Decompressors may return less than requested."""
    data: bytes = file.read(BLOCK)
    while len(data) < BLOCK and (more := file.read(BLOCK - len(data))):
        data += more
    return data


def _number(field: bytes, what: str) -> int:
    """An octal header field, or GNU's binary one for large numbers."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    text = field.strip(b" \0") or b"0"
    if not re.fullmatch(rb"[0-7]+", text):
        raise DataError(f"{what}: got {field!r} in a tar header, expected an octal number; the file is damaged")
    return int(text, 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "replace")


def _pax_records(data: bytes) -> dict[str, str]:
    """`<length> <key>=<value>\\n` records of a POSIX.1-2001 extended header."""
    records = {}
    while data:
        length, space, _ = data.partition(b" ")
        if not space or not re.fullmatch(rb"[0-9]{1,7}", length) or not len(length) < int(length) <= len(data):
            raise DataError("got a pax header that cannot be read; the file is damaged")
        name, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        data = data[int(length) :]
    return records


def _walk(file: Any, limits: Limits, wanted: Callable[[str], bool] | None) -> Iterator[Member]:
    """The members of an open tar. Checks the checksum of each header."""
    total = 0
    for archive, count, header, extended in _headers(file):
        name, size, sparse = _described(header, extended, count)
        kind = header[156:157]
        if kind == b"5":
            continue
        problem = _problem(kind, sparse, name, size, limits)
        if kind in (b"1", b"2", b"3", b"4", b"6"):
            size = 0  # nothing follows their headers
        total += max(size, 0)
        if not 0 <= size <= limits.member_bytes or count > limits.members or total > limits.total_bytes:
            raise DataError(
                f"member {name!r}: got {size} bytes, {count} members and {total} bytes so far, expected at most {limits}"
            )
        if kind == b"S":
            raise DataError(f"member {name!r}: {problem}")  # the size of its data is stated elsewhere
        keep = not problem and (wanted is None or wanted(name))
        body = _read(file, size + -size % BLOCK, f"member {name!r}", keep)
        yield Member(archive, name.removeprefix("./"), body[:size] if keep else None, problem)


@dataclass
class _Extended:
    """The contents of extended headers, which describe the member after them."""

    pax: dict[str, str] = field(default_factory=dict)
    long_name: str | None = None


def _headers(file: Any) -> Iterator[tuple[int, int, bytes, _Extended]]:
    """For each member: number of the archive, number of headers so far, its header, and the extended headers before it."""
    count = archive = zeros = 0
    extended = _Extended()
    while True:
        header = _block(file)
        if len(header) < BLOCK and not (zeros >= 2 and not any(header)):
            raise DataError(f"header {count}: got {len(header)} of {BLOCK} bytes, the file is cut; restore it")
        if len(header) < BLOCK:
            return
        if not any(header):
            zeros += 1
            continue
        if zeros == 1:
            raise DataError(f"header {count}: got a lone block of zeros, expected two at the end; the file is damaged")
        if zeros:  # an end, and another archive after it: `cat a.tar b.tar`, or tar's -i
            archive, zeros, extended = archive + 1, 0, _Extended()
        if _number(header[148:156], f"header {count}") != sum(header[:148]) + 8 * 32 + sum(header[156:]):
            raise DataError(f"header {count}: checksum does not match; the file is damaged")
        count += 1
        if header[156:157] in (b"x", b"g", b"L", b"K"):
            _extend(file, header, extended, count)
            continue
        yield archive, count, header, extended
        extended = _Extended()


def _extend(file: Any, header: bytes, extended: _Extended, count: int) -> None:
    kind, size = header[156:157], _number(header[124:136], f"header {count - 1}")
    if size > _MAX_EXTENDED:
        raise DataError(f"header {count}: got an extended header of {size} bytes, expected at most 1 MiB")
    data = _read(file, size + -size % BLOCK, "extended header")[:size]
    if kind == b"x":
        extended.pax = _pax_records(data)
    elif kind == b"L":
        extended.long_name = _text(data)


def _described(header: bytes, extended: _Extended, count: int) -> tuple[str, int, bool]:
    """The name of a member, its size (-1: invalid), and whether it is sparse."""
    size, pax = _number(header[124:136], f"header {count - 1}"), extended.pax
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    plain = (f"{prefix}/" if prefix else "") + _text(header[:100])
    name = pax.get("path", extended.long_name or plain)
    if "size" in pax:
        size = int(pax["size"]) if re.fullmatch(r"[0-9]{1,19}", pax["size"], re.ASCII) else -1
    sparse = header[156:157] == b"S" or any(record.startswith("GNU.sparse") for record in pax)
    return name, size, sparse


def _problem(kind: bytes, sparse: bool, name: str, size: int, limits: Limits) -> str:
    """Why a member cannot be read; empty if it can."""
    if kind not in (b"0", b"\0", b"7") or sparse:
        return f"got type {kind!r} (link, device or sparse file), expected a regular file"
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        return "got an absolute name or one with '..', expected a plain one"
    return f"got {size} bytes, expected at most {limits.kept_bytes}" if size > limits.kept_bytes else ""
