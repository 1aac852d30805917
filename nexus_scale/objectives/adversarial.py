"""Generative adversarial training: a critic learns to tell data from samples, and a generator to fool it.

Source: Goodfellow et al. 2014; Arjovsky et al. 2017; Gulrajani et al. 2017; `critic_losses` names that of each loss and penalty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

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
    SumOverRanks,
    UserError,
    Word,
)
from nexus_scale.objectives.critic_losses import (
    Losses,
    between,
    critic_loss,
    generator_loss,
    one_centred,
    zero_centred,
)
from nexus_scale.processes.augmentations import find_augmentation, half_cosine
from nexus_scale.processes.pixels import pixels_of

LABEL = "label"


class Judged(NamedTuple):
    """A critic's answers (B,) or (B, ...), one for each place that it judges; logits of classes (B, classes), of one that names them."""

    answers: Tensor
    logits: Tensor | None


def _of(total: Tensor, metrics: Mapping[str, Tensor]) -> Loss:
    return Loss(total, {"loss": total.detach(), **{name: value.detach() for name, value in metrics.items()}})


class Adversarial(Objective):
    """Two networks, `model: model(z, cond) -> x` and `critic: critic(x, cond) -> answers`, one or more for each sample, larger for data;
    where it names classes, too: `-> (answers, logits (B, classes))`. A step is `critic_steps` updates of the critic, each on other data and
    other noise, and one of the generator, on the last data's conditions.

    Draws, by name: `z`; `mix` of the gradient penalty.
    """

    def __init__(
        self,
        *,
        noise_size: int = 128,
        losses: Losses = "logistic",
        paired: bool = False,
        critic_steps: int = 1,
        r1_weight: float = 0.0,
        r2_weight: float = 0.0,
        gp_weight: float = 0.0,
        penalty_every: int = 1,
        final_penalty: float = 1.0,
        final_step: int = 1,
        class_weight: float = 0.0,
        conditions: tuple[str, ...] = (),
        field: str = "image",
        augment: str | dict[str, Any] | None = None,
    ):
        """
        Args:
            noise_size: length of the generator's noise.
            losses: see `critic_losses`; `wasserstein` wants a critic whose slope is bounded: a penalty, or
                `networks.critic.optimizer.clip_weights: 0.01`.
            paired: relativistic: each answer to data is compared with that to a sample.
            critic_steps: updates of the critic for one of the generator.
            r1_weight: gamma of R1, gamma / 2 * |grad critic(x)|^2 at data.
            r2_weight: the same at samples.
            gp_weight: lambda of WGAN-GP, lambda * (|grad critic| - 1)^2 between data and samples.
            penalty_every: penalties are taken at every so many steps, and weigh so many times as much there (StyleGAN2, section 3.1).
            final_penalty: part of the penalties' weights that is left from `final_step` on; until then they fall as half a cosine (R3GAN).
            class_weight: of the critic's cross entropy of the class of data and of samples, and the generator's of its samples.
                Source: Odena et al. 2017, "Conditional Image Synthesis with Auxiliary Classifier GANs".
            conditions: batch fields that condition both networks.
            field: what the generator makes: pixels, or other floats.
            augment: how what the critic sees is changed at random, data and samples alike: see `processes.augmentations`. Penalties are
                of the images before. Draws, by name: `real`, `fake`, `mixed`, with what is drawn behind a dot.
        """
        counts = {
            "noise_size": noise_size,
            "critic_steps": critic_steps,
            "penalty_every": penalty_every,
            "final_step": final_step,
        }
        weights = {"r1_weight": r1_weight, "r2_weight": r2_weight, "gp_weight": gp_weight, "class_weight": class_weight}
        for name, value in {**counts, **weights}.items():
            if value < (least := int(name in counts)):
                raise UserError(f"objective.{name}: got {value}; expected at least {least}")
        if class_weight and LABEL not in conditions:
            raise UserError(
                f"objective.class_weight: got {class_weight} with conditions {list(conditions)}; the classes that the critic is to name "
                f"are told by the condition {LABEL}: add it, or set class_weight to 0"
            )
        self.noise_size, self.losses, self.paired, self.critic_steps = noise_size, losses, paired, critic_steps
        self.r1_weight, self.r2_weight, self.gp_weight, self.penalty_every = (
            r1_weight,
            r2_weight,
            gp_weight,
            penalty_every,
        )
        self.class_weight, self.conditions, self.field = class_weight, tuple(conditions), field
        self.final_penalty, self.final_step = final_penalty, final_step
        self.augment = None if augment is None else find_augmentation(augment)
        if self.augment is not None:
            self.kept.update(self.augment.first())
        self._signs: list[Tensor] = []  # of the global batch, see `Augmentation.after`
        self.needs_whole = ("critic",) if max(r1_weight, r2_weight, gp_weight) else ()

    @property
    def needs(self) -> Sequence[str]:
        return ("model", "critic")

    @property
    def fields(self) -> Sequence[str]:
        return (self.field, *self.conditions)

    def phases(self, step: int) -> Sequence[Phase]:
        critic = Phase("critic", trains="critic")
        # Pairs are with other data than the critic has just learned from, as in R3GAN's code.
        return (*[critic] * self.critic_steps, Phase("generator", trains="model", draws=self.paired))

    # ------------------------------------------------------------------------------------------- the two networks

    def _cond(self, given: Batch | Cond) -> dict[str, Tensor]:
        return {name: given[name] for name in self.conditions}

    def _data(self, batch: Batch) -> Tensor:
        return pixels_of(batch, self.field)

    def _drawn(self, nets: Nets, cond: Cond, rng: Rng) -> Tensor:
        x: Tensor = nets["model"](rng.normal("z", (self.noise_size,)), cond)
        return x.float()

    def _judged(self, nets: Nets, x: Tensor, cond: Cond) -> Judged:
        """What the critic says of data or samples: the only place that calls it."""
        said = nets["critic"](x, cond)
        answers, logits = said if isinstance(said, tuple) else (said, None)
        return Judged(answers.float(), None if logits is None else logits.float())

    def _seen(self, x: Tensor, name: str, rng: Rng, step: int) -> Tensor:
        """What the critic sees of data or samples while it trains."""
        return x if self.augment is None else self.augment.changed(x, rng, name, self.kept, step)

    def _misnamed(self, judged: Judged, cond: Cond) -> Tensor:
        """The mean cross entropy of the classes that the critic names.

        Raises:
            UserError: it names none.
        """
        if judged.logits is None:
            raise UserError(
                f"objective.class_weight: got {self.class_weight}, but networks.critic names no classes; expected a critic that returns "
                "answers and logits of classes, or class_weight: 0"
            )
        return F.cross_entropy(judged.logits, cond[LABEL])

    # ------------------------------------------------------------------------------------------- training

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over samples. Metrics of both phases: `loss`, and `class`, the cross entropy; of the critic also its mean answers `real` and
        `fake`, and the penalties `r1`, `r2`, `gp`, unweighted, in steps that take them."""
        cond = self._cond(batch)
        return (
            self._generator(nets, batch, cond, rng, step)
            if phase == "generator"
            else self._critic(nets, batch, cond, rng, step)
        )

    def _generator(self, nets: Nets, batch: Batch, cond: Cond, rng: Rng, step: int) -> Loss:
        fake = self._judged(nets, self._seen(self._drawn(nets, cond, rng), "fake", rng, step), cond)
        real = None
        if self.paired:
            with torch.no_grad():
                real = self._judged(nets, self._seen(self._data(batch), "real", rng, step), cond).answers
        total = generator_loss(self.losses, fake.answers, real).mean()
        metrics = {}
        if self.class_weight:
            metrics["class"] = self._misnamed(fake, cond)
            total = total + self.class_weight * metrics["class"]
        return _of(total, metrics)

    def _critic(self, nets: Nets, batch: Batch, cond: Cond, rng: Rng, step: int) -> Loss:
        penalised = step % self.penalty_every == 0
        x = self._data(batch).detach().requires_grad_(penalised and self.r1_weight > 0)
        with torch.no_grad():
            x_hat = self._drawn(nets, cond, rng)
        x_hat = x_hat.detach().requires_grad_(penalised and self.r2_weight > 0)
        real = self._judged(nets, self._seen(x, "real", rng, step), cond)
        fake = self._judged(nets, self._seen(x_hat, "fake", rng, step), cond)
        if self.augment is not None and self.augment.adapts:
            signs = real.answers.detach().sign().view(len(x), -1).mean(1).sum()
            self._signs.append(torch.stack([signs, torch.full_like(signs, len(x))]).double())
        total = critic_loss(self.losses, real.answers, fake.answers, paired=self.paired).mean()
        metrics = {"real": real.answers.mean(), "fake": fake.answers.mean()}
        if self.class_weight:
            metrics["class"] = self._misnamed(real, cond) + self._misnamed(fake, cond)
            total = total + self.class_weight * metrics["class"]
        if penalised:
            left = self.penalty_every * (1 + half_cosine(step, self.final_step) * (self.final_penalty - 1))
            for name, weight, penalty in self._penalties(nets, x, x_hat, real, fake, cond, rng, step):
                metrics[name] = penalty
                total = total + left * weight * penalty
        return _of(total, metrics)

    def _penalties(
        self, nets: Nets, x: Tensor, x_hat: Tensor, real: Judged, fake: Judged, cond: Cond, rng: Rng, step: int
    ) -> Iterator[tuple[str, float, Tensor]]:
        """Names, weights and means of the penalties that the recipe asks for."""
        if self.r1_weight:
            yield "r1", 0.5 * self.r1_weight, zero_centred(real.answers, x).mean()
        if self.r2_weight:
            yield "r2", 0.5 * self.r2_weight, zero_centred(fake.answers, x_hat).mean()
        if self.gp_weight:
            mixed = between(x, x_hat, rng.uniform("mix", (1,)))
            yield (
                "gp",
                self.gp_weight,
                one_centred(self._judged(nets, self._seen(mixed, "mixed", rng, step), cond).answers, mixed).mean(),
            )

    def after_phase(
        self, phase: str, nets: Nets, sum_over_ranks: SumOverRanks, rng: Rng, step: int
    ) -> Mapping[str, Tensor | tuple[Tensor, Tensor]]:
        """The probability of changes follows the critic's answers to the global batch; metrics of the critic: `augment_probability`."""
        seen, self._signs = self._signs, []
        if self.augment is None or phase != "critic":
            return {}
        if self.augment.adapts:
            self.kept.update(self.augment.after(self.kept, sum_over_ranks(torch.stack(seen).sum(0)), step))
        return self.augment.metrics(self.kept, step)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._signs = []

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """`loss`: the critic's of its answers on held-out data; `loss_zero`: that of a critic that always returns zero; each (B,)."""
        cond = self._cond(batch)
        real = self._judged(nets, self._data(batch), cond).answers
        fake = self._judged(nets, self._drawn(nets, cond, rng), cond).answers
        zero = torch.zeros_like(real)
        return {
            name: critic_loss(self.losses, *answers, paired=self.paired).view(len(real), -1).mean(1)
            for name, answers in (("loss", (real, fake)), ("loss_zero", (zero, zero)))
        }

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        """One forward, without steps or guidance."""
        takes: frozenset[Word] = frozenset({"prompt"}) if self.conditions else frozenset()
        return Draws(self.field, takes=takes, conditions=self.conditions, latent=Latent("z", (self.noise_size,)))

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        return self._cond(batch), replace(request, shape=tuple(batch[self.field].shape[1:]))

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """Samples (B, ...), of images (B, C, H, W) in [-1, 1], from noise `z`."""
        return Generated(self._drawn(nets, self._cond(cond), rng))
