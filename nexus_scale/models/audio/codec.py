"""Codec: waveforms as a few books' codes, 75 a second at EnCodec's 24 kHz, and back.

Source: Défossez et al. 2022, "High fidelity neural audio compression" (EnCodec); Zeghidour et al. 2021 (SoundStream).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from nexus_scale.contracts import UserError
from nexus_scale.models.audio.quantization import ResidualQuantizer
from nexus_scale.models.audio.seanet import LSTM, Decoder, Encoder, Sizes, residual_units
from nexus_scale.models.layers.weight_normed import Normed


class Coded(NamedTuple):
    """x_hat: like x, (B, C, T); latents: before quantisation, (B, D, T'); codes: (B, T', K') int64; commitment: (B,)."""

    x_hat: Tensor
    latents: Tensor
    codes: Tensor
    commitment: Tensor


class Codec(nn.Module):
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
        codebook_decay, dead_below, kmeans_iterations: how the books learn, see `ResidualQuantizer`; `dead_below` is in latents of a
            global batch, EnCodec's 2 being for 4,800 latents and 1,024 entries.
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
        super().__init__()
        for name, value in (
            ("sample_rate_hz", sample_rate_hz),
            ("audio_channels", audio_channels),
            ("strides", min(strides, default=0)),
            ("base_channels", base_channels),
            ("latent_channels", latent_channels),
            ("kernel_size", min(kernel_size, last_kernel_size, residual_kernel_size)),
            ("dilation_base", dilation_base),
            ("compress", compress),
            ("lstm_layers", lstm_layers),
            ("num_codebooks", num_codebooks),
        ):
            if value < 1:
                raise UserError(f"codec.{name}: got {value}; it must be at least 1")
        if base_channels < compress:
            raise UserError(
                f"codec.compress: {compress} leaves no channel of base_channels = {base_channels}; lower it"
            )
        if num_residual < 0 or codebook_size < 2 or kmeans_iterations < 0 or dead_below < 0:
            raise UserError(
                f"codec: got num_residual {num_residual}, codebook_size {codebook_size}, kmeans_iterations {kmeans_iterations}, "
                f"dead_below {dead_below}; expected at least 0, 2, 0 and 0"
            )
        for name, share, whole in (("codebook_decay", codebook_decay, False), ("trim_right", trim_right, True)):
            if not 0 <= share <= 1 or (share == 1 and not whole):
                raise UserError(f"codec.{name}: got {share}; expected a share in [0, 1{']' if whole else ')'}")
        if not causal and trim_right != 1:
            raise UserError(f"codec.trim_right: {trim_right} has a meaning for causal networks alone; leave it out")
        self.sample_rate_hz, self.audio_channels, self.segment_seconds = sample_rate_hz, audio_channels, segment_seconds
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.sizes = Sizes(
            audio_channels, base_channels, latent_channels, tuple(strides), kernel_size, last_kernel_size, residual_kernel_size,
            num_residual, dilation_base, compress, lstm_layers, shortcut, causal, pad_mode, trim_right,
        )  # fmt: skip
        self.encoder = Encoder(self.sizes)
        self.quantizer = ResidualQuantizer(
            num_codebooks=num_codebooks,
            codebook_size=codebook_size,
            dim=latent_channels,
            decay=codebook_decay,
            dead_below=dead_below,
            kmeans_iterations=kmeans_iterations,
        )
        self.decoder = Decoder(self.sizes)

    @property
    def hop(self) -> int:
        """Samples that a code stands for."""
        return math.prod(self.sizes.strides)

    def forward(self, x: Tensor, num_books: int | None = None) -> Coded:
        """
        Args:
            x: waveforms in [-1, 1], (B, audio_channels, T).
            num_books: how many books code; None: all.
        Raises:
            ValueError: another number of channels, or no such number of books.
        """
        latents = self._latents(x, num_books)  # (B, D, T')
        quantised, codes, commitment = self.quantizer(latents, num_books)  # (B, D, T'), (B, T', K'), (B,)
        x_hat = self.decoder(quantised)[..., : x.shape[-1]]  # (B, C, T)
        return Coded(x_hat, latents, codes, commitment)

    def encode(self, x: Tensor, num_books: int | None = None) -> Tensor:
        """Waveforms (B, audio_channels, T) -> codes (B, ceil(T / hop), K') int64, of all books unless told otherwise."""
        return self.quantizer.encode(self._latents(x, num_books), num_books)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, T', K') of the first K' books -> waveforms (B, audio_channels, hop * T'), unbounded: clamp to [-1, 1].

        Raises:
            ValueError: more books than there are, or a code beyond the books.
        """
        if codes.ndim != 3 or not 1 <= codes.shape[2] <= self.num_codebooks:
            raise ValueError(
                f"codes of shape {tuple(codes.shape)}; expected (B, T, K) with K of 1..{self.num_codebooks}"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(f"codes in {int(codes.min())}..{int(codes.max())}; expected 0..{self.codebook_size - 1}")
        latents = self.quantizer.decode(codes)  # (B, D, T')
        return self.decoder(latents.to(self.decoder.conv_in.bias.dtype))

    def _latents(self, x: Tensor, num_books: int | None) -> Tensor:
        if x.ndim != 3 or x.shape[1] != self.audio_channels or not x.shape[2]:
            raise ValueError(f"waveforms of shape {tuple(x.shape)}; expected (B, {self.audio_channels}, T)")
        if num_books is not None and not 1 <= num_books <= self.num_codebooks:
            raise ValueError(f"num_books {num_books}; expected 1 to {self.num_codebooks}")
        return self.encoder(x.to(self.encoder.conv_in.bias.dtype))

    def init_weights(self) -> None:
        """Convolutions and LSTMs as torch draws them. Books are zero until the first step has shown them latents."""
        for module in self.modules():
            if isinstance(module, Normed | LSTM):
                module.init_weights()

    def blocks(self) -> Sequence[nn.Module]:
        return residual_units((self.encoder, self.decoder))

    def example_inputs(self, batch_size: int, text_tokens: int, device: torch.device | str) -> tuple[Tensor]:
        """Arguments of `forward` for a segment, on any device, meta too; `text_tokens` has no meaning here."""
        samples = round(self.segment_seconds * self.sample_rate_hz)
        return (torch.zeros(batch_size, self.audio_channels, samples, device=device),)

    def tokens(self, text_tokens: int) -> int:
        """Codes of a segment, all books counted."""
        return -(-round(self.segment_seconds * self.sample_rate_hz) // self.hop) * self.num_codebooks

    def extra_repr(self) -> str:
        return f"{self.sample_rate_hz} Hz, hop {self.hop}, {self.num_codebooks} books of {self.codebook_size}"
