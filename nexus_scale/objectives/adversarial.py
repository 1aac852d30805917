"""Generative adversarial training: a critic learns to tell data from samples, and a generator to fool it.

Source: Goodfellow et al. 2014; R1: Mescheder et al. 2018, "Which training methods for GANs do actually converge?"; Arjovsky et al. 2017,
"Wasserstein GAN"; hinge: Lim & Ye 2017, "Geometric GAN".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
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
    Word,
)
from nexus_scale.processes.pixels import pixels_of


class Adversarial(Objective):
    """Two networks, `model: model(z, cond) -> x` and `critic: critic(x, cond) -> (B,)`. A step is `critic_steps` updates of the critic,
    each on other data and other noise, and one of the generator, on the last data's conditions.

    Draws, by name: `z`.
    """

    def __init__(
        self,
        *,
        noise_size: int = 128,
        losses: Literal["logistic", "hinge", "wasserstein"] = "logistic",
        critic_steps: int = 1,
        r1_weight: float = 0.0,
        conditions: tuple[str, ...] = (),
    ):
        """
        Args:
            noise_size: length of the generator's noise.
            losses: `wasserstein` wants a critic whose slope is bounded: `networks.critic.optimizer.clip_weights: 0.01`.
            critic_steps: updates of the critic for one of the generator.
            r1_weight: gamma of R1, gamma / 2 * |grad critic(x)|^2 at real images.
            conditions: batch fields that condition both networks.
        """
        if noise_size < 1 or critic_steps < 1 or r1_weight < 0:
            raise UserError(
                f"objective: got noise_size {noise_size}, critic_steps {critic_steps}, r1_weight {r1_weight}; expected at least 1, 1, 0"
            )
        self.noise_size, self.losses, self.critic_steps = noise_size, losses, critic_steps
        self.r1_weight, self.conditions = r1_weight, tuple(conditions)
        self.needs_whole = ("critic",) if r1_weight else ()

    @property
    def needs(self) -> Sequence[str]:
        return ("model", "critic")

    @property
    def fields(self) -> Sequence[str]:
        return ("image", *self.conditions)

    def phases(self, step: int) -> Sequence[Phase]:
        critic = Phase("critic", trains="critic")
        return (*[critic] * self.critic_steps, Phase("generator", trains="model", draws=False))

    def _cond(self, given: Batch | Cond) -> dict[str, Tensor]:
        return {name: given[name] for name in self.conditions}

    def _drawn(self, nets: Nets, cond: Cond, rng: Rng) -> Tensor:
        x: Tensor = nets["model"](rng.normal("z", (self.noise_size,)), cond)
        return x.float()

    def critic_loss(self, real: Tensor, fake: Tensor) -> Tensor:
        """The critic's loss from its outputs for data and samples, (B,) each -> (B,)."""
        if self.losses == "logistic":
            return F.softplus(-real) + F.softplus(fake)
        if self.losses == "hinge":
            return F.relu(1 - real) + F.relu(1 + fake)
        return fake - real

    def generator_loss(self, fake: Tensor) -> Tensor:
        """The generator's loss from the critic's outputs for samples, (B,) -> (B,)."""
        return F.softplus(-fake) if self.losses == "logistic" else -fake

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over samples. Metrics of both phases: `loss`; of the critic also its outputs `real` and `fake`, and `r1`, unweighted."""
        cond = self._cond(batch)
        if phase == "generator":
            total = self.generator_loss(nets["critic"](self._drawn(nets, cond, rng), cond).float()).mean()
            return Loss(total, {"loss": total.detach()})
        x = pixels_of(batch, "image").requires_grad_(self.r1_weight > 0)
        with torch.no_grad():
            x_hat = self._drawn(nets, cond, rng)
        real, fake = nets["critic"](x, cond).float(), nets["critic"](x_hat, cond).float()
        total = self.critic_loss(real, fake).mean()
        metrics = {"real": real.mean(), "fake": fake.mean()}
        if self.r1_weight:
            metrics["r1"] = self._r1(real, x)
            total = total + 0.5 * self.r1_weight * metrics["r1"]
        return Loss(total, {"loss": total.detach(), **{name: value.detach() for name, value in metrics.items()}})

    @staticmethod
    def _r1(real: Tensor, x: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
        return slope.square().flatten(1).sum(1).mean()

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """`loss`: the critic's on held-out data; `loss_zero`: that of a critic that always returns zero; each (B,)."""
        cond = self._cond(batch)
        real = nets["critic"](pixels_of(batch, "image"), cond).float()
        fake = nets["critic"](self._drawn(nets, cond, rng), cond).float()
        zero = torch.zeros_like(real)
        return {"loss": self.critic_loss(real, fake), "loss_zero": self.critic_loss(zero, zero)}

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        """One forward, without steps or guidance."""
        takes: frozenset[Word] = frozenset({"prompt"}) if self.conditions else frozenset()
        return Draws("image", takes=takes, conditions=self.conditions, latent=Latent("z", (self.noise_size,)))

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        return self._cond(batch), request

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """Images (B, C, H, W) in [-1, 1] from noise `z`."""
        return Generated(self._drawn(nets, self._cond(cond), rng))
