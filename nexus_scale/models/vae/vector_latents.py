"""What variational autoencoders of a vector of latents share: moments, the draw of the posterior, checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import Network
from nexus_scale.processes.latents import LOGVAR_RANGE


class VectorVAE(Network):
    """Images (B, image_channels, H, W) in [-1, 1] <-> latents (B, latent_size).

    A subclass has `encode(x)`, mean and log-variance on (B, 2 * latent_size), and `decode(z)`, `numbers` of each value of the image.
    """

    image_channels: int
    image_size: int
    latent_size: int
    numbers: int

    def encode(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def decode(self, z: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            x: images in [-1, 1], (B, image_channels, image_size, image_size).
            eps: standard normal, (B, latent_size); None decodes the mean.
        Returns:
            What `decode` says, (B, numbers * image_channels, image_size, image_size); mean and logvar of the posterior,
            (B, latent_size) each, logvar within [-30, 20].
        """
        mean, logvar = self.encode(x).chunk(2, dim=1)
        logvar = logvar.clamp(*LOGVAR_RANGE)
        z = mean if eps is None else torch.addcmul(mean, torch.exp(0.5 * logvar), eps.to(mean.dtype))
        return self.decode(z), mean, logvar

    def check_images(self, x: Tensor) -> None:
        """Raises a ValueError for images of other channels or sizes."""
        wanted = (self.image_channels, self.image_size, self.image_size)
        if x.shape[1:] != wanted:
            raise ValueError(
                f"images of {tuple(x.shape[1:])}: the network takes {wanted}; set networks.model.image_channels and image_size"
            )

    def check_latents(self, z: Tensor) -> None:
        """Raises a ValueError for latents of another size."""
        if z.shape[1:] != (self.latent_size,):
            raise ValueError(
                f"latents of {tuple(z.shape[1:])}: the network takes ({self.latent_size},); set latent_size"
            )

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        """Arguments of `forward` at the configured size, on any device, meta too; `text_tokens` has no meaning here."""
        x = torch.zeros(batch_size, self.image_channels, self.image_size, self.image_size, device=device)
        return x, torch.zeros(batch_size, self.latent_size, device=device)

    def extra_repr(self) -> str:
        image = f"{self.image_channels} x {self.image_size} x {self.image_size}"
        return f"images {image} <-> {self.latent_size} latents, {self.numbers} numbers of each value"
