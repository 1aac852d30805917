"""Images that have nothing to do with the samples that they stand beside, as CycleGAN learns from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np
from torch import Tensor

from nexus_scale.data.bad import Note
from nexus_scale.data.order import Draw, Order, Window, derive
from nexus_scale.data.reader import Reader


class Others(Protocol):
    """A data set that images are taken from; `data.dataset.Dataset` is one. `image`: the name of its one field of images."""

    @property
    def image(self) -> str: ...

    @property
    def samples(self) -> int: ...

    @property
    def first_numbers(self) -> np.ndarray: ...

    def order(self, seed: int, global_batch: int) -> Order: ...

    def reader(self, world_size: int = 1, note: Note | None = None) -> Reader: ...


class UnpairedReader(Reader):
    """Reads images of other data sets beside the samples of one. Which ones follows from the number of the draw alone: each set has an
    order of its own, in which its samples come as often as each other.

    Args:
        own: reads the samples.
        unpaired: the other sets, by the names of their images in batches.
    """

    def __init__(self, own: Reader, unpaired: Mapping[str, Others], world_size: int, note: Note | None):
        self.own, self.unpaired = own, unpaired
        self._readers = {name: other.reader(world_size, note) for name, other in unpaired.items()}
        self._orders: dict[tuple[str, int, int], Order] = {}

    def fetch(self, windows: Iterable[Window]) -> None:
        self.own.fetch(windows)

    def read(self, draw: Draw, places: np.ndarray) -> tuple[dict[str, Tensor], np.ndarray]:
        draws = {name: self._draw(name, other, draw) for name, other in self.unpaired.items()}
        for name, drawn in draws.items():
            if drawn.windows:
                after = self._order(name, draw).after(draw.number, draw.batches)
                self._readers[name].fetch((*drawn.windows, *after))
        fields, taken = self.own.read(draw, places)
        for name, drawn in draws.items():
            beside, _ = self._readers[name].read(drawn, places)
            fields[name] = beside[self.unpaired[name].image]
        return fields, taken

    def _draw(self, name: str, other: Others, draw: Draw) -> Draw:
        """The samples of another set that stand beside those of a draw."""
        if not len(draw.windows):  # a fixed order: that of the samples' numbers
            numbers = draw.samples % other.samples
            sources = np.searchsorted(other.first_numbers, numbers, side="right") - 1
            return draw._replace(sources=sources, samples=numbers - other.first_numbers[sources])
        return self._order(name, draw).batch(draw.number, draw.batches)

    def _order(self, name: str, draw: Draw) -> Order:
        """The order of another set beside an order of the samples."""
        size = len(draw.samples) // draw.batches
        key = (name, draw.seed, size)
        if key not in self._orders:
            self._orders[key] = self.unpaired[name].order(derive(draw.seed, *name.encode()), size)
        return self._orders[key]

    def close(self) -> None:
        for reader in (self.own, *self._readers.values()):
            reader.close()
