"""One step back from t to an earlier s: the posterior q(x_s | x_t, x0), learned variances, and the variational term.

Source: Ho et al. 2020, equations 6 and 7; Nichol & Dhariwal 2021, "Improved DDPM", equations 14 to 16 and section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_scale.processes.gaussian import expand
from nexus_scale.processes.paths import Path

SUBSTEPS = 1024
"""Times are float32 and hold a thousandth to 6e-5; steps are counted to the nearest 1/1024, so that whole ones are whole."""

PIXEL = 2 / 255
"""Width of one of the 256 values of a byte that was scaled to [-1, 1]."""


@dataclass(frozen=True)
class Reverse:
    """q(x_s | x_t, x0) = N(to_x0 * x0 + to_x_t * x_t, exp(log_small)); each (B,) float32.

    `log_small` is the least log-variance of a reverse step, -inf at s = 0; `log_large`, that of q(x_t | x_s), the largest.
    """

    to_x0: Tensor
    to_x_t: Tensor
    log_small: Tensor
    log_large: Tensor

    def mean(self, x0: Tensor, x_t: Tensor) -> Tensor:
        """Of x_s, (B, ...)."""
        return expand(self.to_x0, x0) * x0 + expand(self.to_x_t, x_t) * x_t


def reverse(path: Path, s: Tensor, t: Tensor) -> Reverse:
    """The step from t to s on any path; s < t, (B,) each.

    Computed in float64: the variance of a step is a difference of nearly equal numbers.
    """
    s, t = s.double(), t.double()
    alpha_s, sigma_s, alpha_t, sigma_t = path.alpha(s), path.sigma(s), path.alpha(t), path.sigma(t)
    ratio = alpha_t / alpha_s
    large = sigma_t.square() - (ratio * sigma_s).square()
    small = large * (sigma_s / sigma_t).square()
    values = alpha_s * large / sigma_t.square(), ratio * (sigma_s / sigma_t).square(), small.log(), large.log()
    return Reverse(*(value.float() for value in values))


def step_before(t: Tensor, steps: int) -> Tensor:
    """t - 1 / steps, (B,) float64, and exactly 0 for times of the first step."""
    count = (t.double() * (steps * SUBSTEPS)).round() / SUBSTEPS
    return (count - 1).clamp_min(0) / steps


def learned_log_variance(v: Tensor, log_small: Tensor, log_large: Tensor) -> Tensor:
    """Log-variance interpolated between its bounds (B,) by v (B, ...): -1 is the small one, 1 the large one.

    Source: Nichol & Dhariwal 2021, equation 15, with v scaled to [-1, 1] as in their code.
    """
    share = (v + 1) / 2
    return share * expand(log_large, v) + (1 - share) * expand(log_small, v)


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(other_mean, exp(other_log_variance))) in nats, elementwise."""
    return 0.5 * (
        other_log_variance
        - log_variance
        - 1.0
        + torch.exp(log_variance - other_log_variance)
        + (mean - other_mean).square() * torch.exp(-other_log_variance)
    )


def byte_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log-probability in nats, elementwise, that a normal number falls on the byte x, where the lowest and the highest of the
    256 values reach to infinity. x is a byte scaled to [-1, 1]."""
    width = torch.exp(-0.5 * log_variance)
    up, down = (torch.special.ndtr((x - mean + side * PIXEL / 2) * width) for side in (1, -1))
    inside = torch.where(x > 0.999, 1 - down, up - down)
    return torch.where(x < -0.999, up, inside).clamp_min(1e-12).log()


def variational_term(path: Path, steps: int, x0: Tensor, x_t: Tensor, x0_hat: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The term of the variational bound at the step that t lies on, in bits per value, (B,) float32.

    KL of the true posterior from the predicted one, N(mean(x0_hat, x_t), variance that v learns); at the first step the
    negative log-likelihood of x0 as bytes. DiT's code has the latter for latents, too; so has this.

    Args:
        steps: of the discrete chain; the step is that from t to t - 1 / steps.
        x0, x_t: clean and noised sample, (B, ...).
        x0_hat: predicted clean sample; detach it where the term shall teach the variance alone.
        v: as the network gives it, (B, ...), see `learned_log_variance`.
    """
    s = step_before(t, steps)
    step = reverse(path, s, t)
    first = s == 0
    # at the first step the posterior has no width; that of the second bounds the variance there, as in Improved DDPM's code
    second = reverse(path, torch.full_like(s[:1], 1 / steps), torch.full_like(s[:1], 2 / steps))
    log_small = torch.where(first, second.log_small, step.log_small)
    log_variance = learned_log_variance(v, log_small, step.log_large)
    mean = step.mean(x0_hat, x_t)
    kl = normal_kl(step.mean(x0, x_t), expand(log_small, x0), mean, log_variance)
    nll = -byte_log_likelihood(x0, mean, log_variance)
    nats = torch.where(expand(first, x0), nll, kl)
    return nats.flatten(1).mean(1) / math.log(2)
