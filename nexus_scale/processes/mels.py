"""Mel bands: the triangles by which spectra are summed into what an ear tells apart."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BREAK_HZ, BREAK_MEL, STEP = 1000.0, 15.0, math.log(6.4) / 27
"""Slaney's scale: linear up to 1 kHz, which is 15 mel, and logarithmic above."""


def mel_filters(sample_rate_hz: int, window: int, num_mels: int) -> Tensor:
    """Triangles of equal width in mel (O'Shaughnessy 1987) from 0 Hz to half the rate, (num_mels, window // 2 + 1).

    Where windows are short some triangles fall between two frequencies and are empty.
    """
    top = 2595 * math.log10(1 + sample_rate_hz / 2 / 700)
    mels = torch.linspace(0, top, num_mels + 2, dtype=torch.float64)
    return _triangles(700 * (10 ** (mels / 2595) - 1), sample_rate_hz, window).float()


def slaney_filters(sample_rate_hz: int, window: int, num_mels: int) -> Tensor:
    """Triangles of unit area and equal width in Slaney's mel, (num_mels, window // 2 + 1) float64: librosa's default.

    Source: Slaney 1998, Auditory Toolbox.
    """
    top = BREAK_MEL + math.log(sample_rate_hz / 2 / BREAK_HZ) / STEP
    mels = torch.linspace(0, top, num_mels + 2, dtype=torch.float64)
    above = BREAK_HZ * torch.exp(STEP * (mels - BREAK_MEL))
    corners = torch.where(mels < BREAK_MEL, mels * BREAK_HZ / BREAK_MEL, above)
    return _triangles(corners, sample_rate_hz, window) * (2.0 / (corners[2:] - corners[:-2]))[:, None]


def _triangles(corners: Tensor, sample_rate_hz: int, window: int) -> Tensor:
    """Triangles between corners (M + 2,) in Hz, of height 1, at the frequencies of a spectrum: (M, window // 2 + 1)."""
    frequencies = torch.linspace(0, sample_rate_hz / 2, window // 2 + 1, dtype=torch.float64)
    low, middle, high = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0)
