"""The pitch of a voice: Praat's autocorrelation, by the package praat-parselmouth.

This is the one door to parselmouth, which is GPL-3 and optional (`nexus-scale[speech]`).

Source: Boersma 1993, "Accurate short-term analysis of the fundamental frequency".
"""

from __future__ import annotations

import importlib.util

import numpy as np

from nexus_scale.contracts import UserError

LOWEST_HZ, HIGHEST_HZ = 60.0, 500.0
INSTALL = "the pitch of voices needs praat-parselmouth; pip install 'nexus-scale[speech]'"


def check_pitch() -> None:
    """Raises a UserError where the package is missing."""
    if importlib.util.find_spec("parselmouth") is None:
        raise UserError(INSTALL, code=4)


def pitch_of(wave: np.ndarray, sample_rate_hz: int, hop: int) -> np.ndarray:
    """Pitch in Hz in the middle of each hop of a wave (T,), (ceil(T / hop),) float64; 0 where there is none.

    Raises:
        UserError: the package is missing.
    """
    check_pitch()
    import parselmouth

    steps = -(-len(wave) // hop)
    least = round(3.1 * sample_rate_hz / LOWEST_HZ)  # Praat looks at three periods of the lowest pitch
    sound = parselmouth.Sound(np.pad(wave.astype(np.float64), (0, max(0, least - len(wave)))), sample_rate_hz)
    found = sound.to_pitch(hop / sample_rate_hz, LOWEST_HZ, HIGHEST_HZ)
    values = np.array([found.get_value_at_time((k + 0.5) * hop / sample_rate_hz) for k in range(steps)])
    return np.nan_to_num(values)


def relative_pitch(hz: np.ndarray) -> np.ndarray:
    """The logarithm of pitch less its mean where there is one, and whether there is, (T,) -> (T, 2): how something is said, not by whom."""
    voiced = hz > 0
    logarithms = np.log(np.where(voiced, hz, 1.0))
    mean = logarithms[voiced].mean() if voiced.any() else 0.0
    return np.stack([np.where(voiced, logarithms - mean, 0.0), voiced.astype(np.float64)], axis=-1)
