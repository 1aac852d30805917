"""The order of samples: a pure function of the manifests, the seed and the number of the draw. No state is stored.

Samples of one source and one bucket (and one class, where classes are balanced) form a stream with its own epochs. In each epoch the
shards are shuffled and grouped into windows of a few shards, and the samples are shuffled within each window. Reading stays mostly
sequential, and any position can be found without replaying those before it. Within an epoch, no sample of a stream repeats or is missed.

A draw is one global batch. It has one bucket, and its sources alternate by weight. Both follow fixed patterns (`Mix`), so a division and a
table look-up give how often each came before a position.

Shuffles are sorts of keyed hashes (splitmix64) instead of a library's permutation, which a new version might change.
Source of the hash: Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from nexus_scale.data.manifest import DataError

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
MAX_PERIOD = 4096


def splitmix(values: np.ndarray) -> np.ndarray:
    """The output function of splitmix64, on uint64 of any shape."""
    x = values.astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_MIX[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_MIX[1])
    return x ^ (x >> np.uint64(31))


def derive(*parts: int) -> int:
    """One 64-bit key from several numbers; their order matters."""
    key = 0
    for part in parts:
        x = (
            key * _GOLDEN + part + 1
        ) & _MASK  # splitmix64 of one number: an array of one would take five times as long
        x = (x ^ (x >> 30)) * _MIX[0] & _MASK
        x = (x ^ (x >> 27)) * _MIX[1] & _MASK
        key = x ^ (x >> 31)
    return key


def keyed_hash(key: int, values: np.ndarray) -> np.ndarray:
    """A uint64 hash of each number under a key."""
    return splitmix(np.asarray(values).astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))


def shuffled(key: int, values: np.ndarray) -> np.ndarray:
    """The numbers, all different, in an order that depends only on them and the key."""
    # splitmix64 is a bijection: different numbers have different hashes, so any sorting algorithm gives the same order.
    return values[np.argsort(keyed_hash(key, values))]


# ----------------------------------------------------------------------------------------- mixing by weight


@dataclass(frozen=True)
class Mix:
    """A fixed sequence of choices, each with its share, as evenly spread as possible.

    Common choices repeat a pattern. Choices with too small a share for a pattern of MAX_PERIOD places come from a mix of their own,
    spread evenly among the others at a fixed rate. So a choice with a share of one in a million comes once in a million places.

    Attributes:
        choices: number of choices.
        common: (n,) int64, the choices in the pattern.
        pattern: (period,) int64, the choice at each place.
        before: (period + 1, n) int64, how often each common choice came before a place.
        rare: the mix of the other choices, renumbered; `rare_choices` (choices - n,) are their original numbers.
        rate, whole: rare choices take `rate / whole` of all places.
    """

    choices: int
    common: np.ndarray
    pattern: np.ndarray
    before: np.ndarray
    rare: Mix | None = None
    rare_choices: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    rate: int = 0
    whole: int = 1

    def _rare_before(self, position: int) -> int:
        return (position * self.rate + self.whole // 2) // self.whole

    def counts_before(self, position: int) -> np.ndarray:
        """How often each choice came in the first `position` places, (choices,)."""
        rarely = self._rare_before(position)
        periods, place = divmod(position - rarely, len(self.pattern))
        counts = periods * self.before[-1] + self.before[place]
        if self.rare is None:
            return counts
        found = np.empty(self.choices, np.int64)
        found[self.common], found[self.rare_choices] = counts, self.rare.counts_before(rarely)
        return found

    def at(self, first: int, count: int) -> np.ndarray:
        """The choices at places [first, first + count)."""
        period = len(self.pattern)
        if self.rare is None:
            return self.pattern[(first % period + np.arange(count)) % period]
        rarely = self._rare_before(first)
        # Python's integers up to `first`; from there on the numbers fit 64 bits.
        left = (first * self.rate + self.whole // 2) % self.whole
        ticks = (
            left + np.arange(count + 1) * self.rate
        ) // self.whole  # rare ones since `first`, before each place and after all
        is_rare = np.diff(ticks) > 0
        found = self.pattern[((first - rarely) % period + np.arange(count) - ticks[:-1]) % period]
        found[is_rare] = self.rare_choices[self.rare.at(rarely, int(ticks[-1]))]
        return found


def shares(weights: Sequence[float]) -> np.ndarray:
    """Whole numbers in the ratio of the weights, with the smallest exact sum, or a sum near MAX_PERIOD."""
    fractions = _fractions(weights)
    candidates = fractions * np.arange(1, MAX_PERIOD + 1)[:, None]  # (periods, choices)
    exact = np.abs(candidates - np.rint(candidates)).max(axis=1) < 1e-9
    if exact.any():
        return np.rint(candidates[int(np.argmax(exact))]).astype(np.int64)
    return np.maximum(1, np.rint(candidates[-1])).astype(np.int64)


def _fractions(weights: Sequence[float]) -> np.ndarray:
    fractions = np.asarray(weights, np.float64) / np.sum(weights)
    if len(fractions) * 2 > MAX_PERIOD or not np.all(fractions > 0):
        raise DataError(f"got weights {list(weights)}, expected at most {MAX_PERIOD // 2} of them, all positive")
    return fractions


@lru_cache(maxsize=256)
def mix(weights: tuple[float, ...]) -> Mix:
    """Smooth weighted round robin (as in nginx): the choice most in arrears goes next.

    Each choice has its share to within a factor of two. If one pattern of all choices achieves that, it is used, so that existing runs keep
    their order.
    """
    fractions, counts = _fractions(weights), shares(weights)
    drawn = counts / counts.sum() / fractions
    # One place in a pattern is too much for these. The threshold of three quarters keeps their share within a factor of two.
    is_rare = fractions * MAX_PERIOD < 0.75
    if np.all((drawn > 0.5) & (drawn <= 2.0)) or not is_rare.any():
        return Mix(len(weights), np.arange(len(weights)), *_pattern(counts))
    common, rare = np.flatnonzero(~is_rare), np.flatnonzero(is_rare)
    pattern, before = _pattern(shares([weights[choice] for choice in common]))
    share = float(fractions[rare].sum())
    whole = 1 << min(
        62, 20 - math.frexp(share)[1]
    )  # so the rate has about 20 bits, and the products in `at` have less than 63
    within = mix(tuple(weights[choice] for choice in rare))
    return Mix(len(weights), common, common[pattern], before, within, rare, max(1, round(share * whole)), whole)


def _pattern(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    period = int(counts.sum())
    pattern = np.empty(period, np.int64)
    credit = np.zeros(len(counts), np.int64)
    for place in range(period):
        credit += counts
        choice = int(np.argmax(credit))
        credit[choice] -= period
        pattern[place] = choice
    before = np.zeros((period + 1, len(counts)), np.int64)
    before[np.arange(1, period + 1), pattern] = 1
    return pattern, np.cumsum(before, axis=0)


# --------------------------------------------------------------------------------------------- the order


@dataclass(frozen=True)
class Stock:
    """The facts about a source that decide the order.

    Attributes:
        shards: samples per shard, (shards,); the samples are numbered through them.
        bucket: bucket of each sample, (samples,), as a place in `Order.buckets`.
        weight: how often it is drawn, against the other sources.
        label: class of each sample, (samples,), to balance classes; None does not balance.
        balance: classes are drawn in proportion to n^(1 - balance), where n is their number of samples.
    """

    shards: np.ndarray
    bucket: np.ndarray
    weight: float = 1.0
    label: np.ndarray | None = None
    balance: float = 0.0

    def parts(self, bucket: int) -> list[tuple[int, np.ndarray, float]]:
        """The streams of a bucket: class, sample numbers and weight; the weights sum to that of the bucket's samples."""
        ids = np.flatnonzero(self.bucket == bucket)
        weight = self.weight * len(ids) / len(self.bucket)
        if self.label is None or not len(ids):
            return [(0, ids, weight)] if len(ids) else []
        classes, counts = np.unique(self.label[ids], return_counts=True)
        shares = counts.astype(np.float64) ** (1.0 - self.balance)
        return [
            (int(c), ids[self.label[ids] == c], weight * float(share))
            for c, share in zip(classes, shares / shares.sum(), strict=True)
        ]


class Window(NamedTuple):
    """Shards of one source whose samples are drawn together. `share`: the part of their samples that belongs to the stream."""

    source: int
    shards: tuple[int, ...]
    share: float


class Draw(NamedTuple):
    """A global batch, or several consecutive ones of one bucket: n = B * batches samples.

    Attributes:
        bucket: name of the bucket of all samples.
        sources, samples: source, and number in that source, of each position, (n,) int64 each.
        windows: the windows that contain them.
        window: place in `windows` of each position, (n,) int64.
        seed, number: of the order, and of the first global batch.
        batches: number of global batches.
    """

    bucket: str
    sources: np.ndarray
    samples: np.ndarray
    windows: tuple[Window, ...]
    window: np.ndarray
    seed: int = 0
    number: int = 0
    batches: int = 1


class _Stream:
    """The samples of one source and bucket, or of one class in it, epoch after epoch."""

    def __init__(self, source: int, ids: np.ndarray, stock: Stock, window: int, key: int):
        self.source = source
        self._ids, self._key, self._window = ids, key, window
        ends = np.cumsum(stock.shards)
        # The slice of `ids` in each shard; shards without a sample of the bucket are left out.
        first = np.searchsorted(ids, ends - stock.shards)
        last = np.searchsorted(ids, ends)
        self._shards = np.flatnonzero(last > first)
        self._first, self._count = first, last - first
        self._total = stock.shards
        self._epoch = lru_cache(maxsize=4)(self._make_epoch)
        self._place = lru_cache(maxsize=4)(self._make_window)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of an epoch, and the end of each window, (windows,)."""
        shards = shuffled(derive(self._key, epoch), self._shards)
        ends = np.cumsum(self._count[shards])[self._window - 1 :: self._window]
        if len(shards) % self._window:
            ends = np.append(ends, len(self._ids))
        return shards, ends

    def _make_window(self, epoch: int, number: int) -> tuple[np.ndarray, Window]:
        """The samples of a window in order, and the window."""
        shards = self._epoch(epoch)[0][number * self._window : (number + 1) * self._window]
        ids = np.concatenate([self._ids[self._first[s] : self._first[s] + self._count[s]] for s in shards])
        window = Window(self.source, tuple(sorted(int(s) for s in shards)), len(ids) / int(self._total[shards].sum()))
        return shuffled(derive(self._key, epoch, number), ids), window

    def after(self, position: int) -> Window:
        """The window after the one of a position."""
        epoch, within = divmod(position, len(self._ids))
        ends = self._epoch(epoch)[1]
        number = int(ends.searchsorted(within, side="right")) + 1
        return self._place(epoch, number)[1] if number < len(ends) else self._place(epoch + 1, 0)[1]

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, list[Window], np.ndarray]:
        """The samples at ascending positions (n,), their windows, and the place of each sample's window among those."""
        samples = np.empty(len(positions), np.int64)
        places = np.empty(len(positions), np.int64)
        windows: list[Window] = []
        done = 0
        while done < len(positions):
            epoch, within = divmod(int(positions[done]), len(self._ids))
            ends = self._epoch(epoch)[1]
            number = int(ends.searchsorted(within, side="right"))
            start = int(ends[number - 1]) if number else 0
            base = epoch * len(self._ids)
            stop = int(positions.searchsorted(base + int(ends[number])))
            ids, window = self._place(epoch, number)
            samples[done:stop] = ids[positions[done:stop] - (base + start)]
            if window not in windows:
                windows.append(window)
            places[done:stop] = windows.index(window)
            done = stop
        return samples, windows, places


class Order:
    """The sequence of global batches over one or more sources.

    Args:
        sources: what there is.
        seed: of the order.
        global_batch: samples per draw.
        window: number of shards whose samples are shuffled together.
        buckets: their names.
    """

    def __init__(
        self, sources: Sequence[Stock], seed: int, global_batch: int, window: int = 8, buckets: Sequence[str] = ("",)
    ):
        if not sources or global_batch < 1 or window < 1:
            raise DataError(
                f"order: got {len(sources)} sources, batch {global_batch}, window {window}, all must be >= 1"
            )
        self.seed, self.global_batch, self.buckets = seed, global_batch, tuple(buckets)
        self._streams: dict[int, list[_Stream]] = {}
        self._mixes: dict[int, Mix] = {}
        bucket_weights = []
        for bucket in range(len(buckets)):
            streams, weights = [], []
            for number, stock in enumerate(sources):
                for label, ids, weight in stock.parts(bucket):
                    key = derive(seed, number, bucket) if stock.label is None else derive(seed, number, bucket, label)
                    streams.append(_Stream(number, ids, stock, window, key))
                    weights.append(weight)
            if streams:
                self._streams[bucket], self._mixes[bucket] = streams, mix(tuple(weights))
                bucket_weights.append(sum(weights))
        if not self._streams:
            raise DataError("order: got no samples in any of the buckets; check the sources of the recipe")
        self._drawn = list(self._streams)
        self._bucket_mix = mix(tuple(bucket_weights))

    @property
    def num_streams(self) -> int:
        """The sources by buckets, and by classes where those are balanced; each stream has its own window."""
        return sum(map(len, self._streams.values()))

    def _start(self, draw: int) -> tuple[int, int]:
        """The bucket of a draw, and how many samples of the bucket come before it."""
        choice = int(self._bucket_mix.at(draw, 1)[0])
        return self._drawn[choice], int(self._bucket_mix.counts_before(draw)[choice]) * self.global_batch

    def alike(self, draw: int, most: int) -> int:
        """How many global batches from `draw` on, at most `most`, have its bucket."""
        if self._bucket_mix.choices == 1:
            return most
        buckets = self._bucket_mix.at(draw, most)
        others = np.flatnonzero(buckets != buckets[0])
        return int(others[0]) if len(others) else most

    def after(self, draw: int, count: int = 1) -> Iterator[Window]:
        """The next windows of the streams that a draw of `count` global batches takes samples from."""
        bucket, first = self._start(draw)
        before = self._mixes[bucket].counts_before(first + self.global_batch * count)
        for stream, taken in zip(self._streams[bucket], before.tolist(), strict=True):
            if taken:
                yield stream.after(taken - 1)

    def batch(self, draw: int, count: int = 1) -> Draw:
        """The global batch number `draw`, counted from 0, or `count` consecutive ones, which must be `alike`."""
        bucket, first = self._start(draw)
        size = self.global_batch * count
        sources_mix, streams = self._mixes[bucket], self._streams[bucket]
        if len(streams) == 1:
            samples, found, window = streams[0].at(np.arange(first, first + size))
            sources = np.full(size, streams[0].source)
            return Draw(self.buckets[bucket], sources, samples, tuple(found), window, self.seed, draw, count)
        chosen = sources_mix.at(first, size)  # (n,)
        before = sources_mix.counts_before(first)
        sources = np.empty(size, np.int64)
        samples, window = np.empty_like(sources), np.empty_like(sources)
        windows: list[Window] = []
        for number, stream in enumerate(streams):
            places = np.flatnonzero(chosen == number)
            sources[places] = stream.source
            samples[places], found, within = stream.at(before[number] + np.arange(len(places)))
            window[places] = within + len(windows)
            windows += found
        return Draw(self.buckets[bucket], sources, samples, tuple(windows), window, self.seed, draw, count)


def fixed_order(counts: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` samples in an order that depends only on the numbers of samples, for validation.

    Returns:
        sources, samples: (min(count, all),) int64 each, without repetition.
    """
    sources = np.repeat(np.arange(len(counts)), counts)
    samples = np.concatenate([np.arange(n) for n in counts])
    order = np.argsort(keyed_hash(derive(len(counts)), np.arange(len(sources))), kind="stable")[:count]
    return sources[order], samples[order]
