"""Codec: waveforms to the codes of a few codebooks and back; 75 codes a second at EnCodec's 24 kHz.

Source: Défossez et al. 2022, "High fidelity neural audio compression" (EnCodec); Zeghidour et al. 2021 (SoundStream).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import nn

from nexus_scale.contracts import UserError
from nexus_scale.models.audio.seanet import LSTM, Decoder, Encoder, ResidualUnit, Sizes
from nexus_scale.models.audio.waveforms import WaveformCodec
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.weight_normed import Normed


class Codec(WaveformCodec):
    """(B, audio_channels, T) <-> codes (B, T', num_codebooks) of 0..codebook_size-1, T' = ceil(T / hop).

    Args:
        sample_rate_hz: of the waveforms; the network does not look at it, whoever reads its codes does.
        audio_channels: of the waveforms, with values in [-1, 1].
        segment_seconds: length that FLOPs are counted for.
        strides: of the encoder's stages from the full rate down; their product is the hop.
        base_channels: at the full rate; each stage doubles them.
        latent_channels: D, the size of an entry.
        kernel_size, last_kernel_size, residual_kernel_size: of first, last and residual convolutions.
        num_residual: residual units of a stage, dilated by dilation_base ** 0, 1, ...
        compress: how many times fewer channels there are inside a residual unit.
        lstm_layers: of encoder and decoder each.
        shortcut: what a residual unit's way around is.
        causal: no step sees a later one.
        pad_mode: what convolutions see beyond the ends.
        trim_right: part of what a causal transposed convolution adds that is cut off at the end.
        num_codebooks, codebook_size: K and V.
        codebook_decay, dead_below, kmeans_iterations: see `WaveformCodec`; EnCodec's dead_below of 2 is for 4,800 latents and
            1,024 entries.
    Raises:
        UserError: sizes that cannot be.
    """

    def __init__(
        self,
        *,
        sample_rate_hz: int = 24000,
        audio_channels: int = 1,
        segment_seconds: float = 1.0,
        strides: tuple[int, ...] = (2, 4, 5, 8),
        base_channels: int = 32,
        latent_channels: int = 128,
        kernel_size: int = 7,
        last_kernel_size: int = 7,
        residual_kernel_size: int = 3,
        num_residual: int = 1,
        dilation_base: int = 2,
        compress: int = 2,
        lstm_layers: int = 2,
        shortcut: Literal["conv", "identity"] = "conv",
        causal: bool = True,
        pad_mode: Literal["reflect", "constant", "replicate"] = "reflect",
        trim_right: float = 1.0,
        num_codebooks: int = 32,
        codebook_size: int = 1024,
        codebook_decay: float = 0.99,
        dead_below: float = 2.0,
        kmeans_iterations: int = 50,
    ):
        check_counts(
            "codec",
            {
                "sample_rate_hz": sample_rate_hz,
                "audio_channels": audio_channels,
                "strides": min(strides, default=0),
                "base_channels": base_channels,
                "latent_channels": latent_channels,
                "kernel_size": min(kernel_size, last_kernel_size, residual_kernel_size),
                "dilation_base": dilation_base,
                "compress": compress,
                "lstm_layers": lstm_layers,
            },
        )
        if base_channels < compress:
            raise UserError(
                f"codec.compress: {compress} leaves no channels of base_channels = {base_channels}; lower it"
            )
        if num_residual < 0:
            raise UserError(f"codec.num_residual: got {num_residual}; expected at least 0")
        if not 0 <= trim_right <= 1:
            raise UserError(f"codec.trim_right: got {trim_right}; expected a share in [0, 1]")
        if not causal and trim_right != 1:
            raise UserError(f"codec.trim_right: {trim_right} applies only to causal networks; leave it out")
        sizes = Sizes(
            audio_channels, base_channels, latent_channels, tuple(strides), kernel_size, last_kernel_size, residual_kernel_size,
            num_residual, dilation_base, compress, lstm_layers, shortcut, causal, pad_mode, trim_right,
        )  # fmt: skip
        super().__init__(
            name="codec",
            encoder=Encoder(sizes),
            decoder=Decoder(sizes),
            hop=math.prod(strides),
            sample_rate_hz=sample_rate_hz,
            audio_channels=audio_channels,
            segment_seconds=segment_seconds,
            latent_channels=latent_channels,
            num_codebooks=num_codebooks,
            codebook_size=codebook_size,
            codebook_decay=codebook_decay,
            dead_below=dead_below,
            kmeans_iterations=kmeans_iterations,
        )
        self.sizes = sizes

    def init_weights(self) -> None:
        """Convolutions and LSTMs as torch draws them. Books are zero until the first step has shown them latents."""
        for module in self.modules():
            if isinstance(module, Normed | LSTM):
                module.init_weights()

    def blocks(self) -> Sequence[nn.Module]:
        return [unit for unit in self.modules() if isinstance(unit, ResidualUnit)]
