"""Sound as the pitch class that is loudest in each step: the melody that music is to follow.

Source: Copet et al. 2023 (MusicGen), section 2.3; the bank of filters is Ellis 2007, "Chroma Feature Analysis and Synthesis", as
librosa and transformers have it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nexus_scale.contracts import CondField, Conditioner

CHROMA = "chroma"
CLASSES = 12
WINDOW, HOP = 16384, 4096
"""Samples of a spectrum, and between two; MusicGen's at 32 kHz."""
CENTRE, WIDTH = 5.0, 2.0
"""Octaves above 27.5 / 2 Hz that count most, and the deviation around them."""


@cache
def chroma_filters(sample_rate_hz: int) -> torch.Tensor:
    """How much each frequency of a spectrum is of each pitch class, C first: (12, WINDOW / 2 + 1) float32."""
    octaves = np.log2(np.linspace(0, sample_rate_hz, WINDOW, endpoint=False)[1:] / (440.0 / 16))
    places = CLASSES * octaves
    places = np.concatenate(([places[0] - 1.5 * CLASSES], places))  # (WINDOW,), in semitones
    widths = np.concatenate((np.maximum(np.diff(places), 1.0), [1.0]))
    away = np.remainder(places - np.arange(CLASSES)[:, None] + CLASSES / 2 + 10 * CLASSES, CLASSES) - CLASSES / 2
    bumps = np.exp(-0.5 * (2 * away / widths) ** 2)
    bumps = bumps / np.sqrt((bumps**2).sum(0)) * np.exp(-0.5 * ((places / CLASSES - CENTRE) / WIDTH) ** 2)
    return torch.from_numpy(np.roll(bumps, -3, axis=0)[:, : WINDOW // 2 + 1].copy()).float()


class ChromaConditioner(Conditioner):
    """Waves (C, T) -> `chroma` (T', 12), 1 at each step's loudest pitch class, C first; T' = 1 + T / 4096. Silence is C.

    Args:
        sample_rate_hz: of the waves.
    """

    reads = "audio"

    def __init__(self, sample_rate_hz: int):
        self.sample_rate_hz = sample_rate_hz
        self.fields = {CHROMA: CondField((None, CLASSES), "float16")}
        self.fingerprint = f"chroma {CLASSES} of {WINDOW} by {HOP} at {sample_rate_hz} Hz"

    def encode(self, values: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        return [{CHROMA: self._loudest(torch.as_tensor(wave)).numpy().astype(np.float16)} for wave in values]

    def _loudest(self, wave: torch.Tensor) -> torch.Tensor:
        mono = wave.float().mean(0)
        if (short := WINDOW - len(mono)) > 0:
            mono = F.pad(mono, (short // 2, short - short // 2))
        spectrum = torch.stft(
            mono, WINDOW, HOP, window=torch.hann_window(WINDOW), center=True, pad_mode="reflect", return_complex=True
        )
        power = spectrum.abs().square()  # (WINDOW / 2 + 1, T')
        loud = chroma_filters(self.sample_rate_hz) @ power  # (12, T')
        return F.one_hot(loud.argmax(0), CLASSES).float()
