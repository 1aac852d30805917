"""Training an autoencoder whose latents are codes: reconstruction and commitment.

Source: van den Oord et al. 2017 (VQ-VAE), equation 3 with the book's term as moving averages (appendix A.1); Mentzer et al. 2023 (FSQ).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from nexus_scale.contracts import (
    Batch,
    Cond,
    Draws,
    Generated,
    Loss,
    Nets,
    Objective,
    Phase,
    Request,
    Rng,
    SumOverRanks,
    UserError,
)
from nexus_scale.objectives.elbo import psnr
from nexus_scale.processes.pixels import mirrored, pixels_of


class Seen(NamedTuple):
    """The quantiser's training data of a micro-batch: latents (B, D, T), codes (B, T, 1), positions (B,)."""

    latents: Tensor
    codes: Tensor
    positions: Tensor


class DiscreteAutoencoder(Objective):
    """One phase, one network `model`: `model(x) -> (x_hat, latents, codes, commitment)`, with a `quantizer` whose `follow` learns from
    the global batch; draws: `mirror`; shared: `replacement`.

    loss = mse / data_variance + commitment_weight * commitment, mean over samples; mse is a mean over the values of images in [-1, 1].
    """

    def __init__(
        self,
        *,
        commitment_weight: float = 0.25,
        data_variance: float = 1.0,
        mirror: bool = False,
    ):
        """
        Args:
            commitment_weight: beta of the paper, of the latents' distance from their entries; FSQ has none.
            data_variance: of the values of images, which makes the two terms of one size.
            mirror: flip each training image left to right with probability 1/2.
        """
        if commitment_weight < 0 or data_variance <= 0:
            raise UserError(
                f"objective: got commitment_weight {commitment_weight}, data_variance {data_variance}; expected 0 or more, and above 0"
            )
        self.commitment_weight, self.data_variance, self.mirror = commitment_weight, data_variance, mirror
        self._draw = -1  # the global batch of what was seen
        self._seen: list[Seen] = []

    @property
    def needs(self) -> Sequence[str]:
        return ("model",)

    @property
    def fields(self) -> Sequence[str]:
        return ("image",)

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("main", trains="model"),)

    def _mse(self, x: Tensor, x_hat: Tensor) -> Tensor:
        if x_hat.shape != x.shape:
            raise ValueError(f"network model returned images {tuple(x_hat.shape[1:])}; expected {tuple(x.shape[1:])}")
        return (x_hat.float() - x).square().flatten(1).mean(1)

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over samples. Metrics: `loss`, `mse`, `commitment`, `psnr` in dB."""
        if batch.draw != self._draw:
            self._draw, self._seen = batch.draw, []
        x = pixels_of(batch, "image")
        if self.mirror:
            x = mirrored(x, rng)
        x_hat, latents, codes, commitment = nets["model"](x)
        self._seen.append(Seen(latents.detach(), codes, batch.positions))
        mse, commitment = self._mse(x, x_hat), commitment.float().mean()
        total = mse.mean() / self.data_variance + self.commitment_weight * commitment
        metrics = {"loss": total, "mse": mse.mean(), "commitment": commitment, "psnr": psnr(mse).mean()}
        return Loss(total, {name: value.detach() for name, value in metrics.items()})

    def after_phase(
        self, phase: str, nets: Nets, sum_over_ranks: SumOverRanks, rng: Rng, step: int
    ) -> Mapping[str, Tensor | tuple[Tensor, Tensor]]:
        """The quantiser follows the global batch. Metrics: `perplexity` of the codes, and of a book the part that was `replaced`."""
        seen, self._seen = self._seen, []
        quantizer: Any = nets["model"].quantizer
        metrics: Mapping[str, Tensor | tuple[Tensor, Tensor]] = quantizer.follow(
            seen, sum_over_ranks, rng.shared("replacement")
        )
        return metrics

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._draw, self._seen = -1, []

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """`loss` as in training, `loss_zero` of a grey image, `mse`, `psnr`; (B,) each."""
        x = pixels_of(batch, "image")
        x_hat, _, _, commitment = nets["model"](x)
        mse = self._mse(x, x_hat)
        loss = mse / self.data_variance + self.commitment_weight * commitment.float()
        zero = x.square().flatten(1).mean(1) / self.data_variance
        return {"loss": loss, "loss_zero": zero, "mse": mse, "psnr": psnr(mse)}

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        return Draws("image", given=("image",))

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        x = pixels_of(batch, "image")
        return {}, replace(request, shape=tuple(x.shape[1:]), given={"image": x})

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """The given images, coded and decoded: (B, C, H, W) float32, about [-1, 1]. Codes have no prior of their own to draw from."""
        return Generated(nets["model"](request.given["image"])[0].float())
