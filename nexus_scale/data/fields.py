"""Tensors from the payloads of a batch: gathered at once where all have the same length, otherwise one by one.

Arrays keep their stored type; `Batch.on` widens them on the device. Images become float32 (3, H, W) in [-1, 1]. Sequences (L, ...), such
as text embeddings, and sounds (C, T) are cut or padded to one length, with a mask of the real entries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nexus_scale.data.images import decode_image
from nexus_scale.data.manifest import DataError, Field
from nexus_scale.data.npy import HEADER_BYTES, NpyHeader, parse_header
from nexus_scale.data.shards import BLOCK
from nexus_scale.data.sounds import decode_wav

TORCH_TYPES = {
    name: getattr(torch, name)
    for name in (
        "float16",
        "float32",
        "float64",
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "uint16",
        "uint32",
    )
}


LARGEST_BATCH = 32 << 30
"""Most bytes of one field in a padded batch. More means a wrong bound, or a manifest that was tampered with."""
_POWERS = 10 ** np.arange(18, dtype=np.int64)


class Payloads(NamedTuple):
    """The payloads of one field: their `positions` and `lengths` in `buffer`, (n,) int64 each."""

    buffer: Tensor
    positions: np.ndarray
    lengths: np.ndarray


def fits(expected: Sequence[int | None], shape: Sequence[int]) -> bool:
    """Whether a shape matches; None stands for any number."""
    return len(expected) == len(shape) and all(a in (None, b) for a, b in zip(expected, shape, strict=True))


def check_header(field: Field, header: NpyHeader, length: int) -> None:
    """Raises DataError unless an array has the dtype and shape that the manifest gives its field."""
    shape = field.shape if field.shape is not None else header.shape
    if header.name != field.dtype or not fits(shape, header.shape):
        raise DataError(f"field {field.name!r}: got {header.name} {header.shape}, expected {field.dtype} {field.shape}")
    if header.data + math.prod(header.shape) * header.dtype.itemsize != length:
        raise DataError(f"field {field.name!r}: got {length} bytes for {header.name} {header.shape}")


def _headers(payloads: Payloads) -> Tensor:
    """The first 128 bytes of each payload, (n, 128) uint8."""
    rows = payloads.buffer.as_strided(((payloads.buffer.numel() - HEADER_BYTES) // BLOCK + 1, HEADER_BYTES), (BLOCK, 1))
    return rows.index_select(0, torch.from_numpy(payloads.positions // BLOCK))


def _one_header(field: Field, payloads: Payloads) -> NpyHeader:
    """The header shared by all arrays of a batch.

    If the manifest leaves no axis open, equal lengths are enough: the writer checked every array against the same shape, and the hash shows
    that the bytes are the writer's. Then one header is read instead of all.
    """
    lengths, first = payloads.lengths, int(payloads.positions[0])
    same = bool((lengths == lengths[0]).all())
    if same and (field.shape is None or None in field.shape):
        headers = _headers(payloads)
        same = bool((headers == headers[0]).all())
    if not same:
        shapes = sorted({parse_header(header.tobytes()).shape for header in _headers(payloads).numpy()})
        raise DataError(
            f"field {field.name!r}: got shapes {shapes} in one batch, expected one; give each a bucket of its own"
        )
    header = parse_header(payloads.buffer[first : first + HEADER_BYTES].numpy().tobytes())
    check_header(field, header, int(lengths[0]))
    return header


def _check_finite(field: Field, values: Tensor) -> None:
    # A sum takes a tenth of the time of isfinite. It may overflow although all values are finite; isfinite then decides.
    if not values.is_floating_point() or math.isfinite(float(values.sum(dtype=torch.float32))):
        return
    if not bool(values.isfinite().all()):
        raise DataError(f"field {field.name!r}: got values that are not finite")


def _arrays(header: NpyHeader, payloads: Payloads, values: int) -> Tensor:
    """A view of the buffer as arrays with this header, (blocks, values): row i has the values of a payload that begins at block i."""
    size = header.dtype.itemsize
    blocks = (payloads.buffer.numel() - header.data - values * size) // BLOCK + 1
    numbers = payloads.buffer.view(TORCH_TYPES[header.name])
    return numbers.as_strided((blocks, values), (BLOCK // size, 1), header.data // size)  # rows overlap


def read_arrays(field: Field, payloads: Payloads, finite: bool = False) -> Tensor:
    """Arrays of one shape, (n, *shape).

    Args:
        finite: whether the values are known to be finite; otherwise they are checked.
    Raises:
        DataError: other than the manifest says, of different shapes within one batch, or not finite.
    """
    header = _one_header(field, payloads)
    places = torch.from_numpy(payloads.positions // BLOCK)
    out = _arrays(header, payloads, math.prod(header.shape)).index_select(0, places)
    if not finite:
        _check_finite(field, out)
    return out.view(-1, *header.shape)  # (n, *shape)


def read_sequences(field: Field, payloads: Payloads, tokens: int, finite: bool = False) -> tuple[Tensor, Tensor]:
    """Arrays (L, ...) of many lengths, cut or padded with zeros to (n, tokens, ...), and the mask (n, tokens) of real tokens.

    Raises:
        DataError: as in `read_arrays`; also a sequence without tokens, which has no softmax.
    """
    rows_of: dict[bytes, list[int]] = {}
    for row, start in enumerate(_headers(payloads).numpy().view(f"V{HEADER_BYTES}")[:, 0].tolist()):
        rows_of.setdefault(start, []).append(row)
    groups = [(parse_header(start), np.array(rows)) for start, rows in rows_of.items()]
    first = groups[0][0].shape
    lengths = np.empty(len(payloads.positions), np.int64)
    for header, rows in groups:
        for length in set(payloads.lengths[rows].tolist()):
            check_header(field, header, length)
        if not header.shape[0]:
            raise DataError(f"field {field.name!r}: got a sequence without tokens")
        if header.shape[1:] != first[1:]:
            raise DataError(f"field {field.name!r}: got {header.shape} and {(None, *first[1:])} in one batch")
        lengths[rows] = header.shape[0]
    inner = math.prod(first[1:])
    if (needed := len(lengths) * tokens * inner * groups[0][0].dtype.itemsize) > LARGEST_BATCH:
        raise DataError(
            f"field {field.name!r}: got a batch of {len(lengths)} samples padded to {tokens}, or {needed / 1e9:.3g} GB, expected at "
            f"most {LARGEST_BATCH / 1e9:.3g}; lower the bound of its bucket, or its cap in data.tokens or data.text_tokens"
        )
    if len(groups) == 1:
        values = min(tokens, first[0]) * inner
        flat = _arrays(groups[0][0], payloads, values).index_select(0, torch.from_numpy(payloads.positions // BLOCK))
        if values < tokens * inner:
            flat = torch.nn.functional.pad(flat, (0, tokens * inner - values))
    else:
        make = torch.empty if int(lengths.min()) >= tokens else torch.zeros
        flat = make(len(lengths), tokens * inner, dtype=TORCH_TYPES[field.dtype])
        numbers, size = payloads.buffer.view(TORCH_TYPES[field.dtype]), groups[0][0].dtype.itemsize
        for header, rows in groups:
            values = min(tokens, header.shape[0]) * inner
            begins = (payloads.positions[rows] + header.data) // size
            for row, begin in zip(rows.tolist(), begins.tolist(), strict=True):
                flat[row, :values] = numbers[begin : begin + values]
    out = flat.view(-1, tokens, *first[1:])
    if not finite:
        _check_finite(field, out)
    return out, torch.arange(tokens) < torch.from_numpy(lengths)[:, None]  # (n, tokens, ...), (n, tokens)


def read_sounds(field: Field, payloads: Payloads, samples: int) -> tuple[Tensor, Tensor]:
    """Waves (C, T) of many lengths, cut or padded with silence to (n, C, samples) float32, and the mask (n, samples) of real samples.

    Raises:
        DataError: a wave is damaged, or has another number of channels than the field.
    """
    waves = [decode_wav(data).wave for data in read_bytes(payloads)]
    channels = waves[0].shape[0] if field.shape is None or field.shape[0] is None else field.shape[0]
    for wave in waves:
        if wave.shape[0] != channels:
            raise DataError(f"field {field.name!r}: got a sound of {wave.shape[0]} channels, expected {channels}")
    out = torch.zeros(len(waves), channels, samples)
    for row, wave in enumerate(waves):
        used = min(samples, wave.shape[1])
        out[row, :, :used] = torch.from_numpy(wave[:, :used])
    lengths = torch.tensor([wave.shape[1] for wave in waves])
    return out, torch.arange(samples) < lengths[:, None]  # (n, C, samples), (n, samples)


def read_bytes(payloads: Payloads) -> list[bytes]:
    data = payloads.buffer.numpy()
    places = zip(payloads.positions.tolist(), payloads.lengths.tolist(), strict=True)
    return [data[position : position + length].tobytes() for position, length in places]


def _plain_numbers(payloads: Payloads) -> Tensor | None:
    """Numbers of at most 18 digits, parsed all at once; None where a payload is anything else."""
    width = int(payloads.lengths.max())
    if width > 18 or payloads.lengths.min() < 1:
        return None
    rows = payloads.buffer.as_strided(((payloads.buffer.numel() - width) // BLOCK + 1, width), (BLOCK, 1))
    text = rows.index_select(0, torch.from_numpy(payloads.positions // BLOCK)).numpy()  # (n, width)
    digits = text - np.uint8(48)  # wraps to above 9 for other characters
    power = payloads.lengths[:, None] - np.arange(1, width + 1)  # (n, width), negative beyond the last digit
    digits[power < 0] = 0
    if (digits > 9).any():
        return None
    return torch.from_numpy((digits * _POWERS[power]).sum(axis=1))


def read_numbers(field: Field, payloads: Payloads, key: str | None) -> Tensor:
    """Whole numbers (n,) int64 from `.cls`, or from under `key` of `.json`."""
    if key is None and (plain := _plain_numbers(payloads)) is not None:
        return plain
    numbers = []
    for data in read_bytes(payloads):
        try:
            value = int(data) if key is None else json.loads(data)[key]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise DataError(
                f"field {field.name!r}: got {data[:80]!r}, expected a whole number, alone or under {key!r} of JSON"
            ) from error
        if not isinstance(value, int) or not -(1 << 63) < value < 1 << 63:
            raise DataError(
                f"field {field.name!r}: got {f'{value!r}'[:80]} under {key!r}, expected a whole number of at most 63 bits"
            )
        numbers.append(value)
    return torch.tensor(numbers, dtype=torch.int64)


class NumberCache:
    """A cache of the numbers of samples: parsing a label takes a third of the time of gathering its latent."""

    _UNKNOWN = np.iinfo(np.int64).min

    def __init__(self, samples: int):
        self._numbers = np.full(samples, self._UNKNOWN)

    def get(self, samples: np.ndarray) -> Tensor | None:
        """The numbers of samples (n,), as (n,) int64; None where some are unknown."""
        numbers = self._numbers.take(samples)
        return None if (numbers == self._UNKNOWN).any() else torch.from_numpy(numbers)

    def put(self, samples: np.ndarray, numbers: Tensor) -> None:
        self._numbers[samples] = numbers.numpy()


class PixelCache:
    """A cache of decoded images: decoding a PNG costs a hundred times as much as copying its pixels."""

    def __init__(self, max_bytes: int):
        self._room = max_bytes
        self._pixels: dict[tuple[str, int], np.ndarray] = {}

    def get(self, name: str, sample: int) -> np.ndarray | None:
        return self._pixels.get((name, sample))

    def decode(self, name: str, sample: int, field: Field, payload: Payloads) -> np.ndarray:
        """The pixels (H, W, 3) of a payload, cached if there is room."""
        pixels = decode_image(read_bytes(payload)[0])
        if field.shape is not None and not fits(field.shape, pixels.shape):
            raise DataError(f"field {field.name!r}: got an image of {pixels.shape}, expected {field.shape}")
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._pixels[name, sample] = pixels
        return pixels


def images_to_tensor(pixels: Sequence[np.ndarray]) -> Tensor:
    """A batch (n, 3, H, W) float32 in [-1, 1] of n images (H, W, 3) uint8."""
    shapes = {array.shape for array in pixels}
    if len(shapes) > 1:
        raise DataError(
            f"got images of {sorted(shapes)} in one batch, expected one size; give each a bucket of its own"
        )
    stacked = torch.from_numpy(np.stack(pixels))  # (n, H, W, 3)
    return (
        stacked.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 127.5).sub_(1.0)
    )
