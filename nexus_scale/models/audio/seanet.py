"""SEANet: waveforms to latents and back by strided convolutions, with an LSTM at the lowest rate.

Source: Tagliasacchi et al. 2020 (SEANet); Défossez et al. 2022 (EnCodec), section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.models.layers.tags import KeepsTags, tag_param
from nexus_scale.models.layers.weight_normed import Conv1d, ConvTranspose1d


@dataclass(frozen=True)
class Sizes:
    """The settings shared by encoder and decoder; `Codec` explains each."""

    audio_channels: int
    base_channels: int
    latent_channels: int
    strides: tuple[int, ...]
    kernel_size: int
    last_kernel_size: int
    residual_kernel_size: int
    num_residual: int
    dilation_base: int
    compress: int
    lstm_layers: int
    shortcut: Literal["conv", "identity"]
    causal: bool
    pad_mode: Literal["reflect", "constant", "replicate"]
    trim_right: float

    def conv(
        self, in_channels: int, out_channels: int, kernel_size: int, *, stride: int = 1, dilation: int = 1
    ) -> Conv1d:
        return Conv1d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            dilation=dilation,
            causal=self.causal,
            pad_mode=self.pad_mode,
        )


class ResidualUnit(nn.Module):
    """x + conv(elu(conv(elu(x)))) through fewer channels, the first convolution dilated."""

    def __init__(self, sizes: Sizes, channels: int, dilation: int):
        super().__init__()
        hidden = channels // sizes.compress
        self.conv1 = sizes.conv(channels, hidden, sizes.residual_kernel_size, dilation=dilation)
        self.conv2 = sizes.conv(hidden, channels, 1)
        self.shortcut = sizes.conv(channels, channels, 1) if sizes.shortcut == "conv" else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.elu(self.conv1(F.elu(x))))
        return y + (x if self.shortcut is None else self.shortcut(x))


class LSTM(KeepsTags, nn.LSTM):
    """x + lstm(x) along time, (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, num_layers: int):
        super().__init__(channels, channels, num_layers)
        for name, parameter in self.named_parameters():
            tag_param(parameter, decay=name.startswith("weight"))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        steps = x.permute(2, 0, 1)  # (T, B, C)
        y, _ = super().forward(steps)
        return (y + steps).permute(1, 2, 0)

    def reset_parameters(self) -> None:
        """Nothing: networks initialise themselves in `init_weights`, once."""

    def init_weights(self) -> None:
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)


class Down(nn.Module):
    """Residual units at one rate, then `stride` times fewer steps of twice the channels."""

    def __init__(self, sizes: Sizes, channels: int, stride: int):
        super().__init__()
        self.units = nn.ModuleList(
            ResidualUnit(sizes, channels, sizes.dilation_base**i) for i in range(sizes.num_residual)
        )
        self.resample = sizes.conv(channels, 2 * channels, 2 * stride, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return self.resample(F.elu(x))


class Up(nn.Module):
    """`stride` times more steps of half the channels, then residual units at that rate."""

    def __init__(self, sizes: Sizes, channels: int, stride: int):
        super().__init__()
        half = channels // 2
        self.resample = ConvTranspose1d(
            channels, half, 2 * stride, stride=stride, causal=sizes.causal, trim_right=sizes.trim_right
        )
        self.units = nn.ModuleList(ResidualUnit(sizes, half, sizes.dilation_base**i) for i in range(sizes.num_residual))

    def forward(self, x: Tensor) -> Tensor:
        x = self.resample(F.elu(x))
        for unit in self.units:
            x = unit(x)
        return x


class Encoder(nn.Module):
    """(B, audio_channels, T) -> (B, latent_channels, T'), T' = T / hop rounded up stride by stride."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        widths = [sizes.base_channels * 2**i for i in range(len(sizes.strides) + 1)]
        self.conv_in = sizes.conv(sizes.audio_channels, widths[0], sizes.kernel_size)
        self.stages = nn.ModuleList(
            Down(sizes, width, stride) for width, stride in zip(widths[:-1], sizes.strides, strict=True)
        )
        self.lstm = LSTM(widths[-1], sizes.lstm_layers)
        self.conv_out = sizes.conv(widths[-1], sizes.latent_channels, sizes.last_kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x.to(self.conv_in.bias.dtype))  # (B, base_channels, T)
        for stage in self.stages:
            h = stage(h)  # (B, 2 C, T / stride)
        return self.conv_out(F.elu(self.lstm(h)))  # (B, latent_channels, T')


class Decoder(nn.Module):
    """(B, latent_channels, T') -> (B, audio_channels, hop * T')."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        widths = [sizes.base_channels * 2**i for i in range(len(sizes.strides), -1, -1)]
        self.conv_in = sizes.conv(sizes.latent_channels, widths[0], sizes.kernel_size)
        self.lstm = LSTM(widths[0], sizes.lstm_layers)
        self.stages = nn.ModuleList(
            Up(sizes, width, stride) for width, stride in zip(widths[:-1], reversed(sizes.strides), strict=True)
        )
        self.conv_out = sizes.conv(widths[-1], sizes.audio_channels, sizes.last_kernel_size)

    def forward(self, z: Tensor) -> Tensor:
        h = self.lstm(self.conv_in(z.to(self.conv_in.bias.dtype)))  # (B, C, T')
        for stage in self.stages:
            h = stage(h)  # (B, C / 2, stride * T)
        return self.conv_out(F.elu(h))  # (B, audio_channels, hop * T')
