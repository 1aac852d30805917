"""How loud a sound is to a listener: integrated loudness of ITU-R BS.1770-4, in LUFS.

Two filters (the head, and low tones that are heard less), the mean square of blocks of 0.4 s, and two gates that leave pauses out. The
filters' coefficients are those of the recommendation for 48 kHz, made again for other rates from the analogue filters behind them.

Source: ITU-R BS.1770-4, annex 1; EBU R 128. Frequencies and quality of the analogue filters: as libebur128 derives them.
"""

from __future__ import annotations

import math

import numpy as np

BLOCK_S, STEP_S = 0.4, 0.1
ABSOLUTE_GATE_LUFS, RELATIVE_GATE_LU = -70.0, 10.0
OFFSET_DB = -0.691
_TAIL_S = 0.5
"""Silence behind a sound into which the filters ring: their slowest pole, of 38 Hz, is down by 200 dB then."""

SHELF_HZ, SHELF_DB, SHELF_Q = 1681.974450955533, 3.999843853973347, 0.7071752369554196
PASS_HZ, PASS_Q = 38.13547087602444, 0.5003270373238773


def loudness_lufs(wave: np.ndarray, sample_rate_hz: int) -> float:
    """Integrated loudness of a sound (C, T) with one or two channels; minus infinity of silence. A sound below 0.4 s is one block."""
    wave = np.asarray(wave, np.float64)
    length = wave.shape[-1]
    if not length:
        return -math.inf
    block = min(round(BLOCK_S * sample_rate_hz), length)
    step = max(1, round(STEP_S * sample_rate_hz))
    energy = np.concatenate([[0.0], np.square(_weighted(wave, sample_rate_hz)).sum(0).cumsum()])
    begins = np.arange(0, length - block + 1, step)
    power = np.maximum(energy[begins + block] - energy[begins], 0.0) / block
    power = power[power > _power_of(ABSOLUTE_GATE_LUFS)]
    if not len(power):
        return -math.inf
    power = power[power > power.mean() * 10 ** (-RELATIVE_GATE_LU / 10)]
    return OFFSET_DB + 10 * math.log10(power.mean())


def _power_of(lufs: float) -> float:
    return float(10 ** ((lufs - OFFSET_DB) / 10))


def _weighted(wave: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    """The sound behind both filters, by their response to each frequency."""
    size = wave.shape[-1] + round(_TAIL_S * sample_rate_hz)
    z = np.exp(-2j * np.pi * np.fft.rfftfreq(size))
    response = np.ones_like(z)
    for above, below in (_shelf(sample_rate_hz), _high_pass(sample_rate_hz)):
        response *= np.polyval(above[::-1], z) / np.polyval(below[::-1], z)
    return np.asarray(np.fft.irfft(np.fft.rfft(wave, size) * response, size)[..., : wave.shape[-1]])


def _shelf(rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Numerator and denominator, in rising powers of 1/z."""
    k, high = math.tan(math.pi * SHELF_HZ / rate), 10 ** (SHELF_DB / 20)
    middle = high**0.4996667741545416
    above = np.array([high + middle * k / SHELF_Q + k * k, 2 * (k * k - high), high - middle * k / SHELF_Q + k * k])
    return above / (1 + k / SHELF_Q + k * k), _poles(k, SHELF_Q)


def _high_pass(rate: int) -> tuple[np.ndarray, np.ndarray]:
    k = math.tan(math.pi * PASS_HZ / rate)
    return np.array([1.0, -2.0, 1.0]), _poles(k, PASS_Q)


def _poles(k: float, q: float) -> np.ndarray:
    scale = 1 + k / q + k * k
    return np.array([1.0, 2 * (k * k - 1) / scale, (1 - k / q + k * k) / scale])
