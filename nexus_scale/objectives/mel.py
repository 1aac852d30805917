"""Mel spectrograms, for a perceptual distance between sounds."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from nexus_scale.kernels.padding import pad_ends
from nexus_scale.kernels.transfer import to_device
from nexus_scale.processes.mels import mel_filters

FLOOR = 1e-3
"""Magnitudes far below it are alike, here some 80 dB below a sine of full scale. Without it the logarithm's gradient at a bin that
holds nothing but rounding is as strong as any, and has the phase of the rounding: two orders of summation gave gradients that
differed by half."""


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
