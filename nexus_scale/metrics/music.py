"""What music is heard to be by rules alone, nothing of which was learnt: its key and its tempo.

Sources: Krumhansl and Kessler 1982, probe-tone profiles, and Krumhansl 1990: the key is that whose profile correlates best;
Ellis 2007, "Beat Tracking by Dynamic Programming", section 3: the tempo is the strongest period of the onsets, near 120 beats a minute
rather than far from it. Gouyon et al. 2006, "An experimental comparison of audio tempo induction algorithms": what counts as right.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

NOTES = ("C", "D flat", "D", "E flat", "E", "F", "F sharp", "G", "A flat", "A", "B flat", "B")
PROFILES = {
    "major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
"""How well each pitch class fits a key, its tonic first."""
WINDOW_S, HOP_S = 0.25, 0.125
"""Of spectra that tell semitones apart."""
LOWEST_HZ, HIGHEST_HZ = 55.0, 2000.0
ONSET_WINDOW_S, ONSET_HOP_S = 0.032, 0.008
SLOWEST, FASTEST, USUAL, OCTAVES = 40.0, 240.0, 120.0, 1.0
"""Beats a minute, and the deviation around the usual ones, in octaves."""
NEAR, FACTORS = 0.04, (1 / 3, 1 / 2, 1, 2, 3)
"""A tempo is right within 4 % of the true one, or of two or three times it or its parts: their second accuracy."""


def key_of(wave: Tensor, sample_rate_hz: int) -> str | None:
    """`E flat minor`: the key whose profile correlates best with how loud the pitch classes of a wave (T,) are; None for silence."""
    power = _spectra(wave, sample_rate_hz, WINDOW_S, HOP_S).square()
    hertz = torch.linspace(0.0, sample_rate_hz / 2, len(power), dtype=torch.float64)
    kept = (hertz >= LOWEST_HZ) & (hertz <= HIGHEST_HZ)
    classes = (12 * torch.log2(hertz[kept] / 440.0) + 9).round().long() % 12  # C first
    loud = torch.zeros(12, power.shape[1], dtype=power.dtype).index_add(0, classes, power[kept])  # (12, frames)
    loud = (loud / loud.sum(0).clamp(min=1e-12)).sum(1)
    if not bool(loud.any()):
        return None
    found = {
        f"{NOTES[tonic]} {mode}": _correlation(loud, torch.tensor(profile, dtype=loud.dtype).roll(tonic))
        for mode, profile in PROFILES.items()
        for tonic in range(12)
    }
    return max(found, key=lambda key: found[key])


def tempo_of(wave: Tensor, sample_rate_hz: int) -> float | None:
    """Beats a minute of a wave (T,); None where nothing begins in it."""
    spectra = torch.log1p(100 * _spectra(wave, sample_rate_hz, ONSET_WINDOW_S, ONSET_HOP_S))
    onsets = spectra.diff(dim=1).clamp(min=0).sum(0)  # (frames,)
    onsets = onsets - onsets.mean()
    if len(onsets) < 2 or not bool(onsets.any()):
        return None
    again = torch.fft.irfft(torch.fft.rfft(onsets, 2 * len(onsets)).abs().square())[: len(onsets)]
    lags = torch.arange(1, len(onsets), dtype=torch.float64)
    beats = 60.0 / (lags * ONSET_HOP_S)
    kept = (beats >= SLOWEST) & (beats <= FASTEST)
    if not bool(kept.any()):
        return None
    usual = torch.exp(-0.5 * (torch.log2(beats / USUAL) / OCTAVES).square())
    weighed = torch.where(kept, again[1:] * usual, -math.inf)
    best = int(weighed.argmax()) + 1
    return 60.0 / ((best + _between(again, best)) * ONSET_HOP_S)


def same_tempo(found: float | None, wanted: float) -> bool:
    """Whether a tempo is the wanted one, or a simple multiple or part of it, within 4 %."""
    return found is not None and any(abs(found / (wanted * factor) - 1) <= NEAR for factor in FACTORS)


def _spectra(wave: Tensor, sample_rate_hz: int, window_s: float, hop_s: float) -> Tensor:
    """Magnitudes (frequencies, frames), float64."""
    size = round(window_s * sample_rate_hz)
    wave = wave.double()
    if len(wave) < size:
        wave = torch.nn.functional.pad(wave, (0, size - len(wave)))
    window = torch.hann_window(size, dtype=torch.float64)
    hop = round(hop_s * sample_rate_hz)
    return torch.stft(wave, size, hop, window=window, center=False, return_complex=True).abs()


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1].nan_to_num())


def _between(values: Tensor, at: int) -> float:
    """Where the peak of a parabola through three values lies, from the middle one, in [-0.5, 0.5]."""
    if not 0 < at < len(values) - 1:
        return 0.0
    left, middle, right = values[at - 1 : at + 2].tolist()
    bend = left - 2 * middle + right
    return 0.0 if bend >= 0 else max(-0.5, min(0.5, 0.5 * (left - right) / bend))
