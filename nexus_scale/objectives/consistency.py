"""Consistency models: one network that maps any noisy x_t to the data it came from, so that one step draws a sample.

It learns to agree with itself: its answer at a noise level, with that of a moving average of its weights at the level below, on one path.
The level below is reached with the true noise (training), or with a step of a frozen denoiser (distillation).

Source: Song et al. 2023, "Consistency models" (CD, CT), and openai/consistency_models; Song & Dhariwal 2024, "Improved techniques for
training consistency models" (iCT: no average, pseudo-Huber distance, log-normal levels, doubling intervals).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import (
    Batch,
    Cond,
    Draws,
    Generated,
    Guidance,
    Loss,
    Nets,
    NoiseSampler,
    Objective,
    Phase,
    Predictor,
    Request,
    Rng,
    Sampler,
    UserError,
    Word,
)
from nexus_scale.kernels.random import ProgressRng, replayed
from nexus_scale.kernels.transfer import made_on
from nexus_scale.processes.gaussian import expand, network_input, recover
from nexus_scale.processes.paths import EDM
from nexus_scale.processes.pixels import mirrored, pixels_of
from nexus_scale.processes.sigmas import scales_at
from nexus_scale.processes.times import LogNormal, Uniform, find_times

DISTANCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "pseudo_huber": lambda d, c: (d.square().flatten(1).sum(1) + c**2).sqrt() - c,
    "l2": lambda d, c: d.square().flatten(1).mean(1),
    "l1": lambda d, c: d.abs().flatten(1).mean(1),
}
"""Of a difference (B, ...) and c of pseudo-Huber's, (B,)."""

PERCEIVED, LEAST = 224, 256
"""LPIPS sees images of fewer than 256 pixels a side at 224, as in openai/consistency_models."""

WEIGHTS: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "difference": lambda distance, high, low, data: distance / (high - low),
    "uniform": lambda distance, high, low, data: distance,
    "snr": lambda distance, high, low, data: distance / high.square(),
    "snr_plus_one": lambda distance, high, low, data: distance * (high**-2 + 1),
    "truncated_snr": lambda distance, high, low, data: distance * (high**-2).clamp(min=1),
    "karras": lambda distance, high, low, data: distance * (high**-2 + data**-2),
}
"""A distance weighted by its two levels (B,) and sigma_data: iCT's, and those of openai/consistency_models by its names."""


@lru_cache(maxsize=64)
def _levels(count: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + torch.linspace(0, 1, count, device="cpu") * (high - low)) ** rho


@lru_cache(maxsize=64)
def _shares(count: int, sigma_min: float, sigma_max: float, rho: float, mean: float, std: float) -> Tensor:
    """How much of a log-normal between the lowest and the highest level lies below each level but the lowest, (N - 1,) float64."""
    z = (_levels(count, sigma_min, sigma_max, rho).double().log() - mean) / (std * math.sqrt(2))
    below = torch.special.erf(z)
    return (below[1:] - below[0]) / (below[-1] - below[0])


class Consistency(Objective):
    """`model` learns; `target` is a moving average of it that computes (`{average_of: model, ...}`), but with `target: model`, where it is
    its own; with `distils` `teacher` is a frozen denoiser on EDM's path, of target edm. All are called as `network(x, c_noise, cond)`.

    Draws, by name: `noise`, `times`, `mirror`; in generation `noise`, and `noise_1`, ... where there are more steps, or a sampler's.
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
        growth: Literal["doubling", "doubling_intervals", "square_root"] = "doubling",
        double_every: int = 0,
        growth_steps: int = 0,
        times: str | Mapping[str, Any] = "uniform",
        target: Literal["average", "model"] = "average",
        distance: Literal["pseudo_huber", "l2", "l1", "lpips"] = "pseudo_huber",
        huber: float = 0.00054,
        weight: Literal["difference", "uniform", "snr", "snr_plus_one", "truncated_snr", "karras"] = "difference",
        distils: bool = False,
        sigmas: tuple[float, ...] | None = (),
        clip: bool = False,
        mirror: bool = False,
        conditions: tuple[str, ...] = (),
    ):
        """
        Args:
            sigma_min, sigma_max, rho: the N noise levels are spaced as in EDM.
            scales, scales_end: s0 and s1 of the papers, from which and to which N grows.
            growth: `doubling`: N is scales, doubled every `double_every` steps (0: never); `doubling_intervals`: N - 1 is (iCT's, who
                doubles at equal parts of the run); `square_root`: the square of N grows evenly over `growth_steps` (CT's).
            times: which of the pairs of neighbouring levels a sample is noised to: `uniform`, or {name: log_normal, mean: -1.1, std: 2.0},
                each as often as that distribution of sigma has it between them (iCT's).
            target: `average`: the network called `target` answers at the level below; `model`: the network itself, with the same dropout.
            distance: `pseudo_huber`, sqrt(d^2 + c^2) - c of the whole sample; `l2` and `l1`, means over its values; `lpips`, for which
                `networks.perceptual` is a frozen lpips.
            huber: c = huber * sqrt(values of a sample).
            weight: `difference`: 1 / (difference of the two levels); others by the higher one, as openai/consistency_models calls them.
            distils: whether a teacher gives the way to the level below, by one step of Heun's method.
            sigmas: levels below sigma_max to which samples are noised again, each for one more step; null: `sample:` names a sampler,
                which is given the answer as x0.
            clip: keep what is drawn in [-1, 1], at every step.
            mirror: flip each training sample left to right with probability 1/2.
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
        if (growth == "square_root") != (growth_steps > 0) or (growth == "square_root" and double_every):
            raise UserError(
                f"objective.growth: got {growth} with growth_steps {growth_steps} and double_every {double_every}; expected growth_steps, "
                "the steps of the run, with square_root alone, and double_every without it"
            )
        if (scales_end or scales) != scales and growth != "square_root" and not double_every:
            raise UserError(
                f"objective.scales_end: got {scales_end} with growth {growth}, which needs double_every, the steps after which the number "
                "of scales doubles; set it, or leave scales_end out"
            )
        if any(not sigma_min < sigma < sigma_max for sigma in sigmas or ()):
            raise UserError(f"objective.sigmas: got {sigmas}; expected numbers between {sigma_min} and {sigma_max}")
        self.times = find_times(times)
        if not isinstance(self.times, Uniform | LogNormal):
            raise UserError(f"objective.times: got {times}; expected uniform or log_normal")
        self.path = EDM(t_max=sigma_max, sigma_data=sigma_data)
        self.sigma_min, self.rho, self.huber, self.distils = sigma_min, rho, huber, distils
        self.scales, self.scales_end = scales, scales_end or scales
        self.growth, self.double_every, self.growth_steps = growth, double_every, growth_steps
        self.target, self.distance, self.weight = target, distance, WEIGHTS[weight]
        self.sigmas = None if sigmas is None else tuple(sorted(sigmas, reverse=True))
        self.clip, self.mirror, self.conditions = clip, mirror, tuple(conditions)

    @property
    def needs(self) -> Sequence[str]:
        wanted = {"target": self.target == "average", "teacher": self.distils, "perceptual": self.distance == "lpips"}
        return ("model", *(name for name, needed in wanted.items() if needed))

    @property
    def fields(self) -> Sequence[str]:
        return ("image", *self.conditions)

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("main", trains="model"),)

    def scales_at(self, step: int) -> int:
        """N at a step."""
        if self.growth == "square_root":
            return scales_at(step / self.growth_steps, self.scales, self.scales_end)
        doubled = self.scales * 2 ** min(step // self.double_every, 40) if self.double_every else self.scales
        return min(doubled, self.scales_end) + (self.growth == "doubling_intervals")

    def levels(self, scales: int) -> Tensor:
        """The noise levels of a scale, (N,), from sigma_min up. Source: Karras et al. 2022, equation 5."""
        return _levels(scales, *self._spaced)

    @property
    def _spaced(self) -> tuple[float, float, float]:
        return self.sigma_min, self.path.t_max, self.rho

    def _pairs(self, rng: Rng, scales: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two neighbouring levels for each sample, the higher first; (B,) each."""
        u = rng.uniform("times")
        if isinstance(self.times, LogNormal):
            shares = made_on(_shares, (scales, *self._spaced, self.times.mean, self.times.std), device)
            lower = torch.searchsorted(shares, u.double(), right=True).clamp(max=scales - 2)
        else:
            lower = (u * (scales - 1)).long().clamp(max=scales - 2)
        levels = made_on(_levels, (scales, *self._spaced), device)
        return levels[lower + 1], levels[lower]

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

    def _distances(self, nets: Nets, x0: Tensor, cond: Cond, rng: Rng, scales: int) -> Tensor:
        """The weighted distance between the answers at two neighbouring levels, (B,)."""
        (high, low), eps = self._pairs(rng, scales, x0.device), rng.normal("noise", x0.shape[1:])
        x_t = x0 + expand(high, x0) * eps
        # a network that is its own target leaves out the same, if it has dropout
        with torch.no_grad(), replayed(x0.device) if self.target == "model" else nullcontext():
            below = self._below(nets, x0, eps, x_t, high, low, cond)
            goal = self.answer(nets["target" if self.target == "average" else "model"], below, low, cond)
        distance = self._distance(nets, self.answer(nets["model"], x_t, high, cond), goal)
        return self.weight(distance, high, low, self.path.sigma_data)

    def _distance(self, nets: Nets, answer: Tensor, goal: Tensor) -> Tensor:
        """(B,); gradients flow to the answer."""
        if self.distance != "lpips":
            return DISTANCES[self.distance](answer - goal, self.huber * goal[0].numel() ** 0.5)
        if goal.shape[-1] < LEAST:
            answer, goal = (F.interpolate(x, size=PERCEIVED, mode="bilinear") for x in (answer, goal))
        seen: Tensor = nets["perceptual"](goal, answer)
        return seen

    def _cond(self, given: Batch | Cond) -> dict[str, Tensor]:
        return {name: given[name] for name in self.conditions}

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over samples. Metrics: `loss`, `scales`."""
        scales = self.scales_at(step)
        x0 = pixels_of(batch, "image")
        if self.mirror:
            x0 = mirrored(x0, rng)
        total = self._distances(nets, x0, self._cond(batch), rng, scales).mean()
        return Loss(total, {"loss": total.detach(), "scales": torch.tensor(float(scales))})

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """`loss`: mean squared error of one step from the highest level of noise; `loss_zero`: that of a prediction of zero; each (B,)."""
        x0 = pixels_of(batch, "image")
        made = self._one_step(nets, rng.normal("noise", x0.shape[1:]) * self.path.t_max + x0, self._cond(batch))
        return {"loss": (made - x0).square().flatten(1).mean(1), "loss_zero": x0.square().flatten(1).mean(1)}

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        """One forward more than there are `sigmas`, or a sampler's; no guidance."""
        takes: set[Word] = {"prompt", "label"} if self.conditions else set()
        if self.sigmas is None:
            return Draws(
                "image", takes=frozenset({*takes, "sampler", "steps"}), conditions=self.conditions, walks="denoise"
            )
        return Draws("image", takes=frozenset(takes), conditions=self.conditions)

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        return self._cond(batch), replace(request, shape=tuple(batch["image"].shape[1:]))

    def predictor(self, nets: Nets, cond: Cond) -> Predictor:
        """`denoise(x_t, sigma) -> (x0, eps)`: x0 is the network's answer, and eps the noise that x_t then has."""

        def denoise(x_t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            x0 = self.answer(nets["model"], x_t, sigma, cond)
            x0 = x0.clamp(-1, 1) if self.clip else x0
            return x0, (x_t - x0) / expand(sigma, x_t)

        return denoise

    def _one_step(self, nets: Nets, x_t: Tensor, cond: Cond, sigma: float | None = None) -> Tensor:
        level = torch.full((len(x_t),), self.path.t_max if sigma is None else sigma, device=x_t.device)
        return self.predictor(nets, cond)(x_t, level)[0]

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """Images (B, C, H, W). Source: Song et al. 2023, algorithm 1."""
        told, noise = self._cond(cond), rng.normal("noise", request.shape)
        if self.sigmas is None:
            sampler = cast(NoiseSampler, self.sampler_of(request))
            steps = lambda step, t, x, x0: request.progress(step, sampler.steps)  # noqa: E731
            return Generated(sampler.sample(self.predictor(nets, told), noise, path=self.path, rng=rng, callback=steps))
        x = self._one_step(nets, noise * self.path.t_max, told)
        for number, sigma in enumerate(self.sigmas, start=1):
            spread = (sigma**2 - self.sigma_min**2) ** 0.5
            x = self._one_step(nets, x + spread * rng.normal(f"noise_{number}", request.shape), told, sigma)
        return Generated(x)

    def misfit(self, sampler: Sampler, guidance: Guidance) -> str | None:
        """Tries the sampler with a network that answers zero."""
        if guidance.scale != 1:
            return f"a consistency model is not guided; got guidance {guidance.scale}: leave it at 1"
        rng = ProgressRng(0, 0, "draw", torch.arange(2), torch.device("cpu"))
        nets = {"model": lambda x, t, cond: torch.zeros_like(x)}
        try:
            x = self.generate(
                nets, {name: torch.zeros(2) for name in self.conditions}, Request((3, 8, 8), sampler=sampler), rng
            )
        except (UserError, ValueError, ArithmeticError, RuntimeError) as error:
            return str(error)
        return None if bool(x.samples.isfinite().all()) else "what is drawn is not finite"
