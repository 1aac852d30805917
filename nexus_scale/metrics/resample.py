"""Resampling of sounds by a windowed sinc, as a bank of filters.

Source: Smith 2002, "Digital audio resampling home page": band-limited interpolation.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ZEROS = 24
"""Zero crossings of the sinc on each side."""
ROLLOFF = 0.945
"""Share of the smaller Nyquist frequency at which the filter passes half."""


def resample(wave: Tensor, from_hz: int, to_hz: int) -> Tensor:
    """A wave (..., T) as (..., ceil(T * to_hz / from_hz)); unchanged if the rates are equal.

    Raises:
        ValueError: a rate below 1, or no samples.
    """
    if from_hz < 1 or to_hz < 1 or not wave.shape[-1]:
        raise ValueError(
            f"got {tuple(wave.shape)} from {from_hz} to {to_hz} Hz, expected samples and rates of at least 1 Hz"
        )
    if from_hz == to_hz:
        return wave
    common = math.gcd(from_hz, to_hz)
    old, new = from_hz // common, to_hz // common
    cutoff = ROLLOFF * min(old, new)  # in units of half the common rate
    width = math.ceil(ZEROS * old / cutoff)
    # Filter n gives the samples at times n / new + k, for all k, from the input at times (i - width) / old + k.
    inputs = torch.arange(-width, width + old, dtype=torch.float64) / old  # (taps,)
    times = (inputs[None] - torch.arange(new, dtype=torch.float64)[:, None] / new) * cutoff  # (new, taps)
    window = torch.cos(times.clamp(-ZEROS, ZEROS) * math.pi / ZEROS / 2) ** 2
    kernel = torch.sinc(times) * window * cutoff / old  # (new, taps)
    length = math.ceil(wave.shape[-1] * new / old)
    flat = F.pad(wave.reshape(-1, 1, wave.shape[-1]).double(), (width, width + old))
    out = F.conv1d(flat, kernel[:, None], stride=old)  # (B, new, frames)
    out = out.transpose(1, 2).reshape(flat.shape[0], -1)[:, :length]
    return out.reshape(*wave.shape[:-1], length).to(wave.dtype)
