"""MeanFlow: a network that predicts the average velocity between two times, so that one step leads from noise to data.

The average velocity u of a flow from t back to r satisfies u = v - (t - r) du/dt, where v is the velocity at t and du/dt the change of u
along the flow. The network learns the right side, with its own du/dt.

du/dt is a central difference of two forwards without gradients. Forward-mode differentiation, which the paper has, passes no fused
attention, no kernel with a gradient of its own, no compiled block and no hook of a sharded network; it costs as much.

Source: Geng et al. 2025, "Mean Flows for One-step Generative Modeling"; Gsunshine/meanflow and py-meanflow. The difference: Wang et al.
2025, "Transition Models", section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import Batch, Cond, Loss, Nets, NoiseSampler, Rng, UserError
from nexus_scale.kernels.random import replayed
from nexus_scale.kernels.transfer import constant
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.gaussian import add_noise, expand
from nexus_scale.processes.latents import LatentStats
from nexus_scale.processes.times import find_times

SPAN = "span"
"""The condition that tells the network t - r."""


class MeanFlow(Denoising):
    """`model`, which is told `span`, t - r, beside its conditions. A span of 0 asks for the velocity itself.

    Draws, by name: those of Denoising, and `earlier`, `apart`. What is drawn walks the grid of sampler ode, one jump a step.
    """

    def __init__(
        self,
        *,
        times: str | Mapping[str, Any] = "logit_normal",
        earlier: str | Mapping[str, Any] | None = None,
        apart: Annotated[float, Field(ge=0, le=1)] = 0.25,
        power: Annotated[float, Field(ge=0, le=10)] = 1.0,
        offset: Annotated[float, Field(gt=0, le=1e6)] = 0.01,
        omega: Annotated[float, Field(ge=0, le=100)] = 1.0,
        kappa: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        interval: tuple[float, float] = (0.0, 1.0),
        spacing: Annotated[float, Field(gt=0, le=0.1)] = 0.005,
        condition_drop: float | Mapping[str, float] = 0.1,
        conditions: tuple[str, ...] = ("label",),
        input: Literal["moments", "image"] = "moments",
        mirror: bool = False,
        latents: LatentStats | None = None,
    ):
        """
        Args:
            times, earlier: distributions of t and r. Without `earlier` both are drawn from `times`, and t is the later one; with it r is
                at most t.
            apart: probability that r differs from t; the others learn the velocity itself.
            power, offset: a sample's squared error e, summed over its values, is divided by (e + offset)^power.
            omega, kappa: velocities under guidance are learned, omega v + kappa v_cond + (1 - omega - kappa) v_null of the network's own
                two, which is a scale of omega / (1 - kappa); 1 and 0: none. Needs `condition_drop`.
            interval: times at which they are; elsewhere v.
            spacing: of the two times of the difference that is du/dt, from t to each. Rounding of the network's answers is divided by it:
                in bfloat16 that is noise in du/dt, whose cost in training was not measured; float32 has none to speak of.
            condition_drop, conditions, input, mirror, latents: see `Denoising`.
        """
        super().__init__(
            path="rectified_flow", target="velocity", times=times, condition_drop=condition_drop, conditions=conditions, input=input,
            mirror=mirror, latents=latents,
        )  # fmt: skip
        self.earlier = None if earlier is None else find_times(earlier)
        if interval[0] > interval[1]:
            raise UserError(f"objective.interval: got {interval}; expected the earlier time first")
        if (omega, kappa) == (1.0, 0.0) and tuple(interval) != (0.0, 1.0):
            raise UserError(
                f"objective.interval: got {interval} without guidance, which is learned where omega is not 1 or kappa not 0; set omega, or "
                "leave interval out"
            )
        if (omega, kappa) != (1.0, 0.0) and not (conditions and self.condition_drop.drops):
            raise UserError(
                f"objective.omega: got {omega} with kappa {kappa}, which need conditions that training drops; set condition_drop to 0.1"
            )
        self.apart, self.power, self.offset, self.spacing = apart, power, offset, spacing
        self.omega, self.kappa, self.interval = omega, kappa, interval
        self.grid: tuple[float, ...] = ()

    # ------------------------------------------------------------------------------------------------- training

    def spans(self, rng: Rng) -> tuple[Tensor, Tensor]:
        """t and r of each sample, r <= t, (B,) float32 each."""
        t = self.times.sample(rng)
        other = (self.earlier or self.times).quantile(rng.uniform("earlier").double()).float()
        later, r = (t, torch.minimum(t, other)) if self.earlier else (torch.maximum(t, other), torch.minimum(t, other))
        return later, torch.where(rng.uniform("apart") < self.apart, r, later)

    def change(self, u: Callable[[Tensor, Tensor], Tensor], z: Tensor, t: Tensor, v: Tensor) -> Tensor:
        """du/dt along the flow at (z, t), where it moves with v, (B, ...)."""
        h = self.spacing
        with torch.no_grad():
            ahead, behind = (self._again(u, z + side * h * v, t + side * h) for side in (1, -1))
        return (ahead - behind) / (2 * h)

    def _again(self, u: Callable[[Tensor, Tensor], Tensor], z: Tensor, t: Tensor) -> Tensor:
        with replayed(z.device):  # dropout leaves out the same
            return u(z, t)

    def guided(self, nets: Nets, z: Tensor, t: Tensor, v: Tensor, cond: Cond) -> Tensor:
        """The velocity under guidance, (B, ...): v itself where there is none."""
        if (self.omega, self.kappa) == (1.0, 0.0):
            return v
        with torch.no_grad():
            mixed = self.omega * v + (1 - self.omega - self.kappa) * self._own(nets, z, t, self.null_condition(cond))
            if self.kappa:
                mixed = mixed + self.kappa * self._own(nets, z, t, cond)
        inside = (t >= self.interval[0]) & (t <= self.interval[1])
        return torch.where(expand(inside, v), mixed, v)

    def _own(self, nets: Nets, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """The network's own velocity."""
        with replayed(z.device):
            return self._answer(nets, z, t, cond)[0].float()

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over samples of the weighted squared error. Metrics: `loss`; `mse`, per value, and `velocity_mse`, that of u from v."""
        x0, eps = self.pair(batch, rng, train=True)
        t, r = self.spans(rng)
        told = self.condition(batch)
        cond = self.condition_drop(told, rng)
        z, v = add_noise(self.path, x0, eps, t), eps - x0
        goal = self.guided(nets, z, t, v, told)
        if "drop" in cond:  # who is told nothing is not guided
            goal = torch.where(expand(cond["drop"], v), v, goal)

        def u(z: Tensor, t: Tensor) -> Tensor:
            return self._answer(nets, z, t, {**cond, SPAN: t - r})[0].float()

        target = goal - expand(t - r, z) * self.change(u, z, t, goal)
        answer = u(z, t)
        squared = (answer - target).square().flatten(1).sum(1)
        total = (squared / (squared.detach() + self.offset) ** self.power).mean()
        plain = {"mse": squared.mean() / x0[0].numel(), "velocity_mse": (answer - v).square().mean()}
        return Loss(total, {"loss": total.detach(), **{name: value.detach() for name, value in plain.items()}})

    # ----------------------------------------------------------------------------------------------- generation

    def _answer(self, nets: Nets, x_t: Tensor, t: Tensor, cond: Cond) -> tuple[Tensor, Tensor | None]:
        """The average velocity over the condition `span`; without one, from t to the grid's next time, or the velocity itself."""
        if SPAN not in cond:
            cond = {**cond, SPAN: t - self._next(t) if self.grid else torch.zeros_like(t)}
        return super()._answer(nets, x_t, t, cond)

    def _next(self, t: Tensor) -> Tensor:
        """The latest time of the grid before t, (B,)."""
        grid = constant(self.grid, t.dtype, t.device)
        return grid[(torch.searchsorted(grid, t.contiguous()) - 1).clamp(min=0)]

    def _walked(
        self, nets: Nets, sampler: NoiseSampler, guidance: Any, given: Cond, null: Cond, noise: Tensor, *others: Any
    ) -> Tensor:
        """Euler's steps of average velocities are jumps."""
        if getattr(sampler, "method", "") != "euler" or not hasattr(sampler, "times"):
            raise UserError(
                f"a mean flow jumps between the times of sampler ode with method euler; got {type(sampler).__name__}"
            )
        walking = copy.copy(self)
        walking.grid = tuple(sampler.times(self.path, noise.shape).flip(0).tolist())
        return Denoising._walked(walking, nets, sampler, guidance, given, null, noise, *others)
