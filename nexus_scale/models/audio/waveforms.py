"""The common part of codecs: waveforms to the codes of a few codebooks and back, for any encoder and decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nexus_scale.contracts import Network
from nexus_scale.models.audio.quantization import ResidualQuantizer, check_following
from nexus_scale.models.layers.counts import check_counts


class Coded(NamedTuple):
    """x_hat: like x, (B, C, T); latents: before quantisation, (B, D, T'); codes: (B, T', K') int64; commitment: (B,)."""

    x_hat: Tensor
    latents: Tensor
    codes: Tensor
    commitment: Tensor


class SoundCodec(Network):
    """What all codecs have: the sound that they code, and how many codes of it. See `WaveformCodec` for the arguments."""

    serves_as = "codec"

    def __init__(
        self,
        *,
        hop: int,
        sample_rate_hz: int,
        audio_channels: int,
        segment_seconds: float,
        num_codebooks: int,
        codebook_size: int,
    ):
        super().__init__()
        self._hop, self.sample_rate_hz, self.audio_channels = hop, sample_rate_hz, audio_channels
        self.segment_seconds, self.num_codebooks, self.codebook_size = segment_seconds, num_codebooks, codebook_size

    @property
    def hop(self) -> int:
        """Samples per code. A class attribute, which tells codecs from other networks."""
        return self._hop

    def check_waves(self, x: Tensor) -> None:
        """Raises a ValueError for what is no waveform of its channels."""
        if x.ndim != 3 or x.shape[1] != self.audio_channels or not x.shape[2]:
            raise ValueError(f"waveforms of shape {tuple(x.shape)}; expected (B, {self.audio_channels}, T)")

    def check_codes(self, codes: Tensor) -> None:
        """Raises a ValueError for codes of more books than there are, or beyond the books."""
        if codes.ndim != 3 or not 1 <= codes.shape[2] <= self.num_codebooks:
            raise ValueError(
                f"codes of shape {tuple(codes.shape)}; expected (B, T, K) with K of 1..{self.num_codebooks}"
            )
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.codebook_size:
            raise ValueError(f"codes in {int(codes.min())}..{int(codes.max())}; expected 0..{self.codebook_size - 1}")

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor]:
        """Arguments of `forward` for a segment, on any device, meta too; `text_tokens` has no meaning here."""
        samples = round(self.segment_seconds * self.sample_rate_hz)
        return (torch.zeros(batch_size, self.audio_channels, samples, device=device),)

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Codes of a segment, over all books."""
        return -(-round(self.segment_seconds * self.sample_rate_hz) // self.hop) * self.num_codebooks

    def extra_repr(self) -> str:
        return f"{self.sample_rate_hz} Hz, hop {self.hop}, {self.num_codebooks} books of {self.codebook_size}"


class WaveformCodec(SoundCodec):
    """(B, audio_channels, T) <-> codes (B, T', num_codebooks) of 0..codebook_size-1, T' = ceil(T / hop).

    Args:
        encoder: (B, audio_channels, T) -> (B, latent_channels, T'), for any T.
        decoder: (B, latent_channels, T') -> (B, audio_channels, hop * T'), unbounded.
        hop: samples that a code stands for.
        sample_rate_hz: of the waveforms; the network does not look at it, whoever reads its codes does.
        segment_seconds: length that FLOPs are counted for.
        num_codebooks, codebook_size: K and V.
        codebook_decay, dead_below, kmeans_iterations: how the books learn, see `ResidualQuantizer`; `dead_below` is in latents of a
            global batch.
    Raises:
        UserError: sizes that cannot be.
    """

    def __init__(
        self,
        *,
        name: str,
        encoder: nn.Module,
        decoder: nn.Module,
        hop: int,
        sample_rate_hz: int,
        audio_channels: int,
        segment_seconds: float,
        latent_channels: int,
        num_codebooks: int,
        codebook_size: int,
        codebook_decay: float,
        dead_below: float,
        kmeans_iterations: int,
    ):
        super().__init__(
            hop=hop,
            sample_rate_hz=sample_rate_hz,
            audio_channels=audio_channels,
            segment_seconds=segment_seconds,
            num_codebooks=num_codebooks,
            codebook_size=codebook_size,
        )
        check_counts(name, {"num_codebooks": num_codebooks})
        check_following(name, codebook_size, codebook_decay, dead_below, kmeans_iterations)
        self.encoder = encoder
        self.quantizer = ResidualQuantizer(
            num_codebooks=num_codebooks,
            codebook_size=codebook_size,
            dim=latent_channels,
            decay=codebook_decay,
            dead_below=dead_below,
            kmeans_iterations=kmeans_iterations,
        )
        self.decoder = decoder

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
        """Waveforms (B, audio_channels, T) -> codes (B, ceil(T / hop), K') int64, of all books by default."""
        return self.quantizer.encode(self._latents(x, num_books), num_books)

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, T', K') of the first K' books -> waveforms (B, audio_channels, hop * T'), unbounded: clamp to [-1, 1].

        Raises:
            ValueError: more books than there are, or a code beyond the books.
        """
        self.check_codes(codes)
        latents = self.quantizer.decode(codes)  # (B, D, T')
        waves: Tensor = self.decoder(latents)
        return waves

    def _latents(self, x: Tensor, num_books: int | None) -> Tensor:
        self.check_waves(x)
        if num_books is not None and not 1 <= num_books <= self.num_codebooks:
            raise ValueError(f"num_books {num_books}; expected 1 to {self.num_codebooks}")
        latents: Tensor = self.encoder(x)
        return latents
