"""Discrete chains of noising steps, from their betas, made continuous: step i in 0 .. steps - 1 is the time t = (i + 1) / steps, and
t = 0 is clean data, which the papers' steps leave out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.kernels.transfer import made_on

ChainSteps = Annotated[int, Field(ge=1, le=10**6)]
Beta = Annotated[float, Field(gt=0, lt=1)]
Ratio = Annotated[float, Field(gt=0, le=1e6)]


@lru_cache(maxsize=32)
def _table(chain: Chain) -> Tensor:
    """alpha, or log alpha of a chain that is logarithmic, at steps 0 (data) .. `steps`, (steps + 1,) float64."""
    if chain.is_logarithmic:
        return torch.cat([torch.zeros(1, dtype=torch.float64), torch.log1p(-chain.betas()).cumsum(0)]) / 2
    alpha_bar = torch.cumprod(1 - chain.betas(), 0)
    alpha = (alpha_bar / (chain.snr_shift + (1 - chain.snr_shift) * alpha_bar)).sqrt()
    if chain.zero_terminal_snr:
        alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return torch.cat([torch.ones(1, dtype=torch.float64), alpha])


@dataclass(frozen=True, kw_only=True)
class Chain:
    """A variance-preserving path through a chain's steps; alpha is linear between them.

    Args:
        steps: of the chain.
        snr_shift: the signal-to-noise ratio of every step is divided by it (CogVideoX-2B: 3).
        zero_terminal_snr: alpha is rescaled, the first step's kept, so that the last step is noise alone, where eps does not determine
            x0: predict v.
    Source: Esser et al. 2024 (the shift); Lin et al. 2023, algorithm 1 (zero terminal SNR).
    """

    steps: ChainSteps = 1000
    snr_shift: Ratio = 1.0
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1 or self.snr_shift <= 0 or (self.zero_terminal_snr and self.steps < 2):
            raise UserError(
                f"path: got {self}; expected snr_shift above 0 and at least 1 step, 2 with zero_terminal_snr"
            )

    def betas(self) -> Tensor:
        """The variance that each step adds, (steps,) float64."""
        raise NotImplementedError

    @property
    def is_logarithmic(self) -> bool:
        """Whether it is the logarithm of alpha that is linear between the steps."""
        return False

    @property
    def t_max(self) -> float:
        return 1.0

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, 1 - alpha^2 and d alpha / dt in float64: differences of a float32 table would lose three digits."""
        table = made_on(_table, (self,), t.device)
        place = t.double() * self.steps
        left = place.floor().clamp(0, self.steps - 1).long()
        slope = table[left + 1] - table[left]
        value, slope = table[left] + (place - left) * slope, slope * self.steps
        if self.is_logarithmic:
            return value.exp(), -torch.expm1(2 * value), value.exp() * slope
        return value, 1 - value.square(), slope

    def alpha(self, t: Tensor) -> Tensor:
        return self._at(t)[0].to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return self._at(t)[1].clamp_min(0).sqrt().to(t.dtype)

    def alpha_dot(self, t: Tensor) -> Tensor:
        return self._at(t)[2].to(t.dtype)

    def sigma_dot(self, t: Tensor) -> Tensor:
        alpha, square, slope = self._at(t)
        return (-alpha * slope / square.clamp_min(0).sqrt()).to(t.dtype)


@dataclass(frozen=True, kw_only=True)
class _Rising(Chain):
    """A chain whose betas rise from `beta_start` to `beta_end`."""

    beta_start: Beta = 1e-4
    beta_end: Beta = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(f"path: got {self}; expected 0 < beta_start <= beta_end < 1")


@dataclass(frozen=True, kw_only=True)
class DDPMLinear(_Rising):
    """DDPM's linear betas; log alpha is linear between the steps, unless alpha is shifted or rescaled.

    Source: Ho et al. 2020, section 4 (beta from 1e-4 to 0.02 in 1000 steps).
    """

    def betas(self) -> Tensor:
        return torch.linspace(self.beta_start, self.beta_end, self.steps, dtype=torch.float64)

    @property
    def is_logarithmic(self) -> bool:
        return not self.zero_terminal_snr and self.snr_shift == 1


@dataclass(frozen=True, kw_only=True)
class ScaledLinear(_Rising):
    """Latent diffusion's betas, whose square roots are linear; `zero_terminal_snr` unless switched off, as CogVideoX has it (Stable
    Diffusion 1 and 2: false).

    Source: Rombach et al. 2022.
    """

    beta_start: Beta = 0.00085
    beta_end: Beta = 0.012
    zero_terminal_snr: bool = True

    def betas(self) -> Tensor:
        return torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.steps, dtype=torch.float64).square()


@dataclass(frozen=True, kw_only=True)
class DDPMCosine(Chain):
    """Improved DDPM's chain on the squared cosine, whose betas are cut at `max_beta`: without the cut the last one is 1, alpha is 0
    there, and a step back from it divides by zero. `vp_cosine` is the same without steps.

    Source: Nichol & Dhariwal 2021, equation 17 and below.
    """

    s: Annotated[float, Field(gt=0, le=1)] = 0.008
    max_beta: Beta = 0.999

    def betas(self) -> Tensor:
        places = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
        alpha_bar = torch.cos((places + self.s) / (1 + self.s) * math.pi / 2).square()
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp_max(self.max_beta)


@dataclass(frozen=True, kw_only=True)
class DDPMSigmoid(_Rising):
    """Betas on a sigmoid over [-6, 6], from about `beta_start` to about `beta_end`.

    Source: Xu et al. 2022, "GeoDiff" (their code); `sigmoid` in diffusers.
    """

    def betas(self) -> Tensor:
        places = torch.sigmoid(torch.linspace(-6, 6, self.steps, dtype=torch.float64))
        return places * (self.beta_end - self.beta_start) + self.beta_start
