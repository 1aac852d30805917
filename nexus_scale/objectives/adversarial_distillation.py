"""Adversarial distillation ("turbo"): a student that draws in one to four steps what a critic cannot tell from data.

Source: Sauer et al. 2023, "Adversarial diffusion distillation" (times of the student, the teacher's target and its weight, and equation 4:
the penalty R1 on the heads' slopes at the features of data); Sauer et al. 2024, "Fast high-resolution image synthesis with latent
adversarial diffusion distillation" (a critic on noised latents by the teacher's own features).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Cond, Loss, Nets, Phase, Rng, UserError
from nexus_scale.objectives.conditions import at_time
from nexus_scale.objectives.critic_losses import Losses, critic_loss, generator_loss
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.gaussian import add_noise, network_input
from nexus_scale.processes.latents import LatentStats
from nexus_scale.processes.times import shift_time


class AdversarialDistillation(Denoising):
    """`model` learns to jump from x_t to data, at the times at which it draws; `critic` judges by the features of the frozen `teacher`, of
    the same path and target, whose answer to the noised jump the jump is drawn to besides.

    Draws, by name: `posterior`, `noise`, `student_time`, `times`, `renoise`, `mirror`. What is drawn is Denoising's, on a chain by sampler
    lcm with `timestep_scaling: 0`, on other paths by ode.
    """

    def __init__(
        self,
        *,
        path: str | Mapping[str, Any] = "rectified_flow",
        target: str = "velocity",
        times: str | Mapping[str, Any] = "logit_normal",
        time_shift: float | Mapping[str, Any] = 1.0,
        student_steps: int = 4,
        losses: Losses = "hinge",
        distillation_weight: float = 2.5,
        r1_weight: float = 1e-5,
        conditions: tuple[str, ...] = ("text", "pooled"),
        input: Literal["moments", "image"] = "moments",
        mirror: bool = False,
        null: Literal["zeros", "empty"] = "zeros",
        latents: LatentStats | None = None,
        no_text: Mapping[str, Tensor] | None = None,
    ):
        """
        Args:
            path, target, time_shift: the teacher's; see `Denoising`. times: at which the critic judges.
            student_steps: the student learns at so many times, evenly from t_max on: 1, 3/4, 1/2 and 1/4 of it.
            losses: see `critic_losses`.
            distillation_weight: lambda of the teacher's term, whose samples weigh alpha_t.
            r1_weight: gamma of R1, summed over heads; 0: none.
            conditions, input, mirror, null, latents, no_text: see `Denoising`.
        """
        super().__init__(
            path=path, target=target, times=times, time_shift=time_shift, condition_drop=0.0, conditions=conditions, input=input,
            mirror=mirror, null=null, latents=latents, no_text=no_text,
        )  # fmt: skip
        if student_steps < 1 or min(distillation_weight, r1_weight) < 0:
            raise UserError(
                f"objective.student_steps: got {student_steps} with distillation_weight {distillation_weight} and r1_weight {r1_weight}; "
                "expected at least 1, and 0"
            )
        self.student_steps, self.losses = student_steps, losses
        self.distillation_weight, self.r1_weight = distillation_weight, r1_weight

    @property
    def needs(self) -> Sequence[str]:
        return ("model", "teacher", "critic")

    def phases(self, step: int) -> Sequence[Phase]:
        return Phase("critic", trains="critic"), Phase("student", trains="model", draws=False)

    def jumped(self, nets: Nets, x0: Tensor, eps: Tensor, cond: Cond, rng: Rng) -> Tensor:
        """The student's data, from one of its times, (B, C, ...)."""
        number = (rng.uniform("student_time") * self.student_steps).long().clamp(max=self.student_steps - 1)
        s = shift_time(
            (self.student_steps - number).float() / self.student_steps * self.path.t_max, self.time_shift.of(x0.shape)
        )
        found, _ = self.predictor(nets, cond)(add_noise(self.path, x0, eps, s), s)
        return found

    def _answers(self, nets: Nets, x_t: Tensor, t: Tensor, cond: Cond, **asked: bool) -> Any:
        """The critic's, of each head (B, P); with `slopes=True` beside the squares of their slopes, (B,)."""
        x, time = network_input(self.path, x_t, t)
        return nets["critic"](x, time, at_time(cond, t), **asked)

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Means over samples, places and heads. Metrics: of both phases `loss`; of the critic its mean answers `real` and `fake`, and `r1`;
        of the student `adversarial` and `distillation`."""
        x0, eps = self.pair(batch, rng, train=True)
        cond = self.told_of(batch, rng, train=True)
        t = shift_time(self.times.sample(rng), self.time_shift.of(x0.shape))
        noise = rng.normal("renoise", x0.shape[1:])
        if phase == "critic":
            with torch.no_grad():
                made = self.jumped(nets, x0, eps, cond, rng)
            data = add_noise(self.path, x0, noise, t)
            if self.r1_weight:
                real, slopes = self._answers(nets, data, t, cond, slopes=True)
            else:
                real, slopes = self._answers(nets, data, t, cond), torch.zeros(len(x0), device=x0.device)
            fake = self._answers(nets, add_noise(self.path, made, noise, t), t, cond)
            total = torch.stack(
                [critic_loss(self.losses, one, other).mean() for one, other in zip(real, fake, strict=True)]
            ).mean()
            answers = {
                name: torch.stack([one.mean() for one in many]).mean()
                for name, many in (("real", real), ("fake", fake))
            }
            return _of(total + self.r1_weight * slopes.mean(), {**answers, "r1": slopes.mean()})
        made = self.jumped(nets, x0, eps, cond, rng)
        x_t = add_noise(self.path, made, noise, t)
        against = torch.stack(
            [generator_loss(self.losses, one).mean() for one in self._answers(nets, x_t, t, cond)]
        ).mean()
        with torch.no_grad():
            wanted, _ = self.predictor({"model": nets["teacher"]}, cond)(x_t.detach(), t)
        apart = (made - wanted).square().flatten(1).mean(1)
        taught = (self.path.alpha(t) * apart).mean()
        return _of(against + self.distillation_weight * taught, {"adversarial": against, "distillation": taught})

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """`loss`: mean squared distance of the student's jump out of noise from the teacher's answer to it, noised half way;
        `loss_zero`: that of an answer of zero; each (B,)."""
        x0, eps = self.pair(batch, rng, train=False)
        cond, ends = self.told_of(batch, rng, train=False), torch.full((len(x0),), self.path.t_max, device=x0.device)
        made, _ = self.predictor(nets, cond)(add_noise(self.path, x0, eps, ends), ends)
        half = ends / 2
        x_t = add_noise(self.path, made, rng.normal("renoise", x0.shape[1:]), half)
        wanted, _ = self.predictor({"model": nets["teacher"]}, cond)(x_t, half)
        return {
            "loss": (made - wanted).square().flatten(1).mean(1),
            "loss_zero": wanted.square().flatten(1).mean(1),
        }


def _of(total: Tensor, metrics: Mapping[str, Tensor]) -> Loss:
    return Loss(total, {"loss": total.detach(), **{name: value.detach() for name, value in metrics.items()}})
