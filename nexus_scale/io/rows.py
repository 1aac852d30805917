"""JSON lines with one row per step of the run, and none beyond the step that it resumed from."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_json import is_count, parse_object, read_objects

log = logging.getLogger(__name__)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON lines file, in order. A last line cut short by a crash is skipped."""
    return [row for row in read_objects(path) if is_count(row.get("step"))]


def _parse(line: bytes) -> dict[str, Any] | None:
    row = parse_object(line)
    return row if row is not None and is_count(row.get("step")) else None


def encode(row: Mapping[str, Any]) -> bytes:
    """One line of strict JSON. A float that is not finite becomes null: JSON cannot represent it."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return json.dumps(clean, allow_nan=False).encode() + b"\n"


class RowFile:
    """Appends rows; each has reached the kernel when the call returns. While the disk refuses rows, they are kept in memory.

    Args:
        path: the file; created with the first row.
        resumed_step: rows of later steps are removed at once, so that a run that rolled back writes no row twice.
    """

    max_waiting = 10_000

    def __init__(self, path: Path, resumed_step: int):
        self.path = path
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is not a regular file; move it away, and the run writes a new one", code=5)
        old = path.read_bytes() if path.exists() else b""
        kept = [line for line in old.split(b"\n") if (row := _parse(line)) is not None and row["step"] <= resumed_step]
        self.rows = [json.loads(line) for line in kept[-1:]]
        data = b"".join(line + b"\n" for line in kept)
        if data != old:
            atomic_write(path, data)
        self._file = self._open()
        # The newest row's line may still grow. That line, and rows not yet written before it, begin at `_start`.
        self._start = len(data) - (len(kept[-1]) + 1 if kept else 0)
        self._lines = [kept[-1] + b"\n"] if kept else []
        self._waits = False

    def _open(self) -> int:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    @property
    def newest(self) -> dict[str, Any] | None:
        """The last row in the file."""
        return self.rows[-1] if self.rows else None

    def append(self, row: dict[str, Any]) -> None:
        if not self._waits:
            self._start += sum(map(len, self._lines))
            self._lines = []
        self._lines.append(encode(row))
        self.rows = [row]
        self._write()

    def extend(self, more: Mapping[str, Any]) -> None:
        """Adds to the newest row, in place. The line grows and keeps its beginning, so a reader never finds it missing."""
        assert self.rows, "there is no row to extend"
        self.rows = [{**self.rows[-1], **more}]
        self._lines[-1] = encode(self.rows[-1])
        self._write()

    def _write(self) -> None:
        try:
            if not os.fstat(self._file).st_nlink:
                log.error("%s: was removed while the run wrote to it; continuing in a new file", self.path)
                fresh = self._open()
                os.close(self._file)
                self._file, self._start = fresh, 0
            data, place = memoryview(b"".join(self._lines)), self._start
            while data:
                written = os.pwrite(self._file, data, place)
                data, place = data[written:], place + written
        except OSError as error:
            if not self._waits:
                log.error("%s: %s; rows are kept in memory until they can be written", self.path, error.strerror)
            self._waits = True
            if len(self._lines) > self.max_waiting:
                del self._lines[0]
            return
        if self._waits:
            log.info("%s: the rows kept in memory are now written", self.path)
        self._waits = False

    def close(self) -> None:
        if self._file >= 0:
            if self._waits:
                self._write()
            if self._waits:
                log.error("%s: the last %d rows are lost", self.path, len(self._lines))
            os.close(self._file)
            self._file = -1
