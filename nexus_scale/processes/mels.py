"""Mel bands: the triangles by which spectra are summed into what an ear tells apart."""

from __future__ import annotations

import torch
from torch import Tensor


def mel_filters(sample_rate_hz: int, window: int, num_mels: int) -> Tensor:
    """Triangles of equal width in mel (O'Shaughnessy 1987) from 0 Hz to half the rate, (num_mels, window // 2 + 1).

    Where windows are short some triangles fall between two frequencies and are empty.
    """

    def to_mel(hz: Tensor) -> Tensor:
        return 2595 * torch.log10(1 + hz / 700)

    frequencies = torch.linspace(0, sample_rate_hz / 2, window // 2 + 1, dtype=torch.float64)
    mels = torch.linspace(0, float(to_mel(frequencies[-1])), num_mels + 2, dtype=torch.float64)
    corners = 700 * (10 ** (mels / 2595) - 1)  # (num_mels + 2,) Hz
    low, middle, high = (corners[i : i + num_mels, None] for i in range(3))
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return torch.minimum(rising, falling).clamp(min=0).float()
