"""Sound: waveforms, or codes that a codec decodes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from nexus_scale.media.files import encode_audio
from nexus_scale.media.pictures import spectrogram


class Codec(Protocol):
    """What decodes codes (B, T', K) to waveforms (B, 1, hop * T')."""

    sample_rate_hz: int
    hop: int
    num_codebooks: int

    def decode(self, codes: Tensor) -> Tensor: ...


def cut(codes: Tensor, real: Tensor) -> Tensor:
    """Codes (B, T', K) marked as ended where they are not `real` (B, T')."""
    return torch.where(real[..., None], codes, float("nan") if codes.is_floating_point() else -1)


def ended(codes: Tensor) -> Tensor:
    """Where codes (..., K) are marked as ended, (...) bool."""
    return codes[..., 0].isnan() if codes.is_floating_point() else codes[..., 0] < 0


class Audio:
    """See `Medium`.

    Args:
        sample_rate_hz: of the waveforms.
        codec: decodes codes (B, T', K), after each one's end -1, or NaN where they are no whole numbers (`ended`); twice as many books as
            it has are those of two channels, in turn. None: model space is waveforms (B, C, T).
    """

    name = "audio"
    formats: Sequence[str] = ("wav", "flac")
    shard_formats: Sequence[str] = ("wav", "flac")

    def __init__(self, sample_rate_hz: int, codec: Codec | None = None):
        self.sample_rate_hz, self.codec = sample_rate_hz, codec
        self.rate_hz: float | None = float(sample_rate_hz)

    @torch.no_grad()
    def decode(
        self, samples: Tensor, lengths: Sequence[int] | None = None, before: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        count = len(samples)
        given = [None] * count if before is None else before
        if self.codec is None:
            waves = [one if lengths is None else one[:, : lengths[row]] for row, one in enumerate(samples)]
        else:
            waves = [
                self.wave(one[~ended(one)] if lengths is None else one[: lengths[row]], first)
                for row, (one, first) in enumerate(zip(samples, given, strict=True))
            ]
        return [wave.float().clamp(-1, 1) for wave in waves]

    def wave(self, codes: Tensor, before: Tensor | None = None, timbre: Tensor | None = None) -> Tensor:
        """The waveform (1, T), or (2, T) of two channels, of codes (T', K), decoded after those `before` it, as they follow one another;
        `timbre` (D,), of a codec whose codes do not say who speaks."""
        assert self.codec is not None, "no codec decodes waveforms"
        first = 0 if before is None else len(before)
        whole = codes if before is None else torch.cat([before[:, : codes.shape[1]].to(codes), codes])
        channels = 2 if codes.shape[1] == 2 * self.codec.num_codebooks else 1
        told = () if timbre is None else (timbre[None],)
        decoded = torch.cat([self.codec.decode(whole[None, :, i::channels], *told)[0] for i in range(channels)])
        return decoded[:, first * self.codec.hop :]

    def picture(self, shown: Tensor) -> np.ndarray:
        return spectrogram(shown.detach().float().cpu().mean(0), self.sample_rate_hz)

    def file(self, shown: Tensor, format: str | None = None) -> bytes:
        return encode_audio(shown.detach().float().cpu().numpy(), self.sample_rate_hz, format or self.formats[0])
