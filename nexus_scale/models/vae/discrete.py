"""Autoencoders of images whose latents are codes: the convolutions of VQ-VAE, for any quantiser.

Source: van den Oord et al. 2017, "Neural Discrete Representation Learning", section 4.1; the widths of the last stages and of the residual
branches are those of DeepMind's sonnet example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Network, UserError
from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.image_convs import DoublingConv, ImageConv
from nexus_scale.models.layers.linear import Conv2d


class Coded(NamedTuple):
    """x_hat: like x, (B, C, H, W); latents: before quantisation, (B, D, h * w); codes: (B, h * w, 1) int64; commitment: (B,)."""

    x_hat: Tensor
    latents: Tensor
    codes: Tensor
    commitment: Tensor


class ResidualBlock(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x)))), (B, D, H, W)."""

    def __init__(self, hidden_size: int, residual_size: int):
        super().__init__()
        self.conv1 = Conv2d(hidden_size, residual_size)
        self.conv2 = Conv2d(residual_size, hidden_size, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class DiscreteAutoencoder(Network):
    """Images (B, image_channels, H, W) in [-1, 1] <-> codes (B, h, w) of 0..quantizer.codebook_size - 1, h = H / 2^stages.

    Args:
        name: of the network, for errors.
        quantizer: `(B, D, T) -> (latents, codes (B, T, 1), commitment (B,))`, with `decode(codes)` and `follow`.
        latent_channels: D.
        hidden_size: channels; those of the outermost stage are half of it.
        residual_size: channels within a residual branch.
        depth: residual blocks of the encoder, and as many of the decoder.
        stages: how many times the image is halved.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        name: str,
        quantizer: nn.Module,
        image_channels: int,
        image_size: int,
        latent_channels: int,
        hidden_size: int,
        residual_size: int,
        depth: int,
        stages: int,
    ):
        super().__init__()
        counts = {"image_channels": image_channels, "image_size": image_size, "latent_channels": latent_channels}
        counts |= {"hidden_size": hidden_size, "residual_size": residual_size, "depth": depth, "stages": stages}
        check_counts(name, counts, {"depth": 0, "hidden_size": 2})
        if stages > 30 or image_size % 2**stages:
            raise UserError(f"{name}.image_size: got {image_size}; {stages} stages need a multiple of 2^{stages}")
        self.image_channels, self.image_size, self.latent_channels = image_channels, image_size, latent_channels
        self.hidden_size, self.residual_size, self.depth, self.stages = hidden_size, residual_size, depth, stages
        widths = (hidden_size // 2, *[hidden_size] * (stages - 1))
        self.down = nn.ModuleList(
            ImageConv(a, b, 4, stride=2, padding=1) for a, b in zip((image_channels, *widths), widths, strict=False)
        )
        self.enc_in = Conv2d(widths[-1], hidden_size)
        self.enc_blocks = nn.ModuleList(ResidualBlock(hidden_size, residual_size) for _ in range(depth))
        self.to_latents = Conv2d(hidden_size, latent_channels, kernel_size=1)
        self.quantizer = quantizer
        self.dec_in = Conv2d(latent_channels, hidden_size)
        self.dec_blocks = nn.ModuleList(ResidualBlock(hidden_size, residual_size) for _ in range(depth))
        out = (*[hidden_size] * (stages - 1), hidden_size // 2)[1:]
        self.up = nn.ModuleList(
            DoublingConv(a, b, 4) for a, b in zip((hidden_size, *out), (*out, image_channels), strict=True)
        )

    @property
    def codebook_size(self) -> int:
        """How many codes there are."""
        return int(self.quantizer.codebook_size)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Coded:
        """
        Args:
            x: images in [-1, 1], (B, image_channels, H, W).
        Raises:
            ValueError: other channels, or sizes that the stages do not halve.
        """
        latents = self._latents(x)  # (B, D, h * w)
        quantised, codes, commitment = self.quantizer(latents)
        return Coded(self._images(quantised, *self._side(x)), latents, codes, commitment)

    def encode(self, x: Tensor) -> Tensor:
        """Images (B, image_channels, H, W) -> codes (B, h, w) int64."""
        return self.quantizer(self._latents(x)).codes.view(len(x), *self._side(x))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) -> images (B, image_channels, H, W), unbounded: clamp to [-1, 1] for pixels."""
        latents: Tensor = self.quantizer.decode(codes.flatten(1).unsqueeze(-1))  # type: ignore[operator]
        return self._images(latents, *codes.shape[1:])

    def _side(self, x: Tensor) -> tuple[int, int]:
        return x.shape[2] >> self.stages, x.shape[3] >> self.stages

    def _latents(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.image_channels or any(side % 2**self.stages for side in x.shape[2:]):
            raise ValueError(
                f"images of {tuple(x.shape[1:])}: the autoencoder takes {self.image_channels} channels and multiples of "
                f"{2**self.stages} pixels"
            )
        h = x.to(self.enc_in.weight.dtype)
        for conv in self.down:
            h = F.relu(conv(h))
        h = self.enc_in(h)
        for block in self.enc_blocks:
            h = block(h)
        return self.to_latents(F.relu(h)).flatten(2)

    def _images(self, latents: Tensor, height: int, width: int) -> Tensor:
        h = self.dec_in(latents.to(self.dec_in.weight.dtype).unflatten(2, (height, width)))
        for block in self.dec_blocks:
            h = block(h)
        for conv in self.up:
            h = conv(F.relu(h))
        return h

    def init_weights(self) -> None:
        """torch's defaults."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                init.uniform_(module)

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.enc_blocks, *self.dec_blocks]

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        """Arguments of `forward` at the configured size, on any device, meta too; `text_tokens` has no meaning here."""
        return (torch.zeros(batch_size, self.image_channels, self.image_size, self.image_size, device=device),)

    def extra_repr(self) -> str:
        side = self.image_size >> self.stages
        return f"images {self.image_channels} x {self.image_size} x {self.image_size} <-> {side} x {side} codes"
