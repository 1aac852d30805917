"""Latent consistency models: a network that is told a guidance scale, and jumps from any x_t to the data that its guided teacher leads to.

It learns to agree with itself: its answer at a time of the chain, with that of a moving average of its weights `skip` steps earlier,
where a step of DDIM with the frozen teacher, guided by the same scale, leads to.

Source: Luo et al. 2023, "Latent Consistency Models"; diffusers' train_lcm_distill_sd_wds.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Cond, Loss, Nets, Rng, UserError
from nexus_scale.objectives.denoising import EMBEDDED, Denoising
from nexus_scale.processes.chains import Chain
from nexus_scale.processes.distances import pseudo_huber
from nexus_scale.processes.gaussian import add_noise, expand
from nexus_scale.processes.guidance import concatenate
from nexus_scale.processes.latents import LatentStats

SIGMA_DATA = 0.5
STABLE_DIFFUSION = {"name": "scaled_linear", "zero_terminal_snr": False}


class LatentConsistency(Denoising):
    """`model` learns and is told `guidance` beside its conditions; `target` is a moving average of it that computes, and `teacher` is a
    frozen denoiser of the same path and target, which is told no guidance scale.

    Draws, by name: `posterior`, `noise`, `times`, `guidance`, `mirror`, `drop`. What is drawn is Denoising's, by sampler lcm.
    """

    def __init__(
        self,
        *,
        path: str | Mapping[str, Any] | None = None,
        target: str = "eps",
        skip: int = 20,
        scales: tuple[float, float] = (3.0, 15.0),
        guidance: float = 8.5,
        timestep_scaling: float = 10.0,
        distance: Literal["huber", "l2"] = "huber",
        huber: float = 0.001,
        condition_drop: float | Mapping[str, float] = 0.0,
        conditions: tuple[str, ...] = ("text",),
        input: Literal["moments", "image"] = "moments",
        mirror: bool = False,
        null: Literal["zeros", "empty"] = "zeros",
        latents: LatentStats | None = None,
        no_text: Mapping[str, Tensor] | None = None,
    ):
        """
        Args:
            path, target: the teacher's; a chain's, Stable Diffusion's unless given.
            skip: steps of the chain that one step of the teacher spans, a divisor of its length.
            scales: the least and the largest guidance scale, drawn evenly; 1 is none. The paper's w, from 2 to 14, is one less.
            guidance: the scale that `nexus sample` tells the network unless it is asked for another.
            timestep_scaling: how fast the share of x_t in the answer falls with the step of the chain.
            distance: `huber`, sqrt(d^2 + huber^2) - huber, or `l2`; means over all values.
            condition_drop, conditions, input, mirror, null, latents, no_text: see `Denoising`.
        """
        super().__init__(
            path=path or STABLE_DIFFUSION, target=target, times="discrete", condition_drop=condition_drop, conditions=conditions,
            constants={EMBEDDED: guidance}, input=input, mirror=mirror, null=null, latents=latents, no_text=no_text,
        )  # fmt: skip
        if not isinstance(self.path, Chain):
            raise UserError(f"objective.path: got {self.path}; expected a chain of steps, such as scaled_linear")
        self.chain = self.path.steps
        if not 1 <= skip <= self.chain or self.chain % skip:
            raise UserError(f"objective.skip: got {skip} of a chain of {self.chain} steps; expected a divisor of it")
        if not scales[0] <= scales[1] or min(timestep_scaling, huber) <= 0:
            raise UserError(
                f"objective.scales: got {scales} with timestep_scaling {timestep_scaling} and huber {huber}; expected the smaller "
                "scale first, and the others above 0"
            )
        self.skip, self.scales, self.timestep_scaling = skip, scales, timestep_scaling
        self.loss_kind, self.huber = distance, huber

    @property
    def needs(self) -> Sequence[str]:
        return ("model", "target", "teacher")

    def boundary(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out, the shares of x_t and of the network's x0 in its answer, (B,) each: 1 and 0 at the first step of the chain."""
        scaled = (t * self.chain - 1).round() * self.timestep_scaling
        total = scaled.square() + SIGMA_DATA**2
        return SIGMA_DATA**2 / total, scaled / total.sqrt()

    def answer(self, network: Any, x_t: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """f(x_t, t), the data that x_t leads to."""
        x0, _ = self.predictor({"model": network}, cond)(x_t, t)
        c_skip, c_out = self.boundary(t)
        return expand(c_skip, x_t) * x_t + expand(c_out, x_t) * x0

    def _earlier(self, teacher: Any, x_t: Tensor, t: Tensor, s: Tensor, cond: Cond, scale: Tensor) -> Tensor:
        """x_s, by a step of DDIM with the teacher's guided prediction."""
        both = self.predictor({"model": teacher}, concatenate(cond, self.null_condition(cond)))
        pairs = (value.chunk(2) for value in both(torch.cat([x_t, x_t]), torch.cat([t, t]))[:2])
        x0, eps = (null + expand(scale, x_t) * (told - null) for told, null in pairs)
        return add_noise(self.path, x0, eps, s)

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over all values. Metrics: `loss`."""
        x0, eps = self.pair(batch, rng, train=True)
        told = self.condition(batch)
        low, high = self.scales
        scale = low + (high - low) * rng.uniform("guidance")
        jumps = self.chain // self.skip
        number = 1 + (rng.uniform("times") * jumps).long().clamp(max=jumps - 1)  # (B,), 1 .. jumps
        t = number.float() * self.skip / self.chain
        s = ((number - 1) * self.skip).clamp(min=1).float() / self.chain
        cond = self.condition_drop({**told, EMBEDDED: scale}, rng)
        plain = {name: value for name, value in cond.items() if name != EMBEDDED}

        x_t = add_noise(self.path, x0, eps, t)
        with torch.no_grad():
            goal = self.answer(nets["target"], self._earlier(nets["teacher"], x_t, t, s, plain, scale), s, cond)
        squared = (self.answer(nets["model"], x_t, t, cond) - goal).square()
        total = (squared if self.loss_kind == "l2" else pseudo_huber(squared, self.huber)).mean()
        return Loss(total, {"loss": total.detach()})

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """`loss`: mean squared error of the answer to the last step of the chain, where x_t is nearly noise; `loss_zero`: that of an answer
        of zero; each (B,)."""
        x0, eps = self.pair(batch, rng, train=False)
        last = torch.ones(len(x0), device=x0.device)
        made = self.answer(nets["model"], add_noise(self.path, x0, eps, last), last, self.condition(batch))
        return {"loss": (made - x0).square().flatten(1).mean(1), "loss_zero": x0.square().flatten(1).mean(1)}
