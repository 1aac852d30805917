"""Perceptual compression: an autoencoder that is held to how images look, by features of a network and by a discriminator of patches.

Source: Rombach et al. 2022 (latent diffusion), section 3.1 and appendix G; Esser et al. 2021 (VQGAN), section 3.1 and equation 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from nexus_scale.contracts import Batch, Loss, Nets, Phase, Rng, SumOverRanks, UserError
from nexus_scale.kernels.transfer import to_device
from nexus_scale.objectives.elbo import ELBO, psnr

GENERATOR, DISCRIMINATOR = "generator", "discriminator"
FLOOR, LARGEST = 1e-4, 1e4
"""Added to the adversarial norm, and the largest ratio of norms; of gradients of the paper's loss, a sum over an image's values."""
LAST_KERNEL = 3


class AdversarialELBO(ELBO):
    """Phase `generator` trains `model`: `model(x, eps, True) -> (x_hat, mean, logvar, last)`, with what goes into its last convolution;
    phase `discriminator`, once it has begun, `discriminator`: `discriminator(x) -> logits`. `perceptual(x, x_hat) -> (B,)` is frozen.
    Draws: `posterior`, `mirror`.

    loss = mae + perceptual_weight * perceptual + kl_weight * kl - ratio * adversarial_weight * logits / (C*H*W), each mean over samples,
    mae and kl as in `ELBO`; `ratio` is |gradient of the first two| / |gradient of the logits| at the kernel of the last convolution, as
    VQGAN has it for the loss times C*H*W. It is that of the global batch of the step before, so that neither workers nor micro-batches
    change it. The discriminator's loss is the hinge.
    """

    def __init__(
        self,
        *,
        latent_shape: tuple[int, ...],
        kl_weight: float = 1e-6,
        perceptual_weight: float = 1.0,
        adversarial_weight: float = 0.5,
        discriminator_begins: int = 50001,
        mirror: bool = False,
    ):
        """
        Args:
            latent_shape: (C, h, w) of the network's latents.
            kl_weight: per image value.
            perceptual_weight: of LPIPS, for which `networks.perceptual` gives the weights; 0: there is none.
            adversarial_weight: of the discriminator, beside the ratio of gradients; 0: there is none.
            discriminator_begins: steps without the discriminator and its loss.
            mirror: flip each training image left to right with probability 1/2.
        """
        super().__init__(latent_shape=latent_shape, kl_weight=kl_weight, l1_weight=1.0, mirror=mirror)
        if min(perceptual_weight, adversarial_weight, discriminator_begins) < 0:
            raise UserError(
                f"objective: got perceptual_weight {perceptual_weight}, adversarial_weight {adversarial_weight}, discriminator_begins "
                f"{discriminator_begins}; expected 0 or more of each"
            )
        self.perceptual_weight, self.adversarial_weight = perceptual_weight, adversarial_weight
        self.discriminator_begins = discriminator_begins
        if adversarial_weight:  # of the reconstruction's gradient and of the logits'
            self.kept["norms"] = torch.zeros(2, dtype=torch.float64)
        self._draw = -1  # the global batch of the two below
        self._gradients: list[tuple[Tensor, int]] = []
        self._drawn: dict[int, Tensor] = {}

    @property
    def needs(self) -> Sequence[str]:
        others = {"discriminator": self.adversarial_weight, "perceptual": self.perceptual_weight}
        return ("model", *(name for name, weight in others.items() if weight))

    def phases(self, step: int) -> Sequence[Phase]:
        phases = [Phase(GENERATOR, trains="model")]
        if self._judged(step):
            phases.append(Phase(DISCRIMINATOR, trains="discriminator", draws=False))
        return phases

    def _judged(self, step: int) -> bool:
        return self.adversarial_weight > 0 and step >= self.discriminator_begins

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over samples. Metrics of `generator`: `loss` (as in `validate`), `kl`, `psnr`, `perceptual`, and once it has begun
        `adversarial` with its `ratio`; of `discriminator`: `loss`, and `real`, `fake`, the mean logits."""
        x = self._clean(batch, rng, flip=self.mirror)
        return self._generator(nets, x, batch, rng, step) if phase == GENERATOR else self._discriminator(nets, x, batch)

    # ------------------------------------------------------------------------------------------ phases

    def _generator(self, nets: Nets, x: Tensor, batch: Batch, rng: Rng, step: int) -> Loss:
        x_hat, mean, logvar, last = self._coded(nets, x, rng, True)
        x_hat = x_hat.float()
        mse, mae, kl = self._compared(x, x_hat, mean, logvar)
        looks = self._perceptual(nets, x, x_hat)
        reconstruction, weighted_kl = (mae + self.perceptual_weight * looks).mean(), self.kl_weight * kl.mean()
        total = reconstruction + weighted_kl
        metrics = {"loss": total, "kl": kl.mean(), "psnr": psnr(mse).mean()}
        if self.perceptual_weight:
            metrics["perceptual"] = looks.mean()
        if self._judged(step):
            adversarial = -nets["discriminator"](x_hat).float().mean()
            gradient = self._balanced(batch, reconstruction, adversarial, x_hat, last)
            # The product has the gradient of both losses at x_hat; its value is meaningless.
            total = (x_hat * gradient).sum() + weighted_kl
            metrics |= {"adversarial": adversarial, "ratio": self._ratio(x[0].numel())}
            self._drawn[int(batch.positions[0])] = x_hat.detach()
        return Loss(total, {name: value.detach() for name, value in metrics.items()})

    def _balanced(
        self, batch: Batch, reconstruction: Tensor, adversarial: Tensor, x_hat: Tensor, last: Tensor
    ) -> Tensor:
        """The gradient of both losses at x_hat, like it, without a graph. The norms' parts are kept for `after_phase`."""
        if batch.draw != self._draw:
            self._draw, self._gradients, self._drawn = batch.draw, [], {}
        self.kept["norms"] = to_device(self.kept["norms"], x_hat.device)
        gradients = [torch.autograd.grad(loss, x_hat, retain_graph=True)[0] for loss in (reconstruction, adversarial)]
        of_kernel = [kernel_gradient(last, gradient) for gradient in gradients]
        self._gradients.append((torch.stack(of_kernel), len(x_hat)))
        weight = self._ratio(x_hat[0].numel()) * self.adversarial_weight / x_hat[0].numel()
        return gradients[0] + weight.to(x_hat.dtype) * gradients[1]

    def _ratio(self, values: int) -> Tensor:
        """Of the gradients of images of so many values; 0 before one was measured."""
        reconstruction, adversarial = self.kept["norms"].unbind()
        ratio = (values * reconstruction / (adversarial + FLOOR)).clamp(max=LARGEST)
        return torch.where(adversarial > 0, ratio, 0.0)

    def _discriminator(self, nets: Nets, x: Tensor, batch: Batch) -> Loss:
        """Real and coded images in one pass; the coded ones are those of this step's generator phase."""
        judged = nets["discriminator"](torch.cat([x, self._drawn[int(batch.positions[0])]]))
        real, fake = judged.float().chunk(2)
        total = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        metrics = {"loss": total, "real": real.mean(), "fake": fake.mean()}
        return Loss(total, {name: value.detach() for name, value in metrics.items()})

    def after_phase(
        self, phase: str, nets: Nets, sum_over_ranks: SumOverRanks, rng: Rng, step: int
    ) -> Mapping[str, Tensor | tuple[Tensor, Tensor]]:
        """The ratio of the next step is that of the gradients of this global batch."""
        seen, self._gradients = self._gradients, []
        if phase != GENERATOR or not seen:
            return {}
        mine = torch.stack([gradients.double() * samples for gradients, samples in seen]).sum(0)
        count = torch.full((1,), sum(samples for _, samples in seen), dtype=torch.float64, device=mine.device)
        total = sum_over_ranks(torch.cat([mine.flatten(), count]))
        norms = torch.linalg.vector_norm(total[:-1].view(2, -1), dim=1) / total[-1]
        self.kept["norms"] = torch.where(norms.isfinite().all(), norms, self.kept["norms"])
        return {}

    # ------------------------------------------------------------------------------------------ validation, state

    def _perceptual(self, nets: Nets, x: Tensor, x_hat: Tensor) -> Tensor:
        """(B,); zeros without LPIPS."""
        return nets["perceptual"](x, x_hat).float() if self.perceptual_weight else x_hat.new_zeros(len(x_hat))

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """`loss` = mae + perceptual_weight * perceptual + kl_weight * kl, `loss_zero` of a grey image, `psnr`, `perceptual`; each (B,)."""
        x = self._clean(batch, rng)
        x_hat, mean, logvar = self._coded(nets, x, rng)
        mse, mae, kl = self._compared(x, x_hat, mean, logvar)
        looks, zero = (self._perceptual(nets, x, image) for image in (x_hat.float(), torch.zeros_like(x)))
        loss = mae + self.perceptual_weight * looks + self.kl_weight * kl
        grey = x.abs().flatten(1).mean(1) + self.perceptual_weight * zero
        found = {"loss": loss, "loss_zero": grey, "psnr": psnr(mse)}
        return {**found, "perceptual": looks} if self.perceptual_weight else found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._gradients = []


def kernel_gradient(last: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of a 3 x 3 convolution's kernel from what went into it (B, C, H, W) and the gradient at what came out (B, C', H, W):
    (C', C, 3, 3). So the kernel itself, which other ranks may hold, is not asked."""
    shape = (gradient.shape[1], last.shape[1], LAST_KERNEL, LAST_KERNEL)
    last = last.detach()
    return conv2d_weight(last, shape, gradient.to(last.dtype), padding=LAST_KERNEL // 2).float()
