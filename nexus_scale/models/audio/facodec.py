"""FACodec: speech as codes of prosody, content and detail, and one vector of the speaker's timbre.

Source: Ju et al. 2024, "NaturalSpeech 3: Zero-Shot Speech Synthesis with Factorized Codec and Diffusion Models", section 3; sizes and
what is computed are those of the released model (Amphion, models/codec/ns3_codec).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

from nexus_scale.models.audio.factorised import Attributes, FactorisedCodec
from nexus_scale.models.audio.snake import SmoothSnake, SnakeUnit
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.weight_normed import Conv1d, ConvTranspose1d

DILATIONS = (1, 3, 9)


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> Conv1d:
    """A convolution that sees both sides, zeros beyond the ends."""
    return Conv1d(in_channels, out_channels, kernel_size, stride=stride, causal=False, pad_mode="constant")


class FACodec(FactorisedCodec):
    """(B, 1, T) <-> codes (B, T', K) and timbre (B, D): see `FactorisedCodec`. The defaults are the released model's: 102.3 M
    parameters, of which 73.5 M tell speakers, phones and pitch for training alone.

    Args:
        sample_rate_hz, segment_seconds: see `FactorisedCodec`.
        strides: of the encoder's stages from the full rate down; their product is the hop.
        base_channels: at the full rate; each stage doubles them.
        decoder_channels: at the codes' rate; each stage halves them.
        latent_channels: D, of latents and of the timbre.
        prosody_books, content_books, detail_books, codebook_size, codebook_dim, timbre_depth, timbre_heads, timbre_mlp_channels, dropout,
            num_phones, num_speakers, reversed_from, speaker_head: see `Attributes`.
    Raises:
        UserError: sizes that cannot be.
    """

    def __init__(
        self,
        *,
        sample_rate_hz: int = 16000,
        segment_seconds: float = 1.0,
        strides: tuple[int, ...] = (2, 4, 5, 5),
        base_channels: int = 32,
        decoder_channels: int = 1024,
        latent_channels: int = 256,
        prosody_books: int = 1,
        content_books: int = 2,
        detail_books: int = 3,
        codebook_size: int = 1024,
        codebook_dim: int = 8,
        timbre_depth: int = 4,
        timbre_heads: int = 4,
        timbre_mlp_channels: int = 1024,
        dropout: float = 0.1,
        num_phones: int = 5003,
        num_speakers: int = 245200,
        reversed_from: tuple[str, ...] = ("timbre", "detail_f0", "detail_phones"),
        speaker_head: bool = False,
    ):
        least = {"decoder_channels": 2 ** len(strides)}
        counts = {
            "strides": min(strides, default=0),
            "base_channels": base_channels,
            "decoder_channels": decoder_channels,
        }
        check_counts("facodec", counts, least)
        attributes = Attributes(
            latent_channels, prosody_books, content_books, detail_books, codebook_size, codebook_dim, timbre_depth, timbre_heads,
            timbre_mlp_channels, dropout, num_phones, num_speakers, tuple(reversed_from), speaker_head,
        )  # fmt: skip
        super().__init__(
            name="facodec",
            encoder=Encoder(tuple(strides), base_channels, latent_channels),
            decoder=Decoder(tuple(strides), decoder_channels, latent_channels),
            attributes=attributes,
            hop=math.prod(strides),
            sample_rate_hz=sample_rate_hz,
            segment_seconds=segment_seconds,
        )
        self.strides = tuple(strides)

    def blocks(self) -> Sequence[nn.Module]:
        return [unit for unit in self.modules() if isinstance(unit, SnakeUnit)]


class Down(nn.Module):
    """Units at one rate, then `stride` times fewer steps of twice the channels."""

    def __init__(self, channels: int, stride: int):
        super().__init__()
        self.units = nn.ModuleList(SnakeUnit(channels, dilation) for dilation in DILATIONS)
        self.snake = SmoothSnake(channels)
        self.resample = conv(channels, 2 * channels, 2 * stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = unit(x)
        return self.resample(self.snake(x))


class Up(nn.Module):
    """`stride` times more steps of half the channels, then units at that rate."""

    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.snake = SmoothSnake(channels)
        self.resample = ConvTranspose1d(channels, out_channels, 2 * stride, stride=stride, causal=False)
        self.units = nn.ModuleList(SnakeUnit(out_channels, dilation) for dilation in DILATIONS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.resample(self.snake(x))
        for unit in self.units:
            x = unit(x)
        return x


class Encoder(nn.Module):
    """(B, 1, T) -> (B, latent_channels, T / hop), T a multiple of the hop."""

    def __init__(self, strides: tuple[int, ...], base_channels: int, latent_channels: int):
        super().__init__()
        widths = [base_channels * 2**i for i in range(len(strides) + 1)]
        self.conv_in = conv(1, widths[0], 7)
        self.stages = nn.ModuleList(Down(width, stride) for width, stride in zip(widths[:-1], strides, strict=True))
        self.snake = SmoothSnake(widths[-1])
        self.conv_out = conv(widths[-1], latent_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x.to(self.conv_in.bias.dtype))
        for stage in self.stages:
            h = stage(h)  # (B, 2 C, T / stride)
        return self.conv_out(self.snake(h))


class Decoder(nn.Module):
    """(B, latent_channels, T') -> (B, 1, hop * T') in [-1, 1]."""

    def __init__(self, strides: tuple[int, ...], channels: int, latent_channels: int):
        super().__init__()
        widths = [channels // 2**i for i in range(len(strides) + 1)]
        self.conv_in = conv(latent_channels, channels, 7)
        self.stages = nn.ModuleList(
            Up(before, after, stride)
            for before, after, stride in zip(widths[:-1], widths[1:], reversed(strides), strict=True)
        )
        self.snake = SmoothSnake(widths[-1])
        self.conv_out = conv(widths[-1], 1, 7)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z.to(self.conv_in.bias.dtype))
        for stage in self.stages:
            h = stage(h)  # (B, C / 2, stride * T)
        return self.conv_out(self.snake(h)).tanh()
