"""Bad samples, which differ from their index: what is done about them, and which samples replace them.

A sample is bad if its bytes do not have the hash in the index, or cannot be decoded to its fields. It is replaced by another sample of
its source and bucket (and class, where classes are balanced): candidates come from a hash keyed by (seed, global batch, position), and
the first good one is taken. So the replacement depends only on the order and on which samples are bad. Any number of ranks picks the same
ones, and the good samples stay where they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nexus_scale.data.manifest import DataError, Manifest
from nexus_scale.data.order import Draw, Stock, derive, keyed_hash

log = logging.getLogger(__name__)

CANDIDATES = 256
"""Candidates that are tried for one position. If all of them are bad, so is the bucket."""
_LISTED = 20

Note = Callable[..., object]
"""`note(kind, message, **facts)` records an incident; `incidents.note` bound to a run is one."""


@dataclass(frozen=True)
class BadData:
    """The policy for bad samples: `stop` at the first, or `replace` up to `limit`, a share of all samples."""

    action: Literal["stop", "replace"] = "replace"
    limit: float = 0.001

    def __post_init__(self) -> None:
        if self.action not in ("stop", "replace") or not 0 <= self.limit <= 1:
            raise DataError(f"data.bad: got {self}, expected action stop or replace and a limit in [0, 1]")


class BadSamples(DataError):
    """Some requested samples are bad; `reasons` says why, by their numbers in the folder."""

    def __init__(self, where: str, reasons: Mapping[int, str]):
        first = min(reasons)
        more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        super().__init__(f"{where}: sample number {first} {reasons[first]}{more}")
        self.reasons = dict(reasons)


class Quarantine:
    """The bad samples that a reader has found so far.

    Attributes:
        bad: number of different bad samples over all sources.
    """

    def __init__(self, policy: BadData, stocks: Sequence[Stock], note: Note | None = None):
        self.policy, self.bad = policy, 0
        self._stocks, self._note = stocks, note
        self._samples: list[set[int]] = [set() for _ in stocks]
        self._sorted: list[np.ndarray] = [np.zeros(0, np.int64) for _ in stocks]
        self._shards: dict[str, str] = {}
        self._pools: dict[tuple[int, int, int], np.ndarray] = {}
        self._full: DataError | None = None

    def check(self) -> None:
        """Raises the error that ended reading again, so that a further call does not get past it."""
        if self._full is not None:
            raise self._full

    def report(self, source: int, manifest: Manifest, shard: int, reasons: Mapping[int, str], damage: str) -> None:
        """Records the bad samples of a shard.

        Args:
            reasons: by the number of the sample in its folder; empty if the shard is damaged but no sample is.
            damage: what is wrong with the shard.
        Raises:
            DataError: the policy is to stop, or more samples are bad than the limit allows.
        """
        where = manifest.at(manifest.shards[shard].file)
        fresh = sorted(set(reasons) - self._samples[source])
        self.bad += len(fresh)
        self._samples[source].update(fresh)
        self._sorted[source] = np.array(sorted(self._samples[source]), np.int64)
        first = f", first {manifest.name(min(reasons))} {reasons[min(reasons)]}" if reasons else ""
        line = f"{where}: {damage}: {len(reasons)} of its {manifest.shards[shard].samples} samples are bad{first}"
        new = where not in self._shards
        self._shards.setdefault(where, line)
        total = sum(len(stock.bucket) for stock in self._stocks)
        if self.policy.action == "stop":
            self._full = DataError(f"{line}; restore the shard or make it again, or set data.bad.action to replace")
        elif self.bad > self.policy.limit * total:
            lines = list(self._shards.values())
            listed = "\n  ".join(
                lines[:_LISTED] + [f"... and {len(lines) - _LISTED} more shards"] * (len(lines) > _LISTED)
            )
            self._full = DataError(
                f"{self.bad} of {total} samples are bad, more than the {self.policy.limit:g} that data.bad.limit allows; "
                f"restore these shards or make them again, or raise the limit:\n  {listed}"
            )
        if new:
            log.warning("%s%s", line, "; others stand in for them" if reasons and self._full is None else "")
            if self._note is not None:
                facts = {
                    "shard": where,
                    "bad": len(reasons),
                    "samples": manifest.shards[shard].samples,
                    "bad_so_far": self.bad,
                }
                self._note("bad_data", line, **facts)
        self.check()

    def rows(self, sources: np.ndarray, samples: np.ndarray) -> np.ndarray:
        """The places, ascending, of those samples (n,) of sources (n,) that are known to be bad."""
        if not self.bad:
            return np.zeros(0, np.int64)
        found = [
            (sources == source) & np.isin(samples, known) for source, known in enumerate(self._sorted) if len(known)
        ]
        return np.flatnonzero(np.logical_or.reduce(found))

    def candidates(self, draw: Draw, place: int) -> Iterator[int]:
        """The candidates for a place of a draw, in the order in which they are tried, without samples known to be bad.

        Raises:
            DataError: none of CANDIDATES samples was taken.
        """
        source, sample = int(draw.sources[place]), int(draw.samples[place])
        stock = self._stocks[source]
        label = 0 if stock.label is None else int(stock.label[sample])
        pool = self._pools.get((source, int(stock.bucket[sample]), label))
        if pool is None:
            alike = stock.bucket == stock.bucket[sample]
            pool = np.flatnonzero(alike if stock.label is None else alike & (stock.label == label))
            self._pools[source, int(stock.bucket[sample]), label] = pool
        later, position = divmod(place, len(draw.samples) // draw.batches)
        key = derive(draw.seed, draw.number + later, position)
        tries = keyed_hash(key, np.arange(CANDIDATES)) % np.uint64(len(pool))
        for candidate in pool[tries.astype(np.int64)].tolist():
            if candidate not in self._samples[source]:
                yield candidate
        raise DataError(
            f"bucket {draw.bucket!r}: none of {CANDIDATES} samples tried could stand in for a bad one; restore the shards:\n  "
            + "\n  ".join(list(self._shards.values())[:_LISTED])
        )
