"""The evidence lower bound of a Gaussian autoencoder: reconstruction and KL, both per image value.

Source: Kingma & Welling 2014; free bits: Kingma et al. 2016; KL warm-up: Bowman et al. 2016.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from nexus_scale.contracts import (
    Batch,
    Cond,
    Draws,
    Generated,
    Latent,
    Loss,
    Nets,
    Objective,
    Phase,
    Request,
    Rng,
    UserError,
)
from nexus_scale.processes.latents import LOGVAR_RANGE
from nexus_scale.processes.pixels import mirrored, pixels_of


def _per_sample(x: Tensor) -> Tensor:
    """Mean over everything but the batch, (B,)."""
    return x.flatten(1).mean(1)


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(Normal(mean, exp(logvar)) || Normal(0, 1)) in nats, elementwise."""
    logvar = logvar.clamp(*LOGVAR_RANGE)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar)


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [-1, 1] (peak 2), elementwise over the mean squared error."""
    return 10 * torch.log10(4 / mse.clamp_min(1e-10))


class ELBO(Objective):
    """One phase, one network `model`: `model(x, eps) -> (x_hat, mean, logvar)`, on images or on videos; draws: `posterior`,
    `mirror`.

    loss = (1 - l1_weight) * mse + l1_weight * mae + kl_weight * kl, where mse and mae are means over the image values
    C*H*W, and kl is the sum over latents in nats divided by C*H*W. With l1_weight 0 that is, up to a constant factor, the
    negative bound of a decoder of standard deviation s for kl_weight = 2 s^2.
    """

    def __init__(
        self,
        *,
        latent_shape: tuple[int, ...],
        kl_weight: float = 1e-3,
        l1_weight: float = 0.0,
        free_bits: float = 0.0,
        kl_warmup_steps: int = 0,
        mirror: bool = False,
        input: Literal["image", "video"] = "image",
    ):
        """
        Args:
            latent_shape: (C, h, w) of the network's latents, for the posterior's draw; (C, f, h, w) of a video's.
            kl_weight: per image value, see above.
            l1_weight: share of the mean absolute error in the reconstruction, in [0, 1].
            free_bits: nats per latent that cost nothing, taken as the mean over each channel of each sample.
            mirror: flip each training image left to right with probability 1/2.
            input: the field that is coded: images (B, C, H, W) or videos (B, C, F, H, W), in [-1, 1], or integers in 0..255.
            kl_warmup_steps: steps over which kl_weight grows linearly from 0.
        """
        for name, value in (("kl_weight", kl_weight), ("free_bits", free_bits), ("kl_warmup_steps", kl_warmup_steps)):
            if value < 0:
                raise UserError(f"objective.{name}: got {value}; expected 0 or more")
        if not 0 <= l1_weight <= 1:
            raise UserError(f"objective.l1_weight: got {l1_weight}; expected a share in [0, 1]")
        if len(latent_shape) != (3 if input == "image" else 4) or min(latent_shape) < 1:
            shape = "(C, h, w)" if input == "image" else "(C, f, h, w)"
            raise UserError(f"objective.latent_shape: got {latent_shape}; expected {shape}, each at least 1")
        self.latent_shape, self.kl_weight, self.l1_weight = tuple(latent_shape), kl_weight, l1_weight
        self.free_bits, self.kl_warmup_steps = free_bits, kl_warmup_steps
        self.mirror, self.input = mirror, input

    @property
    def needs(self) -> Sequence[str]:
        return ("model",)

    @property
    def fields(self) -> Sequence[str]:
        return (self.input,)

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("main", trains="model"),)

    def kl_weight_at(self, step: int) -> float:
        """The KL's weight at a step, after its warm-up schedule."""
        if self.kl_warmup_steps == 0:
            return self.kl_weight
        return self.kl_weight * min(1.0, (step + 1) / self.kl_warmup_steps)

    def _clean(self, batch: Batch, rng: Rng, flip: bool = False) -> Tensor:
        """Images or videos in [-1, 1]; with `flip` each is mirrored with probability 1/2."""
        x = pixels_of(batch, self.input)
        if flip:
            x = mirrored(x, rng)
        return x

    def _coded(self, nets: Nets, x: Tensor, rng: Rng, *more: bool) -> tuple[Tensor, ...]:
        """What the network makes of x and of a draw of its posterior."""
        try:
            x_hat, mean, logvar, *others = nets["model"](x, rng.normal("posterior", self.latent_shape), *more)
        except RuntimeError as error:
            error.add_note(
                f"eps had shape {(len(x), *self.latent_shape)}: check objective.latent_shape against the network"
            )
            raise
        if mean.shape[1:] != self.latent_shape or x_hat.shape != x.shape:
            raise ValueError(
                f"network model returned latents {tuple(mean.shape[1:])} and images {tuple(x_hat.shape[1:])}; expected "
                f"{self.latent_shape} and {tuple(x.shape[1:])}: set objective.latent_shape and the network's sizes to match"
            )
        return x_hat, mean, logvar, *others

    def _compared(self, x: Tensor, x_hat: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per sample the mse, the mae and the KL per image value, each (B,)."""
        difference = x_hat.float() - x
        channel_kl = gaussian_kl(mean.float(), logvar.float()).flatten(2)  # (B, C, h*w)
        kl = channel_kl.mean(2).clamp_min(self.free_bits).sum(1) * channel_kl.shape[2] / x[0].numel()  # (B,)
        return _per_sample(difference.square()), _per_sample(difference.abs()), kl

    def _terms(self, nets: Nets, batch: Batch, rng: Rng, flip: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x, and per sample the mse, the mae and the KL per image value, each (B,)."""
        x = self._clean(batch, rng, flip)
        return x, *self._compared(x, *self._coded(nets, x, rng))

    def _total(self, mse: Tensor, mae: Tensor, kl: Tensor, kl_weight: float) -> tuple[Tensor, Tensor]:
        reconstruction = mse if self.l1_weight == 0 else (1 - self.l1_weight) * mse + self.l1_weight * mae
        return reconstruction + kl_weight * kl, reconstruction

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over samples. Metrics: `loss`, `reconstruction`, `kl` (nats per image value, unweighted), `psnr` (dB)."""
        _, mse, mae, kl = self._terms(nets, batch, rng, flip=self.mirror)
        total, reconstruction = (value.mean() for value in self._total(mse, mae, kl, self.kl_weight_at(step)))
        metrics = {"loss": total, "reconstruction": reconstruction, "kl": kl.mean(), "psnr": psnr(mse).mean()}
        return Loss(total, {name: value.detach() for name, value in metrics.items()})

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """`loss` with the full KL weight, `loss_zero` (a grey image and the prior as posterior), `psnr`; each (B,)."""
        x, mse, mae, kl = self._terms(nets, batch, rng)
        loss, _ = self._total(mse, mae, kl, self.kl_weight)
        free = torch.full_like(kl, self.free_bits * math.prod(self.latent_shape) / x[0].numel())
        zero, _ = self._total(_per_sample(x.square()), _per_sample(x.abs()), free, self.kl_weight)
        return {"loss": loss, "loss_zero": zero, "psnr": psnr(mse)}

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        return Draws(self.input, latent=Latent("prior", self.latent_shape))

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        x = pixels_of(batch, self.input)
        return {}, replace(request, shape=tuple(x.shape[1:]), given={self.input: x})

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """What the network makes of the images or videos that are given, from the posterior's means; where none are, of draws from the
        prior (`prior`): (B, C, H, W) or (B, C, F, H, W) float32, about [-1, 1]."""
        if self.input in request.given:
            x = request.given[self.input]
            # The posterior's noise is scaled by its own deviation, so zero noise is its mean.
            x_hat, _, _ = nets["model"](x, torch.zeros(len(x), *self.latent_shape, device=x.device))
        else:
            x_hat = nets["model"].decode(rng.normal("prior", self.latent_shape))
        return Generated(x_hat.float())
