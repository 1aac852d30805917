"""Layers whose weights are divided by their largest singular value, so that no layer stretches a vector: torch's `spectral_norm`.

The singular vectors are state. They take one power iteration for each optimizer step, however many micro-batches and passes it has, as in
algorithm 1 of the paper; torch's parametrization takes one in every forward, so that both agree where a step has one.

Source: Miyato et al. 2018, "Spectral Normalization for Generative Adversarial Networks".
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.models.layers import linear
from nexus_scale.models.layers.tags import KeepsTags, tag_param

EPS = 1e-12
FIRST_ITERATIONS = 15
"""Power iterations on first weights, as many as torch's parametrization takes."""


class SpectralNormed(nn.Module):
    """What such a layer has beside its weight (N, ...), which it makes before this one's constructor runs."""

    weight: Tensor
    left: Tensor
    right: Tensor
    next_vectors: Tensor

    def add_vectors(self) -> None:
        rows, columns = self.weight.flatten(1).shape
        self.register_buffer("left", torch.zeros(rows))
        self.register_buffer("right", torch.zeros(columns))
        # of this step's weights; zero before they computed
        self.register_buffer("next_vectors", torch.zeros(rows + columns), persistent=False)

    def normed(self) -> Tensor:
        """weight / sigma. The gradient goes through sigma = left^T W right, in which both vectors are constants."""
        matrix = self.weight.flatten(1).float()
        left, right = self.left, self.right
        if self.training:
            with torch.no_grad():
                left, right = iterated(matrix, right)
                self.next_vectors.copy_(torch.cat([left, right]))
        sigma = torch.dot(left, torch.mv(matrix, right))
        return self.weight / sigma.to(self.weight.dtype)

    def seen(self) -> Tensor:
        """Nothing: all ranks have the same weights."""
        return self.next_vectors[:0]

    @torch.no_grad()
    def follow(self, total: Tensor) -> None:
        there = self.next_vectors.isfinite().all() & self.next_vectors.any()
        parts = self.next_vectors.split([len(self.left), len(self.right)])
        for held, after in zip((self.left, self.right), parts, strict=True):
            held.copy_(torch.where(there, after, held))
        self.next_vectors.zero_()

    @torch.no_grad()
    def init_vectors(self) -> None:
        """Singular vectors of the first weights, from random ones."""
        nn.init.zeros_(self.next_vectors)
        right = F.normalize(torch.randn_like(self.right), dim=0, eps=EPS)
        for _ in range(FIRST_ITERATIONS):
            left, right = iterated(self.weight.flatten(1), right)
        self.left.copy_(left)
        self.right.copy_(right)


def iterated(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration: matrix (N, K), the right vector (K,) -> left (N,), right (K,)."""
    left = F.normalize(torch.mv(matrix, right), dim=0, eps=EPS)
    return left, F.normalize(torch.mv(matrix.T, left), dim=0, eps=EPS)


class Conv2d(SpectralNormed, linear.Conv2d):
    """A convolution that keeps height and width, or divides them by its stride, rounded up."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3):
        super().__init__(in_channels, out_channels, kernel_size)
        self.add_vectors()

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.normed(), self.bias, padding=self.padding)


class Linear(SpectralNormed, linear.Linear):
    """y = x W^T + b over the last dim."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True):
        super().__init__(in_features, out_features, bias=bias)
        self.add_vectors()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.normed(), self.bias)


class Embedding(SpectralNormed, KeepsTags):
    """A row for each class: label (B,) -> (B, D)."""

    def __init__(self, num_classes: int, hidden_size: int):
        super().__init__()
        self.weight = tag_param(nn.Parameter(torch.empty(num_classes, hidden_size)), decay=False)
        self.add_vectors()

    def forward(self, label: Tensor) -> Tensor:
        return F.embedding(label, self.normed())
