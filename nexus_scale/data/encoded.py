"""Fields that a conditioner makes from raw values while batches are read, so that a small data set needs no precompute job."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from nexus_scale.contracts import CondField, Conditioner, UserError
from nexus_scale.data.manifest import DataError
from nexus_scale.processes.latents import LatentStats, split_moments

log = logging.getLogger(__name__)

CACHE_BYTES = 512 << 20
"""Most bytes of encoded values that are kept; further ones are encoded again each time."""

Row = Mapping[str, np.ndarray]


def as_batch(
    rows: Sequence[Row], fields: Mapping[str, CondField], lengths: Mapping[str, int | None] | None = None
) -> dict[str, Tensor]:
    """Encoded values as one batch: fields (n, ...), each in its stored type.

    Args:
        rows: the fields of each value, at least one; see `Conditioner.encode`.
        fields: the ones to take.
        lengths: to which sequences (L, ...) are cut or padded with zeros; None, or an absent name: the length of the longest value.
    Returns:
        The fields, and for each sequence its `<name>_mask` (n, L), True at real entries.
    """
    batch: dict[str, Tensor] = {}
    for name, field in fields.items():
        values = [torch.from_numpy(np.asarray(row[name], order="C")) for row in rows]
        if not field.varies:
            batch[name] = torch.stack(values)
            continue
        length = (lengths or {}).get(name) or max(len(value) for value in values)
        batch[name] = values[0].new_zeros(len(values), length, *values[0].shape[1:])
        batch[f"{name}_mask"] = torch.zeros(len(values), length, dtype=torch.bool)
        for row, value in enumerate(values):
            real = min(len(value), length)
            batch[name][row, :real] = value[:real]
            batch[f"{name}_mask"][row, :real] = True
    return batch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Runs the block on one thread, as in precompute jobs, because floating-point sums depend on the number of threads (MiniLM: half of the
    captions differ in the last bit on two). Other threads are not affected."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Encoded:
    """A conditioner that encodes one raw field of the data. Each value is encoded alone, once, on one thread, and kept while there is room.
    So neither the order of reading nor the number of workers changes the result.

    Args:
        conditioner: what encodes.
        raw: name of the field it reads, such as `caption`.
        read: what a decoded payload is to the conditioner.
        latent_stats: how latents that it makes are normalised; see `measured`.
    """

    def __init__(
        self,
        conditioner: Conditioner,
        raw: str,
        cache_bytes: int = CACHE_BYTES,
        read: Callable[[Any], Any] = lambda value: value,
        latent_stats: LatentStats | None = None,
    ):
        self.conditioner, self.raw, self.read, self.latent_stats = conditioner, raw, read, latent_stats
        self._room = cache_bytes
        self._cut: set[str] = set()  # fields for which cut values were reported
        self._rows: dict[bytes, Row] = {}
        self._lock = threading.Lock()  # the prefetching thread and validation share a conditioner

    @property
    def fields(self) -> Mapping[str, CondField]:
        return self.conditioner.fields

    @property
    def encoder(self) -> dict[str, object]:
        """The encoder's description as in a manifest."""
        return {"kind": self.conditioner.reads, "fingerprint": self.conditioner.fingerprint}

    def row(
        self, payload: bytes, decode: Callable[[bytes], Any], lengths: Mapping[str, int | None] | None = None
    ) -> Row:
        """The fields of one value, as its payload decodes to. Logs once that a value is longer than batches of these `lengths` keep.

        Raises:
            DataError: it cannot be decoded or encoded.
        """
        key = xxhash.xxh3_128_digest(payload)
        with self._lock:
            row = self._rows.get(key)
            if row is None:
                value = self.read(decode(payload))
                try:
                    self._say_what_is_cut(value, lengths or {})
                    with one_thread():
                        row = self.conditioner.encode([value])[0]
                except UserError as error:
                    raise DataError(str(error)) from error
                size = sum(array.nbytes for array in row.values())
                if size <= self._room:
                    self._rows[key], self._room = row, self._room - size
            return row

    def _say_what_is_cut(self, value: Any, lengths: Mapping[str, int | None]) -> None:
        for name, (_, read) in self.conditioner.cut([value], lengths).items():
            if name not in self._cut:
                self._cut.add(name)
                log.warning(
                    "data: some %ss are longer than the %d tokens that are read as %s, and are cut, such as %.80r; where the encoder takes "
                    "more, raise data.text_tokens or data.tokens.%s",
                    self.raw, read, name, value, name,
                )  # fmt: skip


MEASURED = 1024
"""Samples whose latents say how those of a set are normalised that are encoded while reading by an autoencoder that states nothing."""


def measured(batches: Iterable[Tensor]) -> LatentStats:
    """Mean and deviation per channel of draws from posteriors, moments (n, 2C, ...) each, to three digits: those that other devices and
    orders of sums give, too, so that a run finds its own again.

    Raises:
        DataError: a channel that never varies.
    """
    count, first, second = 0, torch.zeros(()), torch.zeros(())
    for moments in batches:
        mean, logvar = (part.double().transpose(0, 1).flatten(1) for part in split_moments(moments))  # (C, values)
        count += mean.shape[1]
        first, second = first + mean.sum(1), second + (mean.square() + logvar.exp()).sum(1)
    mean = first / count
    std = (second / count - mean.square()).clamp_min(0).sqrt()
    try:
        return LatentStats(*(tuple(float(f"{value:.3g}") for value in part.tolist()) for part in (mean, std)))
    except ValueError as error:
        raise DataError(f"{error}; check the autoencoder and the images") from error
