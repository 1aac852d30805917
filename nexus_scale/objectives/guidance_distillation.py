"""Guidance distillation: a network that is told a guidance scale answers in one forward what its teacher answers in two.

Source: Meng et al. 2023, "On distillation of guided diffusion models", stage one; FLUX.1-dev is such a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Cond, Loss, Nets, Rng, UserError
from nexus_scale.objectives.answer_errors import by_time
from nexus_scale.objectives.denoising import EMBEDDED, NUM_BUCKETS, Denoising
from nexus_scale.processes.gaussian import add_noise, expand, network_input
from nexus_scale.processes.guidance import concatenate
from nexus_scale.processes.latents import LatentStats
from nexus_scale.processes.times import shift_time


class GuidanceDistillation(Denoising):
    """`model` learns, told `guidance` beside its conditions, what the frozen `teacher`, of the same path and target and told no scale,
    predicts under guidance. No condition is dropped: the teacher answers for what it is without them.

    Draws, by name: `posterior`, `noise`, `times`, `guidance`, `mirror`. What is drawn is Denoising's, at the cost of no guidance.
    """

    def __init__(
        self,
        *,
        path: str | Mapping[str, Any] = "rectified_flow",
        target: str = "velocity",
        times: str | Mapping[str, Any] = "logit_normal",
        time_shift: float | Mapping[str, Any] = 1.0,
        scales: tuple[float, float] = (1.0, 8.0),
        guidance: float = 4.0,
        conditions: tuple[str, ...] = ("text", "pooled"),
        input: Literal["moments", "image"] = "moments",
        mirror: bool = False,
        null: Literal["zeros", "empty"] = "zeros",
        latents: LatentStats | None = None,
        no_text: Mapping[str, Tensor] | None = None,
    ):
        """
        Args:
            path, target, times, time_shift: see `Denoising`; the first two are the teacher's.
            scales: the least and the largest guidance scale, drawn evenly; 1 is none.
            guidance: the scale that `nexus sample` tells the network unless it is asked for another.
            conditions, input, mirror, null, latents, no_text: see `Denoising`.
        """
        super().__init__(
            path=path, target=target, times=times, time_shift=time_shift, condition_drop=0.0, conditions=conditions,
            constants={EMBEDDED: guidance}, input=input, mirror=mirror, null=null, latents=latents, no_text=no_text,
        )  # fmt: skip
        if not scales[0] <= scales[1]:
            raise UserError(f"objective.scales: got {scales}; expected the smaller scale first")
        self.scales = scales

    @property
    def needs(self) -> Sequence[str]:
        return ("model", "teacher")

    def guided(self, teacher: Any, x_t: Tensor, t: Tensor, cond: Cond, scale: Tensor) -> Tensor:
        """The teacher's prediction under guidance, (B, C, ...), in one call."""
        x, time = network_input(self.path, x_t, t)
        both = teacher(torch.cat([x, x]), torch.cat([time, time]), concatenate(cond, self.null_condition(cond)))
        told, null = both.float().chunk(2)
        return null + expand(scale, x_t) * (told - null)

    def _distances(self, nets: Nets, x0: Tensor, eps: Tensor, t: Tensor, told: Cond, scale: Tensor) -> Tensor:
        """Squared differences of what the two predict, a mean of each sample, (B,)."""
        x_t = add_noise(self.path, x0, eps, t)
        plain = {name: value for name, value in told.items() if name != EMBEDDED}
        with torch.no_grad():
            wanted = self.guided(nets["teacher"], x_t, t, plain, scale)
        answer, _ = self._answer(nets, x_t, t, {**plain, EMBEDDED: scale})
        return (answer.float() - wanted).square().flatten(1).mean(1)

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean squared difference. Metrics: `loss`, and `loss_t0` .. `loss_t3`; see `Denoising`."""
        x0, eps = self.pair(batch, rng, train=True)
        t = shift_time(self.times.sample(rng), self.time_shift.of(x0.shape))
        low, high = self.scales
        scale = low + (high - low) * rng.uniform("guidance")
        apart = self._distances(nets, x0, eps, t, self.told_of(batch, rng, train=True), scale)
        total = apart.mean()
        return Loss(total, {"loss": total.detach(), **by_time(apart.detach(), self._bucket(t), NUM_BUCKETS)})

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """`loss`: the squared difference at the scale that is told by itself, a mean over eight fixed times; `loss_plain`: that of the
        teacher without guidance; each (B,)."""
        x0, eps = self.pair(batch, rng, train=False)
        told = self.condition(batch)
        plain = {name: value for name, value in told.items() if name != EMBEDDED}
        found: dict[str, list[Tensor]] = {"loss": [], "loss_plain": []}
        for time in self.validation_times().tolist():
            t = torch.full((len(x0),), time, device=x0.device)
            found["loss"].append(self._distances(nets, x0, eps, t, told, told[EMBEDDED]))
            x_t, one = add_noise(self.path, x0, eps, t), torch.ones_like(told[EMBEDDED])
            apart = self.guided(nets["teacher"], x_t, t, plain, told[EMBEDDED]) - self.guided(
                nets["teacher"], x_t, t, plain, one
            )
            found["loss_plain"].append(apart.square().flatten(1).mean(1))
        return {name: torch.stack(each).mean(0) for name, each in found.items()}
