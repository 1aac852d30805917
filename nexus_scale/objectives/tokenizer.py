"""Training a tokenizer of clips whose codes are looked up nowhere: reconstruction, entropy, commitment, and a discriminator of clips.

Source: Yu et al. 2023 (MAGVIT-v2), section 3 and appendix A; the discriminator's regulariser: Tseng et al. 2021 (LeCAM), equation 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
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
from nexus_scale.kernels.transfer import to_device
from nexus_scale.objectives.critic_losses import critic_loss, generator_loss
from nexus_scale.objectives.elbo import psnr
from nexus_scale.processes.pixels import mirrored, pixels_of

GENERATOR, DISCRIMINATOR, IMAGES, VIDEO = "generator", "discriminator", "images", "video"
DECAY = 0.999
"""Of the averages of a discriminator's logits, as in the public code."""


class Tokenizer(Objective):
    """Phase `generator`, in the first steps `images`, trains `model`: `model(x) -> (x_hat, codes, sure, used, commitment)`, x of shape
    (B, C, F, H, W) in [-1, 1]; phase `discriminator`, once it has begun, `discriminator`: `discriminator(x) -> logits`.
    `perceptual(x, x_hat) -> (B,)` of images is frozen. Draws: `mirror`, `frames`.

    loss = (1 - l1_weight) * mse + l1_weight * mae + perceptual_weight * perceptual + commitment_weight * commitment
    + entropy_weight * (sure - used_weight * used) + adversarial_weight * softplus(-logits), mean over samples; entropies in nats.
    """

    def __init__(
        self,
        *,
        l1_weight: float = 0.0,
        perceptual_weight: float = 0.1,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        used_weight: float = 1.0,
        adversarial_weight: float = 0.1,
        discriminator_begins: int = 0,
        lecam_weight: float = 0.001,
        mirror: bool = False,
        frames: int = 0,
        image_steps: int = 0,
        images: int = 1,
    ):
        """
        Args:
            l1_weight: share of the mean absolute error in the reconstruction, in [0, 1].
            perceptual_weight: of LPIPS, the mean over frames, for which `networks.perceptual` gives the weights; 0: there is none.
            commitment_weight: of latents' distance from the signs that they become.
            entropy_weight, used_weight: of a place's entropy, and beside it of that of the clip's mean.
            adversarial_weight: of the discriminator; 0: there is none.
            discriminator_begins: steps without the discriminator and its loss.
            lecam_weight: of logits' distance from the average of the other side's, for the discriminator; 0: it costs nothing.
            mirror: flip each training clip left to right with probability 1/2.
            frames: of each training clip that are seen, from wherever it is drawn; 0: all.
            image_steps: the first steps, which see frames as images: many times cheaper than clips. Networks take clips afterwards as
                they then are: with `magvit2.inflates` as an inflated network of images does.
            images: frames of each clip that such a step sees, drawn apart.
        """
        weights = {"perceptual_weight": perceptual_weight, "commitment_weight": commitment_weight}
        weights |= {"entropy_weight": entropy_weight, "used_weight": used_weight, "lecam_weight": lecam_weight}
        weights |= {"adversarial_weight": adversarial_weight, "discriminator_begins": discriminator_begins}
        weights |= {"frames": frames, "image_steps": image_steps}
        for name, value in weights.items():
            if value < 0:
                raise UserError(f"objective.{name}: got {value}; expected 0 or more")
        if not 0 <= l1_weight <= 1:
            raise UserError(f"objective.l1_weight: got {l1_weight}; expected a share in [0, 1]")
        self.l1_weight, self.perceptual_weight, self.mirror = l1_weight, perceptual_weight, mirror
        self.commitment_weight, self.entropy_weight, self.used_weight = commitment_weight, entropy_weight, used_weight
        self.adversarial_weight, self.discriminator_begins = adversarial_weight, discriminator_begins
        if images < 1:
            raise UserError(f"objective.images: got {images}; expected 1 or more")
        self.frames, self.image_steps, self.images = frames, image_steps, images
        self.lecam_weight = lecam_weight if adversarial_weight else 0.0
        if self.lecam_weight:  # averages of the logits of data and of what is rebuilt
            self.kept["logits"] = torch.zeros(2, dtype=torch.float64)
        self._draw = -1  # the global batch of the two below
        self._rebuilt: dict[int, Tensor] = {}
        self._judged: list[Tensor] = []

    @property
    def needs(self) -> Sequence[str]:
        others = {"discriminator": self.adversarial_weight, "perceptual": self.perceptual_weight}
        return ("model", *(name for name, weight in others.items() if weight))

    @property
    def fields(self) -> Sequence[str]:
        return (VIDEO,)

    def phases(self, step: int) -> Sequence[Phase]:
        if step < self.image_steps:
            return [Phase(IMAGES, trains="model")]
        phases = [Phase(GENERATOR, trains="model")]
        if self._judges(step):
            phases.append(Phase(DISCRIMINATOR, trains="discriminator", draws=False))
        return phases

    def _judges(self, step: int) -> bool:
        return self.adversarial_weight > 0 and step >= self.discriminator_begins

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over samples. Metrics of `generator` and `images`: `loss` (as in `validate`), `mse`, `psnr` in dB, `sure`, `used`,
        `commitment`, once it has begun `adversarial`; of `discriminator`: `loss`, and `real`, `fake`, the mean logits."""
        x = pixels_of(batch, VIDEO)
        if self.mirror:
            x = mirrored(x, rng)
        x = self._seen(x, rng, phase)
        if phase == DISCRIMINATOR:
            return self._discriminator(nets, x, batch)
        return self._generator(nets, x, batch, judged=phase == GENERATOR and self._judges(step))

    # ------------------------------------------------------------------------------------------ phases

    def _seen(self, x: Tensor, rng: Rng, phase: str) -> Tensor:
        """Of clips (B, C, F, H, W) what a step sees: images (B images, C, 1, H, W), or `frames` in a row of each."""
        total = x.shape[2]
        if phase == IMAGES:
            places = (rng.uniform("frames", (self.images,)) * total).long()
            return _at(x, places).transpose(1, 2).flatten(0, 1)[:, :, None]
        if not 0 < self.frames < total:
            return x
        first = (rng.uniform("frames") * (total - self.frames + 1)).long()
        return _at(x, first[:, None] + torch.arange(self.frames, device=x.device))

    def _terms(self, nets: Nets, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Clips rebuilt, and per sample the loss without the discriminator and its terms."""
        made = nets["model"](x)
        x_hat = made.x_hat.float()
        if x_hat.shape != x.shape:
            raise ValueError(f"network model returned clips {tuple(x_hat.shape[1:])}; expected {tuple(x.shape[1:])}")
        difference = x_hat - x
        mse, mae = difference.square().flatten(1).mean(1), difference.abs().flatten(1).mean(1)
        loss = (1 - self.l1_weight) * mse + self.l1_weight * mae + self.commitment_weight * made.commitment
        loss = loss + self.entropy_weight * (made.sure - self.used_weight * made.used)
        terms = {"mse": mse, "sure": made.sure, "used": made.used, "commitment": made.commitment}
        if self.perceptual_weight:
            frames = (value.transpose(1, 2).flatten(0, 1) for value in (x, x_hat))
            terms["perceptual"] = nets["perceptual"](*frames).float().view(len(x), -1).mean(1)
            loss = loss + self.perceptual_weight * terms["perceptual"]
        return x_hat, {"loss": loss, "psnr": psnr(mse), **terms}

    def _generator(self, nets: Nets, x: Tensor, batch: Batch, *, judged: bool) -> Loss:
        x_hat, terms = self._terms(nets, x)
        total, metrics = terms["loss"].mean(), {name: value.detach().mean() for name, value in terms.items()}
        if judged:
            if batch.draw != self._draw:
                self._draw, self._rebuilt, self._judged = batch.draw, {}, []
            self._rebuilt[int(batch.positions[0])] = x_hat.detach()
            adversarial = generator_loss("logistic", nets["discriminator"](x_hat).float()).mean()
            total = total + self.adversarial_weight * adversarial
            metrics["adversarial"] = adversarial.detach()
        return Loss(total, metrics)

    def _discriminator(self, nets: Nets, x: Tensor, batch: Batch) -> Loss:
        """Clips and what this step's generator phase made of them in one pass."""
        judged = nets["discriminator"](torch.cat([x, self._rebuilt[int(batch.positions[0])]]))
        real, fake = judged.float().chunk(2)
        total = critic_loss("logistic", real, fake).mean()
        if self.lecam_weight:
            self.kept["logits"] = to_device(self.kept["logits"], real.device)
            of_data, of_rebuilt = self.kept["logits"].float().unbind()
            apart = F.relu(real - of_rebuilt).square() + F.relu(of_data - fake).square()
            total = total + self.lecam_weight * apart.mean()
            self._judged.append(torch.stack([real.sum(), fake.sum(), real.new_tensor(real.numel())]).detach().double())
        metrics = {"loss": total, "real": real.mean(), "fake": fake.mean()}
        return Loss(total, {name: value.detach() for name, value in metrics.items()})

    def after_phase(
        self, phase: str, nets: Nets, sum_over_ranks: SumOverRanks, rng: Rng, step: int
    ) -> Mapping[str, Tensor | tuple[Tensor, Tensor]]:
        """The averages of logits follow this global batch."""
        judged, self._judged = self._judged, []
        if phase == DISCRIMINATOR and judged:
            total = sum_over_ranks(torch.stack(judged).sum(0))
            followed = DECAY * self.kept["logits"] + (1 - DECAY) * total[:2] / total[2]
            self.kept["logits"] = torch.where(followed.isfinite().all(), followed, self.kept["logits"])
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._draw, self._rebuilt, self._judged = -1, {}, []

    # ------------------------------------------------------------------------------------ validation, generation

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """`loss` without the discriminator, `loss_zero`, the reconstruction's of a grey clip, and the loss's terms; (B,) each."""
        x = pixels_of(batch, VIDEO)
        _, terms = self._terms(nets, x)
        grey = (1 - self.l1_weight) * x.square().flatten(1).mean(1) + self.l1_weight * x.abs().flatten(1).mean(1)
        return {**terms, "loss_zero": grey}

    @property
    def draws(self) -> Draws:
        return Draws(VIDEO, given=(VIDEO,))

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        x = pixels_of(batch, VIDEO)
        return {}, replace(request, shape=tuple(x.shape[1:]), given={VIDEO: x})

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """The given clips, coded and decoded, (B, C, F, H, W) float32, about [-1, 1]. Codes have no prior of their own to draw from."""
        model: Any = nets["model"]
        return Generated(model(request.given[VIDEO]).x_hat.float())


def _at(x: Tensor, places: Tensor) -> Tensor:
    """Frames of clips (B, C, F, H, W) at `places` (B, N): (B, C, N, H, W)."""
    return x.gather(2, places[:, None, :, None, None].expand(-1, x.shape[1], -1, *x.shape[3:]))
