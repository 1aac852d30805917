"""A generator of points from a vector of noise: a perceptron.

Source: the networks for mixtures in the plane of WGAN-GP's public code (igul222/improved_wgan_training, gan_toy.py), whose units are ReLU;
SiLU here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network
from nexus_scale.models.layers import init
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.linear import Linear


class Layer(nn.Module):
    """silu(x W^T + b), (B, in_features) -> (B, out_features): smooth, since a gradient penalty differentiates it twice."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.linear = Linear(in_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.linear(x))


class Perceptron(Network):
    """Vectors (B, in_features) -> (B, out_features), through `depth` layers of `hidden_size` units."""

    def __init__(self, in_features: int, out_features: int, hidden_size: int, depth: int):
        super().__init__()
        self.middle = nn.ModuleList()
        for i in range(depth):
            self.middle.append(Layer(hidden_size if i else in_features, hidden_size))
        self.last = Linear(hidden_size, out_features)

    def init_weights(self) -> None:
        for layer in self.middle:
            assert isinstance(layer, Layer)
            nn.init.kaiming_normal_(layer.linear.weight, nonlinearity="relu")
            nn.init.zeros_(layer.linear.bias)
        init.xavier_(self.last)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.middle)

    def through(self, x: Tensor) -> Tensor:
        for layer in self.middle:
            x = layer(x)
        return self.last(x)


class MLPGenerator(Perceptron):
    """Noise (B, noise_size) -> points (B, point_size).

    Args:
        noise_size: length of the noise.
        point_size: numbers of a point.
        hidden_size: units of each hidden layer.
        depth: hidden layers.
        spread: standard deviation of the data, which points are scaled by.
    Raises:
        UserError: sizes below 1.
    """

    def __init__(
        self,
        *,
        noise_size: int = 16,
        point_size: int = 2,
        hidden_size: int = 512,
        depth: int = 3,
        spread: float = 1.0,
    ):
        counts = {"noise_size": noise_size, "point_size": point_size, "hidden_size": hidden_size, "depth": depth}
        check_counts("mlp_generator", counts)
        super().__init__(noise_size, point_size, hidden_size, depth)
        self.noise_size, self.spread = noise_size, spread

    def forward(self, z: Tensor, cond: Cond) -> Tensor:
        return self.through(z) * self.spread

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        return torch.zeros(batch_size, self.noise_size, device=device), {}
