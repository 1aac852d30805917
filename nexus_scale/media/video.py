"""Clips: frames of pixels, or latents that an autoencoder of clips decodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nexus_scale.media.files import encode_video
from nexus_scale.media.image import AT_ONCE, Decoder
from nexus_scale.media.pictures import in_eight_bits, to_uint8
from nexus_scale.processes.latents import LatentStats, denormalise

UNKNOWN_RATE_HZ = 8.0
"""At which clips are shown whose data do not say how fast they are: folders of older versions."""


class Video:
    """See `Medium`.

    Args:
        decoder: of latents; None: model space is pixels in [-1, 1].
        stats: how the latents are normalised.
        rate_hz: frames a second, from the data's manifest; None where it does not say.
    """

    name = "video"
    formats: Sequence[str] = ("webp", "mp4")
    shard_formats: Sequence[str] = ("npy", "mp4")

    def __init__(self, decoder: Decoder | None = None, stats: LatentStats | None = None, rate_hz: float | None = None):
        self.decoder, self.stats, self.rate_hz = decoder, stats, rate_hz

    @torch.no_grad()
    def decode(
        self, samples: Tensor, lengths: Sequence[int] | None = None, before: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        if lengths is None:
            return [one for part in samples.split(AT_ONCE) for one in in_eight_bits(self.pixels(part))]
        clips = zip(samples, lengths, strict=True)
        return [in_eight_bits(self.pixels(one[None, :, :frames]))[0] for one, frames in clips]

    def pixels(self, samples: Tensor) -> Tensor:
        """Model space (B, C, f, h, w) to pixels (B, 3, F, H, W), unbounded, on the decoder's device."""
        raw = denormalise(samples, self.stats)
        return raw if self.decoder is None else self.decoder(raw)

    def frames(self, shown: Tensor) -> np.ndarray:
        """A decoded clip (3, F, H, W) as frames (F, H, W, 3) uint8."""
        frames: np.ndarray = to_uint8(shown.transpose(0, 1)).cpu().numpy()
        return frames

    def picture(self, shown: Tensor) -> np.ndarray:
        picture: np.ndarray = to_uint8(shown[None])[0].cpu().numpy()
        return picture

    def file(self, shown: Tensor, format: str | None = None) -> bytes:
        return encode_video(self.frames(shown), self.rate_hz or UNKNOWN_RATE_HZ, format or self.formats[0])
