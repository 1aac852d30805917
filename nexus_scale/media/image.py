"""Images: pixels, or latents that an autoencoder decodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from nexus_scale.media.files import encode_image
from nexus_scale.media.pictures import in_eight_bits, to_uint8
from nexus_scale.processes.latents import LatentStats, denormalise

Decoder = Callable[[Tensor], Tensor]
"""Latents as an autoencoder gives them, (B, C, ...) -> pixels (B, 3, ...), on the autoencoder's device."""

AT_ONCE = 32
"""Samples that are decoded together, at most; autoencoders take fewer at once where they are large."""


class Image:
    """See `Medium`.

    Args:
        decoder: of latents; None: model space is pixels in [-1, 1].
        stats: how the latents are normalised.
    """

    name = "image"
    formats: Sequence[str] = ("png", "webp")
    shard_formats: Sequence[str] = ("png", "webp")
    rate_hz: float | None = None

    def __init__(self, decoder: Decoder | None = None, stats: LatentStats | None = None):
        self.decoder, self.stats = decoder, stats

    @torch.no_grad()
    def decode(
        self, samples: Tensor, lengths: Sequence[int] | None = None, before: Sequence[Tensor | None] | None = None
    ) -> list[Tensor]:
        return [one for part in samples.split(AT_ONCE) for one in in_eight_bits(self.pixels(part))]

    def pixels(self, samples: Tensor) -> Tensor:
        """Model space (B, C, h, w) to pixels (B, 3, H, W), unbounded, on the decoder's device."""
        raw = denormalise(samples, self.stats)
        return raw if self.decoder is None else self.decoder(raw)

    def picture(self, shown: Tensor) -> np.ndarray:
        picture: np.ndarray = to_uint8(shown[None])[0].cpu().numpy()
        return picture

    def file(self, shown: Tensor, format: str | None = None) -> bytes:
        return encode_image(self.picture(shown), format or self.formats[0])
