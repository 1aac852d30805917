"""This rank's micro-batches of each global batch, read ahead by a thread that does not change their content or order.

What comes next follows from `Progress` alone: the loader has no position of its own that a checkpoint could miss. When progress moves (a
resume, a rollback, skipped batches), prefetching restarts from there.
"""

from __future__ import annotations

import atexit
import itertools
import math
import queue
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from nexus_scale.contracts import Batch, Progress, Stage, UserError
from nexus_scale.data.bad import BadData, Note
from nexus_scale.data.dataset import Dataset, Samples, Source
from nexus_scale.data.errors import DataError, StoreError
from nexus_scale.kernels.transfer import pinned

__all__ = ["BadData", "DataError", "Dataset", "Loader", "Source"]


def next_draw(draw: int, skipped: Sequence[tuple[int, int]]) -> int:
    """The first global batch from `draw` on that is not skipped."""
    while ranges := [last for first, last in skipped if first <= draw <= last]:
        draw = max(ranges) + 1
    return draw


class RankBatches(NamedTuple):
    """This rank's micro-batches of a global batch, and how many of their samples replace bad ones."""

    batches: list[Batch]
    replaced: int

    @property
    def bytes(self) -> int:
        return sum(value.nbytes for batch in self.batches for value in batch.fields.values())


_LOT, _LOT_BYTES = 8, 8 << 20
"""Most batches, and most bytes, that are made at once: small batches cost more to request than to gather."""


class _Prefetcher:
    """A thread that makes global batches from a draw on and puts them into a short queue, several small ones at a time."""

    def __init__(self, loader: Loader, draw: int, skipped: Sequence[tuple[int, int]], depth: int):
        self.skipped = tuple(skipped)
        self._loader, self._draw, self._depth = loader, draw, depth
        self._asked: queue.SimpleQueue[int] = queue.SimpleQueue()  # the numbers of batches to make next
        self._made: queue.SimpleQueue[list[tuple[int, RankBatches | BaseException]]] = queue.SimpleQueue()
        self._lot: list[tuple[int, RankBatches | BaseException]] = []  # the batches being taken, the next one last
        self._size = 0  # the bytes of the first batch decide how many are made at once
        self._asked.put(1)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        atexit.register(self.close)  # a thread inside torch at the interpreter's exit would abort the process
        self._thread.start()

    def _run(self) -> None:
        draw = self._draw
        while True:
            asked = self._asked.get()
            lot: list[tuple[int, RankBatches | BaseException]] = []
            while len(lot) < asked:
                if self._stop.is_set():
                    return
                draw = next_draw(draw, self.skipped)
                made = self._make(draw, self._together(draw, asked - len(lot)))
                lot += enumerate(made, draw)
                if isinstance(made[-1], BaseException):
                    break
                draw += len(made)
            if not self._size and isinstance(result := lot[0][1], RankBatches):
                self._size = min(max(1, _LOT_BYTES // max(1, result.bytes)), _LOT)
                for _ in range(math.ceil(self._depth / self._size)):
                    self._asked.put(self._size)
            self._made.put(lot)
            if isinstance(lot[-1][1], BaseException):
                return

    def _together(self, draw: int, most: int) -> int:
        """How many batches from a draw on, at most `most`, can be made together: none is skipped, and all have one bucket."""
        next_range = min((first for first, _ in self.skipped if first > draw), default=draw + most)
        return self._loader.alike(draw, min(most, next_range - draw))

    def _make(self, draw: int, count: int) -> list[RankBatches | BaseException]:
        """Puts `count` batches from a draw on into the queue; an error, which the training thread raises, ends them."""
        try:
            return [*self._loader.make(draw, count)]
        except BaseException as error:
            if count == 1 or isinstance(error, StoreError):
                return [error]
        results: list[RankBatches | BaseException] = []  # one by one, so that an error belongs to its batch
        while len(results) < count and not (results and isinstance(results[-1], BaseException)):
            results += self._make(draw + len(results), 1)
        return results

    def take(self) -> tuple[int, RankBatches | BaseException]:
        """The next global batch and its number, or the error that ended the thread."""
        while not self._lot:
            alive = self._thread.is_alive()
            try:
                self._lot = self._made.get(timeout=1.0)[::-1]
            except queue.Empty:
                if not alive:  # it had ended before the wait began, so the queue holds nothing from it
                    return self._draw, RuntimeError("the prefetching thread ended without an error")
                continue
            self._asked.put(self._size)
        return self._lot.pop()

    def close(self) -> None:
        self._stop.set()
        self._asked.put(1)  # it may be waiting for that
        self._thread.join()
        atexit.unregister(self.close)


class Loader:
    """The micro-batches of one rank. With W ranks and micro-batches of m, micro-batch i of rank r has the positions
    [(i*W + r)*m, (i*W + r + 1)*m) of the global batch, so neither W nor m changes which sample stands where.

    Args:
        dataset: a `Dataset` or a `SyntheticDataset`.
        progress: where the run is; `next_batches` advances its `draws`.
        prefetch: least number of global batches to read ahead; 0 reads in the training thread.
        device: where batches are computed with. For a GPU their fields are left in pinned memory, so that copies to it run beside host
            and device.
        stage: called with `data` when a batch is requested.
        note: `note(kind, message, **facts)` gets incidents such as bad data and slow stores.

    Attributes:
        wait_seconds: time that `next_batches` has spent waiting for data.
        replaced: number of samples so far, on this rank, that replaced bad ones.
    """

    def __init__(
        self,
        dataset: Samples,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        progress: Progress,
        prefetch: int = 2,
        device: torch.device | str = "cpu",
        stage: Stage | None = None,
        note: Note | None = None,
    ):
        if micro_batch < 1 or global_batch % (world_size * micro_batch):
            each, rest = divmod(global_batch, world_size)
            sizes = [m for m in range(1, each + 1) if each % m == 0] if not rest else []
            raise UserError(
                f"global_batch {global_batch} does not divide into micro-batches of {micro_batch} on {world_size} "
                "workers; "
                + (f"micro_batch can be {sizes}" if sizes else "take a number of workers that divides global_batch")
            )
        assert 0 <= rank < world_size, (rank, world_size)
        self.dataset, self.progress, self.wait_seconds = dataset, progress, 0.0
        self.replaced, self._device = 0, torch.device(device)
        self._order = dataset.order(seed, global_batch)
        self._stage, self._prefetch = stage, prefetch
        accumulation = global_batch // (world_size * micro_batch)
        first = (np.arange(accumulation) * world_size + rank) * micro_batch  # (accumulation,)
        self._places = (first[:, None] + np.arange(micro_batch)).reshape(-1)  # (accumulation * micro,)
        places = pinned({"places": torch.from_numpy(self._places)}, self._device)["places"]
        self._positions = places.split(micro_batch)
        self._micro_batch = micro_batch
        self._reader = dataset.reader(world_size, note)
        self._ahead: _Prefetcher | None = None

    def next_batches(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch that is not skipped.

        Raises:
            DataError: shards or samples are missing or damaged, and the policy is to stop, or there are too many.
            StoreError: an object store cannot be reached.
            RuntimeError: anything else that ended the prefetching thread. The next call restarts at the same batch.
        """
        if self._stage is not None:
            self._stage("data")
        begun = time.perf_counter()
        draw = next_draw(self.progress.draws, self.progress.skipped)
        made = self._take(draw)
        self.progress.draws = draw + 1
        self.replaced += made.replaced
        self.wait_seconds += time.perf_counter() - begun
        return made.batches

    def _take(self, draw: int) -> RankBatches:
        if self._prefetch < 1:
            return self.make(draw)[0]
        if self._ahead is not None and self._ahead.skipped != tuple(self.progress.skipped):
            self._rest()
        for _ in range(2):
            if self._ahead is None:
                self._ahead = _Prefetcher(self, draw, self.progress.skipped, self._prefetch)
            got, result = self._ahead.take()
            if isinstance(result, BaseException):
                self._rest()
                if got != draw:  # progress has moved away from the batch with the error
                    continue
                if isinstance(result, UserError | StoreError):
                    raise result
                raise RuntimeError(f"the loader failed at global batch {got}") from result
            if got == draw:
                return result
            self._rest()
        raise AssertionError(f"reading ahead started at {draw} and gave {got}")

    def alike(self, draw: int, most: int) -> int:
        """How many global batches from `draw` on, at most `most`, can be made together."""
        return self._order.alike(draw, most)

    def make(self, draw: int, count: int = 1) -> list[RankBatches]:
        """This rank's part of `count` global batches from `draw` on, which are `alike`; a function of these numbers alone.

        All are gathered at once and then split into batches.
        """
        drawn = self._order.batch(draw, count)
        self._reader.fetch(itertools.chain(drawn.windows, self._order.after(draw, count)))
        first = np.arange(count) * self._order.global_batch
        places = (first[:, None] + self._places).reshape(-1)  # (count * accumulation * micro,)
        read, taken = self._reader.read(drawn, places)
        fields = pinned(read, self._device)
        replaced = (taken != drawn.samples[places]).reshape(count, -1).sum(axis=1)
        numbers = taken + self.dataset.first_numbers[drawn.sources[places]]
        pieces = [value.split(self._micro_batch) for value in (*fields.values(), torch.from_numpy(numbers))]
        each = len(self._positions)
        batches = [
            Batch(
                dict(zip(fields, values, strict=True)),
                self._positions[i % each],
                samples,
                draw + i // each,
                drawn.bucket,
            )
            for i, (*values, samples) in enumerate(zip(*pieces, strict=True))
        ]
        return [
            RankBatches(batches[i * each : (i + 1) * each], stand_ins) for i, stand_ins in enumerate(replaced.tolist())
        ]

    def _rest(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def close(self) -> None:
        """Ends the thread and closes files. A later request starts anew."""
        self._rest()
        self._reader.close()
