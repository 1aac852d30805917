"""The evidence lower bound in nats per sample, of decoders that are distributions of pixels: VAE and beta-VAE.

Source: Kingma & Welling 2014; beta: Higgins et al. 2017; capacity: Burgess et al. 2018; KL warm-up: Bowman et al. 2016, in cycles: Fu et
al. 2019; free bits: Kingma et al. 2016; importance-weighted bound and active units: Burda et al. 2016; mutual information: Hoffman &
Johnson 2016.
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
from nexus_scale.objectives.elbo import gaussian_kl
from nexus_scale.objectives.likelihoods import LEVELS, Bernoulli, Gaussian, Likelihood, Logistic
from nexus_scale.processes.pixels import mirrored, pixels_of

ACTIVE = 0.01
"""The variance over the data of a unit's posterior mean from which the unit counts as active (Burda et al. 2016, appendix C)."""


class Variational(Objective):
    """One phase, one network `model`: `model(x, eps) -> (out, mean, logvar)` with latents (B, latent_size), and `model.decode(z) -> out`,
    where `out` (B, numbers * C, H, W) is what the likelihood reads; draws: `posterior`, `mirror`, `binarise`, `dequantise`.

    loss = -log p(x | z) + weight * |KL - capacity|, mean over samples of nats per sample; `weight` is beta after its warm-up, and without a
    capacity the last term is beta times the KL.
    """

    def __init__(
        self,
        *,
        latent_size: int = 20,
        likelihood: Literal["bernoulli", "gaussian", "logistic"] = "bernoulli",
        std: float | None = 1.0,
        binarise: Literal["none", "threshold", "drawn"] = "none",
        dequantise: bool = False,
        grey: bool = False,
        beta: float = 1.0,
        kl_warmup_steps: int = 0,
        kl_cycle_steps: int = 0,
        free_bits: float = 0.0,
        capacity: float = 0.0,
        capacity_steps: int = 0,
        importance_samples: int = 0,
        mirror: bool = False,
    ):
        """
        Args:
            latent_size: units of the network's latents.
            likelihood: of pixels; see `likelihoods`.
            std: of the Gaussian, in shares of the pixels' range; None: the network says it for each value.
            binarise: of the Bernoulli: pixels are taken as shares of white, are white from a half on, or are drawn white with their
                share anew in each step.
            dequantise: of the Gaussian: noise of one level is added, so that its bits per dimension mean something.
            grey: the first channel alone is modelled, since data hold grey images as three equal channels.
            beta: the weight of the KL.
            kl_warmup_steps: steps over which it grows linearly from 0.
            kl_cycle_steps: the growth begins again after so many steps; 0: never.
            free_bits: nats of each unit and sample that cost nothing.
            capacity, capacity_steps: nats that the KL is held at, growing linearly from 0 over so many steps; 0 steps: none.
            importance_samples: draws of the posterior in validation's importance-weighted bound; 0: none.
            mirror: flip each training image left to right with probability 1/2.
        """
        counts = {"latent_size": (latent_size, 1), "kl_warmup_steps": (kl_warmup_steps, 0), "free_bits": (free_bits, 0)}
        counts |= {"kl_cycle_steps": (kl_cycle_steps, 0), "capacity_steps": (capacity_steps, 0), "beta": (beta, 0)}
        counts |= {"capacity": (capacity, 0), "importance_samples": (importance_samples, 0)}
        for name, (value, least) in counts.items():
            if value < least:
                raise UserError(f"objective.{name}: got {value}; expected {least} or more")
        if std is not None and not 0 < std < math.inf:
            raise UserError(f"objective.std: got {std}; expected above 0, or null where the network says it")
        if kl_cycle_steps and not kl_warmup_steps <= kl_cycle_steps:
            raise UserError(
                f"objective.kl_cycle_steps: got {kl_cycle_steps}; expected at least the {kl_warmup_steps} of kl_warmup_steps, or 0"
            )
        if (capacity > 0) != (capacity_steps > 0) or (capacity and free_bits):
            raise UserError(
                f"objective: got capacity {capacity}, capacity_steps {capacity_steps}, free_bits {free_bits}; expected both of the first "
                "two above 0 and no free bits, or neither"
            )
        for name, value, of in (("binarise", binarise != "none", "bernoulli"), ("dequantise", dequantise, "gaussian")):
            if value and likelihood != of:
                raise UserError(f"objective.{name}: is for likelihood {of}; got {likelihood}: leave it out")
        self.latent_size, self.binarise, self.dequantise, self.grey = latent_size, binarise, dequantise, grey
        self.beta, self.kl_warmup_steps, self.kl_cycle_steps = beta, kl_warmup_steps, kl_cycle_steps
        self.free_bits, self.capacity, self.capacity_steps = free_bits, capacity, capacity_steps
        self.importance_samples, self.mirror = importance_samples, mirror
        kinds: dict[str, Likelihood] = {
            "bernoulli": Bernoulli(binary=binarise != "none"),
            "gaussian": Gaussian(std, dequantised=dequantise),
            "logistic": Logistic(),
        }
        self.pixels = kinds[likelihood]

    @property
    def needs(self) -> Sequence[str]:
        return ("model",)

    @property
    def fields(self) -> Sequence[str]:
        return ("image",)

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("main", trains="model"),)

    # ------------------------------------------------------------------------------------------- schedules

    def kl_weight_at(self, step: int) -> float:
        """The weight of the KL at a step, after its warm-up."""
        since = step % self.kl_cycle_steps if self.kl_cycle_steps else step
        return self.beta * min(1.0, (since + 1) / max(1, self.kl_warmup_steps))

    def capacity_at(self, step: int) -> float:
        """The nats that the KL is held at, at a step."""
        return self.capacity * min(1.0, (step + 1) / max(1, self.capacity_steps))

    # ------------------------------------------------------------------------------------------- terms

    def _clean(self, batch: Batch, rng: Rng, flip: bool = False) -> Tensor:
        """Pixels in [0, 1], (B, C, H, W), as the likelihood takes them."""
        x = (pixels_of(batch, "image") + 1) / 2
        x = x[:, :1] if self.grey else x
        if flip:
            x = mirrored(x, rng)
        if self.binarise != "none":
            white = x > rng.uniform("binarise", x.shape[1:]) if self.binarise == "drawn" else x >= 0.5
            return white.to(x.dtype)
        if self.dequantise:
            return ((LEVELS - 1) * x + rng.uniform("dequantise", x.shape[1:])) / LEVELS
        return x

    def _coded(self, nets: Nets, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the network says of x after a draw of its posterior, and the posterior's moments, float32."""
        try:
            out, mean, logvar = (value.float() for value in nets["model"](2 * x - 1, eps))
        except RuntimeError as error:
            error.add_note(f"eps had shape {tuple(eps.shape)}: check objective.latent_size against the network")
            raise
        wanted = (self.pixels.numbers * x.shape[1], *x.shape[2:])
        if mean.shape[1:] != (self.latent_size,) or out.shape[1:] != wanted:
            raise ValueError(
                f"network model returned latents {tuple(mean.shape[1:])} and {tuple(out.shape[1:])} of images; expected "
                f"({self.latent_size},) and {wanted}, {self.pixels.numbers} numbers of each value: set objective.latent_size and the "
                "network's latent_size, numbers, image_channels and image_size to match"
            )
        return out, mean, logvar

    def _kl(self, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        """The KL of each sample in nats, and as it is charged after free bits; (B,) each."""
        of_units = gaussian_kl(mean, logvar)  # (B, latent_size)
        return of_units.sum(1), of_units.clamp_min(self.free_bits).sum(1)

    def _posterior(self, rng: Rng, draw: int = 0) -> Tensor:
        return rng.normal(f"posterior{draw or ''}", (self.latent_size,))

    # ------------------------------------------------------------------------------------------- training, validation

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over samples. Metrics: `loss`, and in nats per sample `reconstruction` and `kl`, unweighted; `kl_weight`."""
        x = self._clean(batch, rng, flip=self.mirror)
        out, mean, logvar = self._coded(nets, x, self._posterior(rng))
        kl, charged = self._kl(mean, logvar)
        reconstruction, weight = -self.pixels.log_prob(out, x), self.kl_weight_at(step)
        total = (reconstruction + weight * (charged - self.capacity_at(step)).abs()).mean()
        metrics = {"loss": total, "reconstruction": reconstruction.mean(), "kl": kl.mean()}
        metrics["kl_weight"] = torch.full_like(total, weight)
        return Loss(total, {name: value.detach() for name, value in metrics.items()})

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """`loss` with all of beta and of the capacity, `loss_zero` (grey pixels, the prior as posterior); in nats `nats` (the negative
        bound), `reconstruction`, `kl`, and with importance samples their bound `importance_nats`; `bits` per dimension where the likelihood
        knows levels; (B,) each. `posterior` (B, 3 * latent_size): mean, log-variance and a draw, for `figures`."""
        x = self._clean(batch, rng)
        eps = self._posterior(rng)
        out, mean, logvar = self._coded(nets, x, eps)
        kl, charged = self._kl(mean, logvar)
        reconstruction = -self.pixels.log_prob(out, x)
        held = self.capacity if self.capacity_steps else 0.0
        found = {
            "loss": reconstruction + self.beta * (charged - held).abs(),
            "loss_zero": -self.pixels.log_prob(torch.zeros_like(out), x)
            + self.beta * abs(self.free_bits * self.latent_size - held),
            "nats": reconstruction + kl,
            "reconstruction": reconstruction,
            "kl": kl,
            "posterior": torch.cat([mean, logvar, mean + (0.5 * logvar).exp() * eps], dim=1),
        }
        if self.importance_samples:
            found["importance_nats"] = -self._importance_bound(nets, x, rng)
        if self.pixels.bits_of_level is not None:
            found["bits"] = self._bits(found.get("importance_nats", found["nats"]), x)
        return found

    def figures(self, rows: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Of the posteriors of the validation set: `active_units`, how many; `mutual_information` of samples and latents in nats, which is
        at most the log of the number of samples."""
        mean, logvar, z = rows["posterior"].chunk(3, dim=1)
        return {
            "active_units": (mean.var(0, correction=0) > ACTIVE).double().sum(),
            "mutual_information": mutual_information(mean, logvar, z),
        }

    def _importance_bound(self, nets: Nets, x: Tensor, rng: Rng) -> Tensor:
        """log of the mean importance weight over draws of the posterior, (B,): at least the bound of one draw, in expectation."""
        weights = []
        for draw in range(self.importance_samples):
            eps = self._posterior(rng, draw)
            out, mean, logvar = self._coded(nets, x, eps)
            z = mean + (0.5 * logvar).exp() * eps
            prior_less_posterior = 0.5 * (eps.square() + logvar - z.square()).sum(1)
            weights.append(self.pixels.log_prob(out, x) + prior_less_posterior)
        return torch.stack(weights).logsumexp(0) - math.log(self.importance_samples)

    def _bits(self, nats: Tensor, x: Tensor) -> Tensor:
        """Bits per dimension of pixels on levels."""
        assert self.pixels.bits_of_level is not None
        return nats / (math.log(2) * x[0].numel()) + self.pixels.bits_of_level

    def likelihood(
        self, nets: Nets, batch: Batch, rng: Rng, *, exact: bool, tolerance: float, earliest: float
    ) -> Mapping[str, Tensor]:
        """The importance-weighted bound: `bits` per dimension and `nats` per sample; of one draw where the recipe names none.

        Raises:
            UserError: it is asked for exactly, or the likelihood knows no levels.
        """
        if exact:
            raise UserError("likelihood.divergence: a variational bound has no exact form; leave it out")
        if self.pixels.bits_of_level is None:
            raise UserError(
                "objective variational: this likelihood is none of pixels on levels, so there are no bits; expected likelihood logistic, "
                "gaussian with dequantise, or bernoulli with binarise"
            )
        x = self._clean(batch, rng)
        if self.importance_samples:
            nats = -self._importance_bound(nets, x, rng)
        else:
            out, mean, logvar = self._coded(nets, x, self._posterior(rng))
            nats = self._kl(mean, logvar)[0] - self.pixels.log_prob(out, x)
        return {"bits": self._bits(nats, x).double(), "nats": nats.double()}

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        return Draws("image", latent=Latent("prior", (self.latent_size,)))

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        x = pixels_of(batch, "image")
        return {}, replace(request, shape=tuple(x.shape[1:]), given={"image": x})

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """The decoder's mean pixels, (B, C, H, W) in [-1, 1]: of the posterior's means where images are given, else of draws from the
        prior (`prior`). Grey ones have three equal channels."""
        if "image" in request.given:
            x = request.given["image"]
            x = x[:, :1] if self.grey else x
            # The posterior's noise is scaled by its own deviation, so zero noise is its mean.
            out = nets["model"](x, torch.zeros(len(x), self.latent_size, device=x.device))[0]
        else:
            out = nets["model"].decode(rng.normal("prior", (self.latent_size,)))
        x_hat = 2 * self.pixels.mean(out.float()) - 1
        return Generated(x_hat.expand(-1, 3, -1, -1) if self.grey else x_hat)


def mutual_information(mean: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
    """I(x; z) in nats of posteriors (N, D) and a draw z (N, D) of each: mean of log q(z | x) - log of the mean of all N posteriors at z."""
    precision = (-logvar).exp()
    # (z - mean)^2 / var of all pairs as products of matrices; in float64 what cancels is far below a nat
    squares = z.square() @ precision.T - 2 * z @ (mean * precision).T + (mean.square() * precision).sum(1)
    log_q = -0.5 * (squares + logvar.sum(1))  # (N, N) without the constant, which cancels: row n is z of sample n
    return (log_q.diagonal() - log_q.logsumexp(1)).mean() + math.log(len(z))
