"""Pictures and clips as the latents of an autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nexus_scale.contracts import CondField, Conditioner
from nexus_scale.data.manifest import DataError
from nexus_scale.processes.pixels import to_unit_range

MOMENTS = "moments"
MIRRORED = f"{MOMENTS}_mirrored"


class ImageConditioner(Conditioner):
    """Images (3, H, W) or clips (3, F, H, W), uint8 -> `moments` (2C, ...), mean and log-variance of the posterior.

    Args:
        vae: `interop.autoencoders.Autoencoder`.
        clips: whether the values are clips.
        mirror: also `moments_mirrored`, of each flipped left to right.
    """

    reads = "image"

    def __init__(self, vae: Any, clips: bool = False, mirror: bool = False):
        self.vae, self.fingerprint = vae, str(vae.fingerprint)
        axes = 3 if clips else 2
        made = CondField((2 * vae.latent_channels, *[None] * axes), "float16")
        self.fields = dict.fromkeys((MOMENTS, MIRRORED) if mirror else (MOMENTS,), made)

    def encode(self, values: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        """The moments of each; those of one size are encoded together.

        Raises:
            UserError, ValueError: a size that the autoencoder does not take.
            DataError: moments that are not finite in half precision.
        """
        sizes: dict[tuple[int, ...], list[int]] = {}
        for place, image in enumerate(values):
            sizes.setdefault(tuple(image.shape), []).append(place)
        rows: dict[int, dict[str, np.ndarray]] = {}
        for places in sizes.values():
            images = [values[place] for place in places]
            made = {MOMENTS: self._moments(images)}
            if MIRRORED in self.fields:
                made[MIRRORED] = self._moments([image.flip(-1) for image in images])
            rows |= {place: {name: each[n] for name, each in made.items()} for n, place in enumerate(places)}
        return [rows[place] for place in range(len(values))]

    def _moments(self, images: Sequence[Tensor]) -> np.ndarray:
        pixels = torch.stack(list(images))  # (B, 3, H, W), clips (B, 3, F, H, W), uint8
        moments = self.vae.encode(to_unit_range(pixels, pixels.dtype, "image")).to(torch.float16)  # (B, 2C, ...)
        if not bool(torch.isfinite(moments).all()):
            raise DataError("got moments that are not finite in half precision; check the autoencoder")
        half: np.ndarray = moments.cpu().numpy()
        return half
