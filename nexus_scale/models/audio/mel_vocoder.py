"""Vocoder: log-mel spectra of sound, and sound from them. A codec whose codes are numbers and not entries of books.

The way there is a fixed spectrum in mel bands; the way back draws amplitudes and phases of frames that overlap: Vocos.

Source: Siuzdak 2023, "Vocos: Closing the gap between time-domain and Fourier-based neural vocoders", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from nexus_scale.contracts import Network, UserError
from nexus_scale.kernels.transfer import made_on
from nexus_scale.models.audio import convnext
from nexus_scale.models.audio.spectral_codec import FLOOR, Decoder, Frames, check_frames
from nexus_scale.models.audio.waveforms import Coded
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.processes.mels import mel_filters

LARGEST = 2**26
"""Entries of the bands' filters, which are computed before any are known to be of use."""


class MelVocoder(Network):
    """(B, 1, T) <-> normalised log-mels (B, T', num_mels) float32, T' = ceil(T / hop).

    With the same sizes its decoder is Vocos in outputs and gradients; see `spectral_codec`. It learns by objective `codec`, as a codec
    without books: on spectrograms alone (`time_weight: 0`), or against a discriminator as well.

    Args:
        sample_rate_hz: of the waveforms.
        segment_seconds: length that FLOPs are counted for.
        hop, window: samples between frames and in a frame.
        num_mels: bands from 0 Hz to half the rate.
        mel_mean, mel_std: of the natural logarithms of the bands' amplitudes, over all data; mels are given less the mean, divided by the
            deviation.
        hidden_channels, mlp_channels, depth: of the decoder's trunk and its blocks.
    Raises:
        UserError: sizes that cannot be; bands so narrow that no frequency lies in one.
    """

    serves_as = "codec"
    audio_channels = 1
    codes_dtype = "float32"
    codebook_size = 0
    quantizer = None

    def __init__(
        self,
        *,
        sample_rate_hz: int = 24000,
        segment_seconds: float = 1.0,
        hop: int = 256,
        window: int = 1024,
        num_mels: int = 100,
        mel_mean: Annotated[float, Field(ge=-100, le=100)] = 0.0,
        mel_std: float = 1.0,
        hidden_channels: int = 512,
        mlp_channels: int = 1536,
        depth: int = 8,
    ):
        super().__init__()
        counts = {
            "sample_rate_hz": sample_rate_hz, "hop": hop, "num_mels": num_mels, "hidden_channels": hidden_channels,
            "mlp_channels": mlp_channels, "depth": depth,
        }  # fmt: skip
        check_counts("mel_vocoder", counts)
        check_frames("mel_vocoder", window, hop)
        if num_mels * window > LARGEST:
            raise UserError(
                f"mel_vocoder.num_mels: got {num_mels} bands of a window of {window}; expected a product of at most {LARGEST}"
            )
        if not mel_std > 0:
            raise UserError(f"mel_vocoder.mel_std: got {mel_std}; expected a deviation above 0")
        with torch.device("cpu"):
            empty = int((mel_filters(sample_rate_hz, window, num_mels).sum(1) <= 0).sum())
        if empty:
            raise UserError(
                f"mel_vocoder.num_mels: no frequency of a window of {window} lies in {empty} of {num_mels} bands; take fewer, or a longer "
                "window"
            )
        self._hop, self.num_codebooks = hop, num_mels
        self.sample_rate_hz, self.segment_seconds = sample_rate_hz, segment_seconds
        self.mel_mean, self.mel_std = mel_mean, mel_std
        self.frames = Frames(window, hop)
        self.decoder = Decoder(self.frames, hidden_channels, mlp_channels, depth, num_mels)

    @property
    def hop(self) -> int:
        """Samples per frame. A class attribute, which tells codecs from other networks."""
        return self._hop

    @property
    def codes_follow_from(self) -> Mapping[str, Any]:
        """All that decides the mels: vocoders that agree in it decode one another's."""
        return {
            "kind": "log-mel", "sample_rate_hz": self.sample_rate_hz, "hop": self.hop, "window": self.frames.window,
            "num_mels": self.num_codebooks, "mel_mean": self.mel_mean, "mel_std": self.mel_std, "floor": FLOOR,
        }  # fmt: skip

    def forward(self, x: Tensor, num_books: int | None = None) -> Coded:
        """Waveforms in [-1, 1], (B, 1, T), to their mels and back; what they are coded by costs nothing."""
        mels = self.encode(x)  # (B, T', M)
        x_hat = self.decode(mels)[..., : x.shape[-1]]
        return Coded(x_hat, mels.transpose(1, 2), mels, x_hat.new_zeros(len(x)))

    def encode(self, x: Tensor, num_books: int | None = None) -> Tensor:
        """Waveforms (B, 1, T) -> normalised log-mels (B, ceil(T / hop), M) float32."""
        if x.ndim != 3 or x.shape[1] != 1 or not x.shape[2]:
            raise ValueError(f"waveforms of shape {tuple(x.shape)}; expected (B, 1, T)")
        spectrum = torch.view_as_real(self.frames.split(x[:, 0].float()))  # (B, bins, T', 2)
        filters = made_on(mel_filters, (self.sample_rate_hz, self.frames.window, self.num_codebooks), x.device)
        mels = filters @ (spectrum.square().sum(-1) + FLOOR**2).sqrt()  # (B, M, T')
        return ((mels.log() - self.mel_mean) / self.mel_std).transpose(1, 2)

    def decode(self, codes: Tensor) -> Tensor:
        """Normalised log-mels (B, T', M) -> waveforms (B, 1, hop * T'), unbounded: clamp to [-1, 1]."""
        if codes.ndim != 3 or codes.shape[2] != self.num_codebooks:
            raise ValueError(f"mels of shape {tuple(codes.shape)}; expected (B, T, {self.num_codebooks})")
        waves: Tensor = self.decoder(codes.transpose(1, 2))
        return waves

    def init_weights(self) -> None:
        """Vocos's."""
        convnext.init_weights(self)

    def blocks(self) -> Sequence[nn.Module]:
        return convnext.blocks_of(self)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor]:
        """Arguments of `forward` for a segment, on any device, meta too; `text_tokens` has no meaning here."""
        return (torch.zeros(batch_size, 1, round(self.segment_seconds * self.sample_rate_hz), device=device),)

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Frames of a segment."""
        return -(-round(self.segment_seconds * self.sample_rate_hz) // self.hop)

    def extra_repr(self) -> str:
        return f"{self.sample_rate_hz} Hz, hop {self.hop}, {self.num_codebooks} mels"
