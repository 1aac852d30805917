"""Consistency models: one network that maps any noisy x_t to the data it came from, so that one step draws a sample.

It learns to agree with itself: its answer at a noise level, with that of a moving average of its weights at the level below, on one path.
The level below is reached with the true noise (training), or with a step of a frozen denoiser (distillation).

Source: Song et al. 2023, "Consistency models"; pseudo-Huber distance and the doubling of scales: Song & Dhariwal 2024, "Improved techniques
for training consistency models".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
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
    UserError,
    Word,
)
from nexus_scale.kernels.transfer import to_device
from nexus_scale.processes.gaussian import expand, network_input, recover
from nexus_scale.processes.paths import EDM
from nexus_scale.processes.pixels import pixels_of


class Consistency(Objective):
    """`model` learns, `target` is a moving average of it that computes (`{average_of: model, ...}`), and with `distils` `teacher` is a
    frozen denoiser on EDM's path, of target edm. All are called as `network(x, c_noise, cond)`.

    Draws, by name: `noise`, `times`; in generation `noise`, and `noise_1`, ... where there are more steps.
    """

    def __init__(
        self,
        *,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        sigma_data: float = 0.5,
        rho: float = 7.0,
        scales: int = 18,
        scales_end: int | None = None,
        double_every: int = 0,
        huber: float = 0.00054,
        distils: bool = False,
        sigmas: tuple[float, ...] = (),
        conditions: tuple[str, ...] = (),
    ):
        """
        Args:
            sigma_min, sigma_max, rho: the noise levels of a scale of N are spaced as in EDM.
            scales: N at the first step.
            double_every: steps after which N is doubled, up to `scales_end`; 0: never.
            huber: c = huber * sqrt(values of a sample), of the distance sqrt(d^2 + c^2) - c.
            distils: whether a teacher gives the way to the level below.
            sigmas: levels below sigma_max to which samples are noised again, each for one more step.
            conditions: batch fields that condition the networks.
        """
        if not 0 < sigma_min < sigma_max or min(sigma_data, rho, huber) <= 0:
            raise UserError(
                f"objective: got sigma_min {sigma_min}, sigma_max {sigma_max}, sigma_data {sigma_data}, rho {rho}, huber {huber}; expected "
                "0 < sigma_min < sigma_max and all others above 0"
            )
        if scales < 2 or double_every < 0 or (scales_end is not None and scales_end < scales):
            raise UserError(
                f"objective.scales: got {scales}, scales_end {scales_end}, double_every {double_every}; expected at least 2, at least as "
                "many at the end, and 0 or more"
            )
        if any(not sigma_min < sigma < sigma_max for sigma in sigmas):
            raise UserError(f"objective.sigmas: got {sigmas}; expected numbers between {sigma_min} and {sigma_max}")
        self.path = EDM(t_max=sigma_max, sigma_data=sigma_data)
        self.sigma_min, self.rho, self.huber, self.distils = sigma_min, rho, huber, distils
        self.scales, self.scales_end, self.double_every = scales, scales_end or scales, double_every
        self.sigmas, self.conditions = tuple(sorted(sigmas, reverse=True)), tuple(conditions)

    @property
    def needs(self) -> Sequence[str]:
        return ("model", "target", "teacher") if self.distils else ("model", "target")

    @property
    def fields(self) -> Sequence[str]:
        return ("image", *self.conditions)

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("main", trains="model"),)

    def scales_at(self, step: int) -> int:
        """N at a step."""
        doubled = self.scales * 2 ** min(step // self.double_every, 40) if self.double_every else self.scales
        return min(doubled, self.scales_end)

    def levels(self, scales: int) -> Tensor:
        """The noise levels of a scale, (N,), from sigma_min up. Source: Karras et al. 2022, equation 5."""
        low, high = self.sigma_min ** (1 / self.rho), self.path.t_max ** (1 / self.rho)
        return (low + torch.linspace(0, 1, scales) * (high - low)) ** self.rho

    def answer(self, network: Any, x_t: Tensor, sigma: Tensor, cond: Cond) -> Tensor:
        """f(x_t, sigma), the data that x_t came from: x_t itself at sigma_min. Source: Song et al. 2023, appendix C."""
        y = network(*network_input(self.path, x_t, sigma), cond).float()
        data = self.path.sigma_data
        c_skip = data**2 / ((sigma - self.sigma_min).square() + data**2)
        c_out = data * (sigma - self.sigma_min) / (sigma.square() + data**2).sqrt()
        return expand(c_skip, x_t) * x_t + expand(c_out, x_t) * y

    def _below(self, nets: Nets, x0: Tensor, eps: Tensor, x_t: Tensor, high: Tensor, low: Tensor, cond: Cond) -> Tensor:
        """The same path at the lower level: with the true noise, or by a step of Heun's method with the teacher."""
        if not self.distils:
            return x0 + expand(low, x0) * eps

        def slope(x: Tensor, sigma: Tensor) -> Tensor:
            y = nets["teacher"](*network_input(self.path, x, sigma), cond).float()
            return recover(x, y, "edm", self.path, sigma)[1]

        step = expand(low - high, x_t)
        first = slope(x_t, high)
        return x_t + step * 0.5 * (first + slope(x_t + step * first, low))

    def _distances(self, nets: Nets, batch: Batch, rng: Rng, scales: int) -> Tensor:
        """The pseudo-Huber distance between the predictions at two neighbouring levels, weighted by 1 / (their difference), (B,)."""
        x0, cond = pixels_of(batch, "image"), self._cond(batch)
        levels = to_device(self.levels(scales), x0.device)
        lower = (rng.uniform("times") * (scales - 1)).long().clamp(max=scales - 2)
        low, high, eps = levels[lower], levels[lower + 1], rng.normal("noise", x0.shape[1:])
        x_t = x0 + expand(high, x0) * eps
        with torch.no_grad():
            goal = self.answer(nets["target"], self._below(nets, x0, eps, x_t, high, low, cond), low, cond)
        squared = (self.answer(nets["model"], x_t, high, cond) - goal).square().flatten(1).sum(1)
        c = self.huber * x0[0].numel() ** 0.5
        return ((squared + c**2).sqrt() - c) / (high - low)

    def _cond(self, given: Batch | Cond) -> dict[str, Tensor]:
        return {name: given[name] for name in self.conditions}

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over samples. Metrics: `loss`, `scales`."""
        scales = self.scales_at(step)
        total = self._distances(nets, batch, rng, scales).mean()
        return Loss(total, {"loss": total.detach(), "scales": torch.tensor(float(scales))})

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """`loss`: mean squared error of one step from the highest level of noise; `loss_zero`: that of a prediction of zero; each (B,)."""
        x0 = pixels_of(batch, "image")
        made = self._one_step(nets, rng.normal("noise", x0.shape[1:]) * self.path.t_max + x0, self._cond(batch))
        return {"loss": (made - x0).square().flatten(1).mean(1), "loss_zero": x0.square().flatten(1).mean(1)}

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        """One forward more than there are `sigmas`; no sampler and no guidance."""
        takes: frozenset[Word] = frozenset({"prompt"}) if self.conditions else frozenset()
        return Draws("image", takes=takes, conditions=self.conditions)

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        return self._cond(batch), replace(request, shape=tuple(batch["image"].shape[1:]))

    def _one_step(self, nets: Nets, x_t: Tensor, cond: Cond, sigma: float | None = None) -> Tensor:
        level = torch.full((len(x_t),), self.path.t_max if sigma is None else sigma, device=x_t.device)
        return self.answer(nets["model"], x_t, level, cond)

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """Images (B, C, H, W). Source: Song et al. 2023, algorithm 1."""
        told = self._cond(cond)
        x = self._one_step(nets, rng.normal("noise", request.shape) * self.path.t_max, told)
        for number, sigma in enumerate(self.sigmas, start=1):
            spread = (sigma**2 - self.sigma_min**2) ** 0.5
            x = self._one_step(nets, x + spread * rng.normal(f"noise_{number}", request.shape), told, sigma)
        return Generated(x)
