"""Sounds in shards: 16-bit PCM in a RIFF file, read as float32 and written back with the same bits.

Other kinds of .wav (floats, companded telephony, 24 bits) are converted when they are ingested.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from nexus_scale.data.errors import DataError

_PCM, _EXTENSIBLE = 1, 0xFFFE
_FULL_SCALE = 32768.0


class Sound(NamedTuple):
    """`wave`: (C, T) float32 in [-1, 1)."""

    wave: np.ndarray
    sample_rate_hz: int


def decode_wav(data: bytes) -> Sound:
    """The samples of a RIFF file of 16-bit PCM.

    Raises:
        DataError: damaged, cut, without samples, or of another kind.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise DataError(f"got a .wav that begins with {data[:12]!r}, expected RIFF and WAVE")
    layout: tuple[int, int] | None = None  # channels, rate
    position = 12
    while position + 8 <= len(data):
        name, size = data[position : position + 4], int.from_bytes(data[position + 4 : position + 8], "little")
        body = data[position + 8 : position + 8 + size]
        if len(body) < size:
            raise DataError(f"got a .wav with {len(body)} of {size} bytes in its chunk {name!r}; it is cut")
        if name == b"fmt ":
            layout = _layout(body)
        elif name == b"data":
            if layout is None:
                raise DataError("got a .wav whose samples come before their format")
            channels, rate = layout
            if not size or size % (2 * channels):
                raise DataError(
                    f"got a .wav of {size} bytes for {channels} channels of 16 bits, expected whole samples"
                )
            values = np.frombuffer(body, "<i2").reshape(-1, channels)  # (T, C)
            return Sound(np.ascontiguousarray(values.T, np.float32) / np.float32(_FULL_SCALE), rate)
        position += 8 + size + size % 2
    raise DataError("got a .wav without samples; it is cut or damaged")


def _layout(body: bytes) -> tuple[int, int]:
    if len(body) < 16:
        raise DataError(f"got a .wav with a format of {len(body)} bytes, expected at least 16")
    kind, channels, rate, _, _, bits = struct.unpack("<HHIIHH", body[:16])
    if kind == _EXTENSIBLE and len(body) >= 26:
        kind = int.from_bytes(body[24:26], "little")  # the first bytes of the GUID
    if kind != _PCM or bits != 16 or not channels or not rate:
        raise DataError(
            f"got a .wav of format {kind}, {bits} bits, {channels} channels at {rate} Hz, expected PCM (1) of 16 bits; "
            "ingest_speech converts others"
        )
    return channels, rate


def encode_wav(wave: np.ndarray, sample_rate_hz: int) -> bytes:
    """A RIFF file of a wave (C, T): int16 unchanged, float32 in [-1, 1] rounded to 16 bits and clipped."""
    if wave.dtype.kind == "f":
        wave = np.clip(np.rint(wave.astype(np.float64) * _FULL_SCALE), -32768, 32767).astype(np.int16)
    if wave.dtype != np.int16 or wave.ndim != 2 or not wave.size:
        raise DataError(f"got a sound of {wave.dtype} {wave.shape}, expected int16 or floats (C, T)")
    channels = wave.shape[0]
    samples = np.ascontiguousarray(wave.T, "<i2").tobytes()
    layout = struct.pack("<HHIIHH", _PCM, channels, sample_rate_hz, 2 * channels * sample_rate_hz, 2 * channels, 16)
    head = b"WAVEfmt " + len(layout).to_bytes(4, "little") + layout + b"data" + len(samples).to_bytes(4, "little")
    return b"RIFF" + (len(head) + len(samples)).to_bytes(4, "little") + head + samples
