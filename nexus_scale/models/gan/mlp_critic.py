"""A critic of points: a perceptron. The counterpart of `mlp_generator`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nexus_scale.contracts import Cond
from nexus_scale.models.gan.mlp_generator import Perceptron
from nexus_scale.models.layers.counts import check_counts


class MLPCritic(Perceptron):
    """Points (B, point_size) -> (B,), larger for real ones.

    Args:
        point_size: numbers of a point.
        hidden_size: units of each hidden layer.
        depth: hidden layers.
        spread: standard deviation of the data, which points are divided by.
    Raises:
        UserError: sizes below 1.
    """

    def __init__(self, *, point_size: int = 2, hidden_size: int = 512, depth: int = 3, spread: float = 1.0):
        counts = {"point_size": point_size, "hidden_size": hidden_size, "depth": depth}
        check_counts("mlp_critic", counts)
        super().__init__(point_size, 1, hidden_size, depth)
        self.point_size, self.spread = point_size, spread

    def forward(self, x: Tensor, cond: Cond) -> Tensor:
        return self.through(x / self.spread)[:, 0]

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        return torch.zeros(batch_size, self.point_size, device=device), {}
