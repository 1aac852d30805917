"""Norms with a weight and a bias of their own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nexus_scale.kernels.norms import layer_norm
from nexus_scale.models.layers.tags import KeepsTags, tag_param


class AffineNorm(KeepsTags, nn.Module):
    """Layer norm with weight and bias, (..., D)."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = tag_param(nn.Parameter(torch.ones(hidden_size)), decay=False)
        self.bias = tag_param(nn.Parameter(torch.zeros(hidden_size)), decay=False)

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class GroupNorm(KeepsTags, nn.GroupNorm):
    """Norm of each sample over the places and channels of a group, (B, C, H, W) -> (B, C, H, W); statistics in float32."""

    def __init__(self, channels: int, num_groups: int, eps: float):
        super().__init__(num_groups, channels, eps=eps)
        tag_param(self.weight, decay=False)
        tag_param(self.bias, decay=False)

    def init_weights(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)
