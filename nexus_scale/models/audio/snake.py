"""Periodic activations without aliasing: up to twice the rate, the activation there, and down again.

Source: Ziyin et al. 2020, "Neural Networks Fail to Learn Periodic Functions" (Snake); Lee et al. 2023, "BigVGAN", section 3.2 (a
factor of its own for the size of the waves, and the filters, which are StyleGAN3's).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.kernels.padding import pad_ends
from nexus_scale.models.layers.tags import KeepsTags, tag_param
from nexus_scale.models.layers.weight_normed import Conv1d

TAPS = 12
EPS = 1e-9


def low_pass() -> Tensor:
    """A sinc that halves the band, in a Kaiser window, (TAPS,) float32 that add up to 1."""
    attenuation = 2.285 * (TAPS // 2 - 1) * math.pi * (4 * 0.3) + 7.95  # dB, of a transition of 0.3 of the rate
    beta = 0.1102 * (attenuation - 8.7)
    window = torch.kaiser_window(TAPS, beta=beta, periodic=False)
    time = torch.arange(-TAPS // 2, TAPS // 2) + 0.5
    taps = 0.5 * window * torch.sinc(0.5 * time)
    return taps / taps.sum()


class SmoothSnake(KeepsTags, nn.Module):
    """x + sin(e^a x)^2 / e^b with a and b of each channel, at twice the rate between low-pass filters: (B, C, T) -> (B, C, T)."""

    taps: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.frequency = tag_param(nn.Parameter(torch.empty(channels)), decay=False)
        self.size = tag_param(nn.Parameter(torch.empty(channels)), decay=False)
        self.register_buffer("taps", low_pass(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        taps = self.taps.to(x.dtype).expand(x.shape[1], 1, -1)  # each channel by itself
        y = F.conv_transpose1d(pad_ends(x, 5, 5, "replicate"), 2 * taps, stride=2, groups=x.shape[1])
        y = self._snake(y[..., 15:-15])  # (B, C, 2 T)
        return F.conv1d(pad_ends(y, 5, 6, "replicate"), taps, stride=2, groups=x.shape[1])

    def _snake(self, x: Tensor) -> Tensor:
        frequency, size = self.frequency.exp()[:, None], self.size.exp()[:, None]
        return x + (x * frequency).sin().square() / (size + EPS)

    def init_weights(self) -> None:
        nn.init.zeros_(self.frequency)
        nn.init.zeros_(self.size)


class SnakeUnit(nn.Module):
    """x + conv(snake(conv(snake(x)))), the first convolution dilated and of seven steps: (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.snake1, self.snake2 = SmoothSnake(channels), SmoothSnake(channels)
        self.conv1 = Conv1d(channels, channels, 7, dilation=dilation, causal=False, pad_mode="constant")
        self.conv2 = Conv1d(channels, channels, 1, causal=False, pad_mode="constant")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.snake2(self.conv1(self.snake1(x))))
