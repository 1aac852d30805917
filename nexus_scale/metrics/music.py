"""What music is heard to be by rules: its key and its tempo by what is known of music, its instrument by the recordings nearest to it.

Sources: Krumhansl and Kessler 1982, probe-tone profiles, and Krumhansl 1990: the key is that whose profile correlates best;
Ellis 2007, "Beat Tracking by Dynamic Programming", section 3: the tempo is the strongest period of the onsets, near 120 beats a minute
rather than far from it. Gouyon et al. 2006, "An experimental comparison of audio tempo induction algorithms": what counts as right.
Tzanetakis and Cook 2002, "Musical Genre Classification of Audio Signals", section III: a texture is the mean and the deviation of its
spectra; Fisher 1936: groups are told apart by their means, in units of how their members differ.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nexus_scale.processes.mels import mel_filters

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

BANDS, TIMBRE_WINDOW_S, TIMBRE_HOP_S, QUIET = 32, 0.064, 0.016, 1e-4
SHRUNK = 0.05
"""Added to the squared deviations of members, whose mean is at most 1: bands beside one another hardly differ alone."""


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


def timbre_of(wave: Tensor, sample_rate_hz: int) -> Tensor:
    """How loud the mel bands of a wave (T,) are against one another in the mean, and how much each changes, in nats: (64,) float64."""
    spectra = _spectra(wave, sample_rate_hz, TIMBRE_WINDOW_S, TIMBRE_HOP_S)
    filters = mel_filters(sample_rate_hz, 2 * (len(spectra) - 1), BANDS).double()
    bands = (filters @ spectra + QUIET).log()  # (32, frames)
    mean = bands.mean(1)
    return torch.cat([mean - mean.mean(), bands.std(1, correction=0)])


class Timbres:
    """Names what plays by the recordings whose timbres are nearest to a wave's: groups' means, in units of how members of a group differ.

    Args:
        names: of each recording, what plays in it.
        waves: the recordings (T,) with their rates.
    """

    def __init__(self, names: Sequence[str], waves: Sequence[tuple[Tensor, int]]):
        self.names = sorted(set(names))
        timbres = torch.stack([timbre_of(*wave) for wave in waves])  # (N, D)
        own = torch.tensor([self.names.index(name) for name in names])
        self.scale = timbres.std(0, correction=0).clamp(min=QUIET)
        self.means = torch.stack([timbres[own == number].mean(0) for number in range(len(self.names))]) / self.scale
        away = timbres / self.scale - self.means[own]
        self.nearness = torch.linalg.inv(away.T @ away / len(away) + SHRUNK * torch.eye(away.shape[1]))

    def __call__(self, wave: Tensor, sample_rate_hz: int) -> str:
        """What plays in a wave (T,)."""
        away = timbre_of(wave, sample_rate_hz) / self.scale - self.means  # (instruments, D)
        return self.names[int(((away @ self.nearness) * away).sum(1).argmin())]


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
