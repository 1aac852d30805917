"""Tensors as pictures: pixels of eight bits, strips of frames, spectrograms."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from nexus_scale.objectives.mel import FLOOR, mel_spectrogram

STRIP = 8
"""Frames of a clip that are shown side by side, at most."""
SPECTROGRAM_WINDOW_SECONDS = 0.064
DARKEST_DB = -70.0


def filmstrip(videos: Tensor) -> Tensor:
    """Frames of clips side by side, evenly from the first to the last: (B, 3, F, H, W) -> (B, 3, H, n * W), n at most STRIP."""
    frames = videos.shape[2]
    chosen = torch.linspace(0, frames - 1, min(frames, STRIP)).round().long()
    return torch.cat(videos[:, :, chosen.to(videos.device)].unbind(2), dim=3)


def to_uint8(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [-1, 1] -> (B, H, W, 3) uint8; clips (B, 3, F, H, W) become strips of frames."""
    if images.ndim == 5:
        images = filmstrip(images)
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def in_eight_bits(pixels: Tensor) -> Tensor:
    """Values in [-1, 1] that eight bits hold, float32: what a file shows is what is scored."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def spectrogram(wave: Tensor, sample_rate_hz: int, num_mels: int = 64) -> np.ndarray:
    """The mel spectrogram of a waveform (T,), (M, T', 3) uint8: low tones below, white where 70 dB below the loudest."""
    window = 4 * max(4, round(SPECTROGRAM_WINDOW_SECONDS * sample_rate_hz / 4))
    if len(wave) <= window // 2:  # the transform mirrors half a window at the ends
        wave = torch.nn.functional.pad(wave, (0, window // 2 + 1 - len(wave)))
    mels = mel_spectrogram(wave[None, None], sample_rate_hz, window, num_mels)[0, 0]  # (M, T')
    decibels = 20 * (mels.clamp(min=FLOOR) / mels.max().clamp(min=FLOOR)).log10()
    grey = 255 * (decibels / DARKEST_DB).clamp(0, 1)
    return grey.round().to(torch.uint8).flip(0)[..., None].expand(-1, -1, 3).contiguous().numpy()
