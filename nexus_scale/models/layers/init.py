"""Initialisation, from torch's global generator. A network's `init_weights` is a table of these.

| layer                      | distribution                                                       |
| -------------------------- | ------------------------------------------------------------------ |
| matrices                   | Xavier uniform, zero bias (DiT)                                    |
| time and pooled-text MLPs  | N(0, 0.02^2), zero bias (DiT)                                      |
| adaLN modulations, outputs | zero: each block starts as the identity (adaLN-Zero)               |
| convolutions               | Kaiming normal for the activation behind them, zero bias           |
| layers of latent diffusion | uniform within 1 / sqrt(fan in), biases too: torch's default       |
| layers of a U-Net          | uniform, variance 2 / (fan in + fan out), zero bias (DDPM)         |
| norms                      | one                                                                |
"""

from __future__ import annotations

import math

from torch import nn

from nexus_scale.models.layers.linear import Conv2d, Linear


def xavier_(layer: Linear | Conv2d) -> None:
    nn.init.xavier_uniform_(layer.weight.flatten(1) if layer.weight.dim() > 2 else layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def normal_(layer: Linear, std: float = 0.02) -> None:
    nn.init.normal_(layer.weight, std=std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def fan_average_(layer: Linear | Conv2d) -> None:
    """The fans of a convolution count the places of its kernel, as in DDPM's code."""
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def kaiming_(layer: Conv2d) -> None:
    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def zero_(layer: Linear | Conv2d) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def uniform_(layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d) -> None:
    bound = 1 / math.sqrt(layer.weight[0].numel())
    nn.init.uniform_(layer.weight, -bound, bound)
    if layer.bias is not None:
        nn.init.uniform_(layer.bias, -bound, bound)
