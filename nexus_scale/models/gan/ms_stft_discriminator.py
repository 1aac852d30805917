"""Discriminators on complex spectrograms of several resolutions.

Source: Défossez et al. 2022 (EnCodec), section 3.4 and figure 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Network, UserError
from nexus_scale.models.layers.weight_normed import Conv2d, Normed

SLOPE = 0.2
KERNEL, LAST_KERNEL = (3, 9), (3, 3)
DILATIONS = (1, 2, 4)


class Judged(NamedTuple):
    """logits: (B, 1, T', F'), one per position of the spectrogram, larger for real; features: after each convolution."""

    logits: Tensor
    features: tuple[Tensor, ...]


class STFTDiscriminator(nn.Module):
    """One resolution: windows of `window` samples, a quarter of a window apart, real and imaginary parts as channels."""

    window_values: Tensor

    def __init__(self, audio_channels: int, base_channels: int, window: int):
        super().__init__()
        self.window = window
        hann = torch.hann_window(window)
        self.register_buffer("window_values", hann / hann.square().sum().sqrt(), persistent=False)
        channels = base_channels
        self.convs = nn.ModuleList([Conv2d(2 * audio_channels, channels, KERNEL)])
        for dilation in DILATIONS:
            self.convs.append(Conv2d(channels, channels, KERNEL, stride=(1, 2), dilation=(dilation, 1)))
        self.convs.append(Conv2d(channels, channels, LAST_KERNEL))
        self.conv_out = Conv2d(channels, 1, LAST_KERNEL)

    def forward(self, x: Tensor) -> Judged:
        batch, channels, _ = x.shape
        spectrogram = torch.stft(
            x.float().flatten(0, 1),
            self.window,
            hop_length=self.window // 4,
            window=self.window_values.float(),
            center=False,
            return_complex=True,
        )  # (B * C, F, T')
        parts = torch.view_as_real(spectrogram).unflatten(0, (batch, channels))  # (B, C, F, T', 2)
        h = parts.permute(0, 4, 1, 3, 2).flatten(1, 2).to(self.conv_out.bias.dtype)  # (B, 2 C, T', F)
        features = []
        for conv in self.convs:
            h = F.leaky_relu(conv(h), SLOPE)  # (B, base_channels, T', F')
            features.append(h)
        return Judged(self.conv_out(h), tuple(features))


class MSSTFTDiscriminator(Network):
    """One `STFTDiscriminator` for each of `windows`.

    Args:
        audio_channels: of the waveforms.
        base_channels: of all convolutions.
        windows: in samples; none may be longer than the waveforms.
        sample_rate_hz, segment_seconds: length that FLOPs are counted for.
    Raises:
        UserError: sizes that cannot be.
    """

    def __init__(
        self,
        *,
        audio_channels: int = 1,
        base_channels: int = 32,
        windows: tuple[int, ...] = (2048, 1024, 512, 256, 128),
        sample_rate_hz: int = 24000,
        segment_seconds: float = 1.0,
    ):
        super().__init__()
        if (
            min(audio_channels, base_channels) < 1
            or not windows
            or any(window < 16 or window % 4 for window in windows)
        ):
            raise UserError(
                f"ms_stft_discriminator: got audio_channels {audio_channels}, base_channels {base_channels}, windows {windows}; "
                "expected at least 1 of each, and windows that are multiples of 4 from 16"
            )
        self.audio_channels, self.windows = audio_channels, tuple(windows)
        self.num_samples = round(sample_rate_hz * segment_seconds)
        self.scales = nn.ModuleList(STFTDiscriminator(audio_channels, base_channels, window) for window in windows)

    def forward(self, x: Tensor) -> tuple[Judged, ...]:
        """x (B, audio_channels, T) -> the output of each scale.

        Raises:
            ValueError: waveforms shorter than a window.
        """
        if x.ndim != 3 or x.shape[1] != self.audio_channels or x.shape[2] < max(self.windows):
            raise ValueError(
                f"waveforms of shape {tuple(x.shape)}; expected (B, {self.audio_channels}, T) with T of at least {max(self.windows)}"
            )
        return tuple(scale(x) for scale in self.scales)

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, Normed):
                module.init_weights()

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.scales)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor]:
        """Arguments of `forward`, on any device, meta too; `text_tokens` has no meaning here."""
        return (torch.zeros(batch_size, self.audio_channels, self.num_samples, device=device),)

    def extra_repr(self) -> str:
        return f"windows={self.windows}"
