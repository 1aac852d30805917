"""How probable a decoder finds pixels: what it says of each value, and log p(x | z) of it in nats.

All take the mean as a logit: the mean of a pixel in [0, 1] is its sigmoid (Kingma & Welling 2014, appendix C). Scales are in shares of the
pixels' range. Source: Kingma et al. 2016 and Salimans et al. 2017 (discretised logistic); Rybkin et al. 2021 (a learned deviation and
its soft floor).
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 256
LOWEST = -6.0
"""Of the log of a learned Gaussian deviation, softly: a density of pixels on levels would otherwise grow without bound."""
LOWEST_LOGISTIC = -7.0
"""Of the log of a logistic's scale, as PixelCNN++ has it: a quarter of a level."""


class Likelihood(Protocol):
    """A distribution of pixels given what a decoder says of them.

    Attributes:
        numbers: how many the decoder says of each value; on channels, one after another.
        bits_of_level: what is added to bits of its density for bits of pixels on 256 levels; None: it knows no levels.
    """

    numbers: int
    bits_of_level: float | None

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        """log p(x | z) of each sample in nats, (B,) float32: out (B, numbers * C, H, W), x (B, C, H, W) in [0, 1]."""
        ...

    def mean(self, out: Tensor) -> Tensor:
        """The mean pixels in [0, 1], (B, C, H, W)."""
        ...


class Bernoulli:
    """Pixels that are black or white; of grey ones, each level as the share of white (a bound on no likelihood of levels)."""

    numbers = 1

    def __init__(self, *, binary: bool):
        self.bits_of_level = 0.0 if binary else None

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(out, x, reduction="none").flatten(1).sum(1)

    def mean(self, out: Tensor) -> Tensor:
        return out.sigmoid()


class Gaussian:
    """A density over [0, 1]: of one deviation `std`, or where it is None of one that the decoder says for each value.

    `dequantised`: levels were made continuous by noise of one level, so that its bits bound those of levels (Theis et al. 2016).
    """

    def __init__(self, std: float | None, *, dequantised: bool):
        self.std, self.numbers = std, 2 if std is None else 1
        self.bits_of_level = math.log2(LEVELS) if dequantised else None

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        if self.std is None:
            out, log_std = out.chunk(2, dim=1)
            log_std = LOWEST + F.softplus(log_std - LOWEST)
            error = (x - out.sigmoid()) * torch.exp(-log_std)
            return -(0.5 * error.square() + log_std + 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        error = (x - out.sigmoid()) / self.std
        constant = x[0].numel() * (math.log(self.std) + 0.5 * math.log(2 * math.pi))
        return -0.5 * error.square().flatten(1).sum(1) - constant

    def mean(self, out: Tensor) -> Tensor:
        return out[:, : out.shape[1] // self.numbers].sigmoid()


class Logistic:
    """Pixels on 256 levels, each with the mass of a logistic over its bin; the first and the last bin reach to infinity."""

    numbers = 2
    bits_of_level: float | None = 0.0

    def log_prob(self, out: Tensor, x: Tensor) -> Tensor:
        out, log_scale = out.chunk(2, dim=1)
        log_scale = LOWEST_LOGISTIC + F.softplus(log_scale - LOWEST_LOGISTIC)
        inverse, half = torch.exp(-log_scale), 0.5 / (LEVELS - 1)
        centred = x - out.sigmoid()
        above, below = (centred + half) * inverse, (centred - half) * inverse
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), without the difference of two near numbers
        inside = F.logsigmoid(above) + F.logsigmoid(-below) + torch.log(-torch.expm1(-2 * half * inverse))
        mass = torch.where(x < half, F.logsigmoid(above), torch.where(x > 1 - half, F.logsigmoid(-below), inside))
        return mass.flatten(1).sum(1)

    def mean(self, out: Tensor) -> Tensor:
        return out[:, : out.shape[1] // 2].sigmoid()
