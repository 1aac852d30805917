"""The rows of a run's curves, read as they are written, and thinned: a page shows a few hundred points, however long the run is."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from nexus_scale.io.plain_json import is_count, is_number, parse_object, warn_once

MOST_ROWS = 2000
"""Of more rows, neighbours are merged, so that neither memory nor a page grows with the run."""

LONGEST_READ = 64 << 20
"""Bytes. Of more that is new, stretches spread evenly over it are read."""

STRETCHES, STRETCH = 1500, 8192
"""How many stretches, and the bytes that are read of each."""

LARGEST = 1e30


class _Mean:
    """Neighbouring rows as one: the mean of each value. Of a single row, that row. Each row counts `weight` times."""

    def __init__(self, row: Mapping[str, Any], weight: float = 1.0):
        self.weight = weight
        self._row: Mapping[str, Any] | None = row
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    @property
    def row(self) -> Mapping[str, Any]:
        if self._row is None:
            self._row = {name: total / self._weights[name] for name, total in self._sums.items()}
        return self._row

    def add(self, other: _Mean) -> None:
        self._spread()
        other._spread()
        for name, total in other._sums.items():
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._weights[name] = self._weights.get(name, 0.0) + other._weights[name]
        self.weight += other.weight
        self._row = None

    def sums(self) -> Mapping[str, float]:
        """Of each value, its sum over the rows."""
        self._spread()
        return self._sums

    def _spread(self) -> None:
        if not self._sums and self._row is not None:
            self._sums = {name: value * self.weight for name, value in self._row.items()}
            self._weights = dict.fromkeys(self._row, self.weight)


class History:
    """The rows of a JSON lines file, one per step, as far as they have been written: `read` takes in what is new.

    A row that is merged or reduced has only numbers. The last row may still grow (see `RowFile.extend`), so it is read again each time
    and merged only once another follows. A file that was replaced or cut (a run that went back) is read afresh.

    Args:
        longest: of more new bytes than this, only so many stretches are read; the curves then have fewer points, and sums are estimates.

    Attributes:
        newest: the last row; empty without one.
        sampled: whether only stretches were read.
        version: changes whenever the rows do.
    """

    def __init__(self, path: Path, longest: int = LONGEST_READ, stretches: int = STRETCHES):
        self.path, self.longest, self.stretches, self.version = path, longest, stretches, 0
        self._forget()

    def _forget(self) -> None:
        self.newest: dict[str, Any] = {}
        self.sampled = False
        self._means: list[_Mean] = []
        self._stride = 1.0
        self._place, self._begin = 0, b""
        self._seen: tuple[int, ...] | None = None
        self._thinned: list[dict[str, Any]] | None = None
        self.version += 1

    def read(self) -> History:
        """Takes in what was written since the last call. A file that is missing or cannot be read counts as empty."""
        try:
            found = self.path.stat()
            if not stat.S_ISREG(found.st_mode):
                warn_once(f"{self.path}: is not a regular file; ignoring it")
                raise FileNotFoundError
            seen = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
            if seen == self._seen:
                return self
            with self.path.open("rb") as file:
                if self._seen is not None and (seen[:2] != self._seen[:2] or not self._goes_on(file, found.st_size)):
                    self._forget()
                self._take(file, found.st_size)
            self._seen = seen
        except (FileNotFoundError, NotADirectoryError):
            if self._seen is not None:
                self._forget()
        except OSError as error:
            warn_once(f"{self.path}: cannot be read: {error.strerror or error}")
        return self

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All rows, oldest first, or means of neighbours; the last is always the newest row itself."""
        if self._thinned is None:
            self._thinned = [dict(mean.row) for mean in self._means] + ([self.newest] if self.newest else [])
        return self._thinned

    def sums(self, prefix: str) -> dict[str, float]:
        """The sum over all rows of each value whose name begins with the prefix, by the rest of its name."""
        totals: dict[str, float] = {}
        for mean in [*self._means, *([_Mean(self.newest)] if self.newest else [])]:
            for name, total in mean.sums().items():
                if name.startswith(prefix) and total:
                    short = name.removeprefix(prefix)
                    totals[short] = totals.get(short, 0.0) + total
        return totals

    def _goes_on(self, file: BinaryIO, size: int) -> bool:
        """Whether the last row read is still where it was: the file has only grown."""
        file.seek(self._place)
        return size >= self._place and file.read(len(self._begin)) == self._begin

    def _take(self, file: BinaryIO, size: int) -> None:
        self.version += 1
        self._thinned = None
        if size - self._place > self.longest:
            self._sample(file, size)
        file.seek(self._place)
        data = file.read(self.longest + STRETCH)
        whole = data.rfind(b"\n") + 1
        if not whole and len(data) > self.longest:  # no line of a run
            self._place += len(data)
            return
        lines = data[:whole].splitlines(keepends=True)
        place = self._place
        for line in lines:
            self._found(line, place)
            place += len(line)
        # A line without its end: whole if a run was killed just before the end was written, and otherwise still being written.
        if data[whole:]:
            self._found(data[whole:], place)

    def _found(self, line: bytes, place: int) -> None:
        row = _row(line)
        if row is None:
            return
        if self.newest and place > self._place:
            self._merge(_Mean(self.newest))
        self.newest, self._place, self._begin = row, place, line[:16].rstrip()

    def _merge(self, mean: _Mean) -> None:
        if self._means and self._means[-1].weight + mean.weight <= self._stride:
            self._means[-1].add(mean)
            return
        self._means.append(mean)
        if len(self._means) > MOST_ROWS:
            pairs = zip(self._means[::2], self._means[1::2], strict=False)
            odd = self._means[-1:] if len(self._means) % 2 else []
            for one, other in pairs:
                one.add(other)
            self._means = [*self._means[: len(self._means) - len(odd) : 2], *odd]
            self._stride = 2 * max(self._stride, 1.0)

    def _sample(self, file: BinaryIO, size: int) -> None:
        """Reads stretches of what is new, all but the last part, which is then read whole."""
        self.sampled = True
        if self.newest:
            self._merge(_Mean(self.newest))
            self.newest = {}
        begin, end = self._place, size - self.longest // 2
        step = (end - begin) // self.stretches
        found = []
        for number in range(self.stretches):
            file.seek(begin + number * step)
            found.append(list(_whole_lines(file.read(min(step, STRETCH) + STRETCH), step, starts=number == 0)))
        lines = [line for stretch in found for line in stretch]
        rows_of_a_stretch = step / (sum(map(len, lines)) / len(lines) + 1) if lines else 1.0
        self._stride = max(self._stride, rows_of_a_stretch)
        for stretch in found:
            rows = [row for line in stretch if (row := _row(line)) is not None]
            if not rows:
                continue
            mean = _Mean(rows[0], rows_of_a_stretch / len(rows))
            for row in rows[1:]:
                mean.add(_Mean(row, rows_of_a_stretch / len(rows)))
            self._means.append(mean)
        while len(self._means) > MOST_ROWS:
            self._merge(self._means.pop())
        file.seek(end)
        self._place, self._begin = end + len(file.readline()), b""


def _whole_lines(data: bytes, within: int, *, starts: bool) -> Iterator[bytes]:
    """Up to two lines that begin within so many bytes and end in the data; `starts`: the first begins with it."""
    place = 0 if starts else data.find(b"\n") + 1
    for _ in range(2):
        end = data.find(b"\n", place)
        if end < 0 or place >= within or (place == 0 and not starts):
            return
        yield data[place:end]
        place = end + 1


def _row(line: bytes) -> dict[str, Any] | None:
    row = parse_object(line.rstrip(b"\n"))
    if row is None or not is_count(row.get("step")):
        return None
    return {name: value for name, value in row.items() if is_number(value) and abs(value) < LARGEST}
