"""Mel spectrograms, for a perceptual distance between sounds."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from nexus_scale.kernels.padding import pad_ends
from nexus_scale.kernels.transfer import to_device

FLOOR = 1e-3
"""Magnitudes far below it are alike, here some 80 dB below a sine of full scale. Without it the logarithm's gradient at a bin that
holds nothing but rounding is as strong as any, and has the phase of the rounding: two orders of summation gave gradients that
differed by half."""


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


@lru_cache(maxsize=32)
def _tables(sample_rate_hz: int, window: int, num_mels: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Filters that are not empty, and a Hann window of unit energy."""
    filters = mel_filters(sample_rate_hz, window, num_mels)
    hann = torch.hann_window(window)
    return to_device(filters[filters.sum(1) > 0], device), to_device(hann / hann.square().sum().sqrt(), device)


def mel_spectrogram(x: Tensor, sample_rate_hz: int, window: int, num_mels: int = 64) -> Tensor:
    """Magnitudes of waveforms x (B, C, T), (B, C, M, T'), windows of unit energy a quarter of a window apart.

    M is at most `num_mels`: empty filters are left out.
    """
    filters, hann = _tables(sample_rate_hz, window, num_mels, x.device)
    centred = pad_ends(x, window // 2, window // 2, "reflect").flatten(0, 1)
    spectrogram = torch.stft(
        centred, window, hop_length=window // 4, window=hann, center=False, return_complex=True
    )  # (B * C, F, T')
    power = torch.view_as_real(spectrogram).square().sum(-1)
    magnitude = (power + FLOOR**2).sqrt()
    return (filters @ magnitude).unflatten(0, x.shape[:2])


def mel_distance(x: Tensor, y: Tensor, sample_rate_hz: int, windows: tuple[int, ...], num_mels: int = 64) -> Tensor:
    """EnCodec's reconstruction loss in the frequency domain: mean absolute difference of mel spectrograms, and mean squared
    difference of their decimal logarithms, mean over windows, (B,).

    Source: Défossez et al. 2022, section 3.4 (equation for l_f).
    """
    total = torch.zeros(len(x), device=x.device)
    for window in windows:
        one, other = (mel_spectrogram(wave.float(), sample_rate_hz, window, num_mels) for wave in (x, y))
        total = total + (one - other).abs().flatten(1).mean(1)
        total = total + (one.log10() - other.log10()).square().flatten(1).mean(1)
    return total / len(windows)
