"""JSON lines that only ever hold what belongs to the run: one row per step, none beyond the step that was resumed from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_scale.durable import write_whole


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a file of JSON lines, in order; a last line that was cut short by a crash is left out."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n"):
        row = _parse(line)
        if row is not None:
            rows.append(row)
    return rows


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def encode(row: Mapping[str, Any]) -> bytes:
    """One line of strict JSON. A float that is not finite becomes null: JSON has no word for it."""
    clean = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()
    }
    return json.dumps(clean, allow_nan=False).encode() + b"\n"


class RowFile:
    """Appends rows, each on disk (or with the kernel, at least) before the call returns.

    Args:
        path: the file; made when the first row comes.
        resumed_step: rows of later steps are cut at once, so that a run that went back writes none of them twice.
    """

    def __init__(self, path: Path, resumed_step: int):
        old = path.read_bytes() if path.exists() else b""
        kept = [line for line in old.split(b"\n") if (row := _parse(line)) is not None and row["step"] <= resumed_step]
        self.rows = [json.loads(line) for line in kept[-1:]]
        data = b"".join(line + b"\n" for line in kept)
        if data != old:
            write_whole(path, data)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        self._end = len(data)
        self._start = self._end

    @property
    def newest(self) -> dict[str, Any] | None:
        """The last row in the file."""
        return self.rows[-1] if self.rows else None

    def append(self, row: dict[str, Any]) -> None:
        self._start = self._end
        self._write(row)

    def extend(self, more: Mapping[str, Any]) -> None:
        """Adds to the newest row, in place. The line grows and keeps its beginning, so a reader never finds it missing."""
        assert self.rows, "there is no row to extend"
        self._write({**self.rows[-1], **more})

    def _write(self, row: dict[str, Any]) -> None:
        line = encode(row)
        written = os.pwrite(self._file, line, self._start)
        while written < len(line):
            written += os.pwrite(self._file, line[written:], self._start + written)
        self._end = self._start + len(line)
        self.rows = [row]

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
