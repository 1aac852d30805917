"""FACodec's attributes between a spectrogram and an inverse Fourier transform: a factorised codec that two CPU cores train.

Encoder and decoder are those of `spectral_codec`, which run at the codes' rate; FACodec's own spend most of their work at the waveform's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from nexus_scale.contracts import UserError
from nexus_scale.models.audio import convnext
from nexus_scale.models.audio.convnext import ConvNeXtBlock
from nexus_scale.models.audio.factorised import Attributes, FactorisedCodec
from nexus_scale.models.audio.snake import SnakeUnit
from nexus_scale.models.audio.spectral_codec import Decoder, Encoder, Frames
from nexus_scale.models.layers.counts import check_counts


class SpectralFACodec(FactorisedCodec):
    """(B, 1, T) <-> codes (B, T', K) and timbre (B, D): see `FactorisedCodec`.

    Args:
        sample_rate_hz, segment_seconds: see `FactorisedCodec`.
        hop, window, hidden_channels, mlp_channels, encoder_depth, decoder_depth: see `SpectralCodec`.
        others: see `Attributes`.
    Raises:
        UserError: sizes that cannot be.
    """

    def __init__(
        self,
        *,
        sample_rate_hz: int = 16000,
        segment_seconds: float = 1.0,
        hop: int = 200,
        window: int = 800,
        hidden_channels: int = 256,
        mlp_channels: int = 768,
        encoder_depth: int = 4,
        decoder_depth: int = 6,
        latent_channels: int = 64,
        prosody_books: int = 1,
        content_books: int = 2,
        detail_books: int = 3,
        codebook_size: int = 256,
        codebook_dim: int = 8,
        timbre_depth: int = 2,
        timbre_heads: int = 4,
        timbre_mlp_channels: int = 256,
        dropout: float = 0.0,
        num_phones: int = 172,
        num_speakers: int = 4,
        reversed_from: tuple[str, ...] = ("timbre", "prosody_phones", "content_f0", "detail_f0", "detail_phones"),
        speaker_head: bool = True,
        codebook_decay: float | None = None,
        dead_below: float = 2.0,
        kmeans_iterations: int = 50,
    ):
        attributes = Attributes(
            latent_channels, prosody_books, content_books, detail_books, codebook_size, codebook_dim, timbre_depth, timbre_heads,
            timbre_mlp_channels, dropout, num_phones, num_speakers, tuple(reversed_from), speaker_head, codebook_decay, dead_below,
            kmeans_iterations,
        )  # fmt: skip
        attributes.check("spectral_facodec")
        counts = {"hop": hop, "hidden_channels": hidden_channels, "mlp_channels": mlp_channels}
        check_counts("spectral_facodec", counts | {"encoder_depth": encoder_depth, "decoder_depth": decoder_depth})
        if window < 2 * hop or (window - hop) % 2 or window % 2:
            raise UserError(
                f"spectral_facodec.window: got {window} with hop {hop}; expected an even number of at least {2 * hop}, and the hop even"
            )
        frames = Frames(window, hop)
        super().__init__(
            name="spectral_facodec",
            encoder=Encoder(frames, hidden_channels, mlp_channels, encoder_depth, latent_channels),
            decoder=Decoder(frames, hidden_channels, mlp_channels, decoder_depth, latent_channels),
            attributes=attributes,
            hop=hop,
            sample_rate_hz=sample_rate_hz,
            segment_seconds=segment_seconds,
        )

    def init_weights(self) -> None:
        """Of the attributes as `FactorisedCodec`'s, of encoder and decoder Vocos's."""
        super().init_weights()
        for coder in (self.encoder, self.decoder):
            convnext.init_weights(coder)

    def blocks(self) -> Sequence[nn.Module]:
        return [block for block in self.modules() if isinstance(block, ConvNeXtBlock | SnakeUnit)]
