"""A mixture of Gaussians, whose density, score and best denoiser are known at every noise level: data with a known answer.

A test that holds an objective, a sampler or a likelihood against it needs no training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_scale.contracts import Cond, Predictor
from nexus_scale.processes.gaussian import coefficients, expand
from nexus_scale.processes.paths import EDM, Path

Level = float | Tensor
"""alpha or sigma: a number, or one for each sample (B,)."""


@dataclass(frozen=True)
class Mixture:
    """Samples (B, *shape), of D = prod(shape) values. Everything is computed in float64, and given back in the type of x.

    Attributes:
        weights: (K,), adding up to 1.
        means: (K, D).
        covariances: (K, D, D).
        shape: of a sample; () is (D,).
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    shape: tuple[int, ...] = ()

    # ------------------------------------------------------------------------------------------------- the data

    def draw(self, count: int, seed: int = 0) -> Tensor:
        """Samples, (count, *shape) float32."""
        generator = torch.Generator().manual_seed(seed)
        which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        white = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        roots = torch.linalg.cholesky(self.covariances)
        x = self.means[which] + torch.einsum("bij,bj->bi", roots[which], white)
        return x.reshape(count, *(self.shape or x.shape[1:])).float()

    @property
    def mean(self) -> Tensor:
        """(D,)."""
        return self.weights @ self.means

    @property
    def covariance(self) -> Tensor:
        """(D, D)."""
        centred = self.means - self.mean
        within = torch.einsum("k,kij->ij", self.weights, self.covariances)
        return within + torch.einsum("k,ki,kj->ij", self.weights, centred, centred)

    # ------------------------------------------------------------------------------------------ at a noise level

    def _parts(self, x: Tensor, alpha: Level, sigma: Level) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of x = alpha x0 + sigma eps: alpha (B, 1, 1); by component, in the axes of its covariance, the distance from its mean
        (B, K, D), its variances of x0 (K, D) and of x (B, K, D), and the logarithm of its weighted density (B, K)."""
        rows = x.double().flatten(1)
        alpha, sigma = (
            torch.as_tensor(level, dtype=torch.float64).expand(len(x))[:, None, None] for level in (alpha, sigma)
        )
        clean, axes = torch.linalg.eigh(self.covariances)
        distance = torch.einsum("bki,kij->bkj", rows[:, None] - alpha * self.means, axes)
        noisy = alpha**2 * clean + sigma**2
        exponent = -0.5 * (distance.square() / noisy + torch.log(2 * math.pi * noisy)).sum(-1)
        return alpha, distance, clean, noisy, self.weights.log() + exponent

    def log_density(self, x: Tensor, alpha: Level = 1.0, sigma: Level = 0.0) -> Tensor:
        """Of x = alpha x0 + sigma eps, in nats, (B,) float64."""
        return self._parts(x, alpha, sigma)[-1].logsumexp(-1)

    def posterior_mean(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """E[x0 | alpha x0 + sigma eps = x], (B, *shape)."""
        alpha, distance, clean, noisy, logs = self._parts(x, alpha, sigma)
        _, axes = torch.linalg.eigh(self.covariances)
        each = self.means + torch.einsum("bkj,kij->bki", alpha * clean / noisy * distance, axes)
        return torch.einsum("bk,bki->bi", logs.softmax(-1), each).reshape(x.shape).to(x.dtype)

    def score(self, x: Tensor, alpha: Level, sigma: Level) -> Tensor:
        """The gradient of `log_density` in x, (B, *shape)."""
        _, distance, _, noisy, logs = self._parts(x, alpha, sigma)
        _, axes = torch.linalg.eigh(self.covariances)
        each = torch.einsum("bkj,kij->bki", -distance / noisy, axes)
        return torch.einsum("bk,bki->bi", logs.softmax(-1), each).reshape(x.shape).to(x.dtype)

    # ----------------------------------------------------------------------------------- what a network would answer

    def predictor(self, path: Path) -> Predictor:
        """`denoise(x_t, t) -> (x0, eps)`, both the expectations given x_t: what the samplers want. At sigma_t = 0, eps is 0."""

        def denoise(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            alpha, sigma = path.alpha(t.double()), path.sigma(t.double())
            x0 = self.posterior_mean(x.double(), alpha, sigma)
            eps = -expand(sigma, x) * self.score(x.double(), alpha, sigma)
            return x0.to(x.dtype), eps.to(x.dtype)

        return denoise

    def network(self, path: Path, target: str) -> Callable[[Tensor, Tensor, Cond], Tensor]:
        """`network(x, t, cond)`: the least squared error of `target` on `path`, a*E[x0 | x_t] + b*E[eps | x_t], for what objectives give a
        network (`network_input`: on EDM's path x is c_in * x_t, and t is c_noise)."""
        denoise = self.predictor(path)

        def network(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
            x_t, time = x.double(), t.double()
            if isinstance(path, EDM):
                time = torch.exp(4 * time)
                x_t = x_t / expand(path.preconditioning(time).c_in, x)
            x0, eps = denoise(x_t, time)
            a, b = coefficients(path, target, time)
            return (expand(a, x) * x0 + expand(b, x) * eps).to(x.dtype)

        return network


def three_in_a_plane() -> Mixture:
    """Three Gaussians in the plane, none round, of mean and covariance that are not those of noise; samples are (2, 1, 1) images."""
    means = torch.tensor([[-1.2, 0.4], [0.9, 0.8], [0.3, -1.1]], dtype=torch.float64)
    tilted = torch.tensor(
        [[[0.10, 0.06], [0.06, 0.08]], [[0.05, -0.03], [-0.03, 0.12]], [[0.2, 0.0], [0.0, 0.03]]], dtype=torch.float64
    )
    return Mixture(torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), means, tilted, (2, 1, 1))
