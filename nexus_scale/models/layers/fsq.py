"""Finite scalar quantisation: each of a few numbers is rounded to one of its levels, so that there is no book to learn or to collapse.

Source: Mentzer et al. 2023, "Finite Scalar Quantization: VQ-VAE Made Simple", section 3 and appendix A.1, with the shift and the margin of
lucidrains' vector-quantize-pytorch, whose numbers these are (the paper's code has tan for atanh, and a margin of the other sign).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nexus_scale.contracts import UserError
from nexus_scale.kernels.transfer import constant

MARGIN = 1e-3


class Rounded(NamedTuple):
    """latents: (B, d, T) as rounded, with the gradient of what came in; codes: (B, T, 1) int64; commitment: (B,), zero."""

    latents: Tensor
    codes: Tensor
    commitment: Tensor


class FSQ(nn.Module):
    """d numbers of L levels each: codes of 0..prod(L) - 1, the first number changing fastest.

    Args:
        levels: of each number, at least 3; the paper recommends (8, 6, 5), (8, 5, 5, 5) and (7, 5, 5, 5, 5) for 2^8, 2^10 and 2^12 codes.
    Raises:
        UserError: fewer levels.
    """

    def __init__(self, levels: Sequence[int]):
        super().__init__()
        if not levels or min(levels) < 3:
            raise UserError(f"levels: got {tuple(levels)}; expected at least 3 of each number, such as (8, 5, 5, 5)")
        self.levels = tuple(levels)

    @property
    def codebook_size(self) -> int:
        return math.prod(self.levels)

    def forward(self, z: Tensor) -> Rounded:
        """z (B, d, T), rounded to levels in [-1, 1]."""
        levels, basis = self._constants(z)
        half, offset = (levels - 1) * (1 + MARGIN) / 2, (levels % 2 == 0) * 0.5
        bounded = torch.tanh(z.float() + torch.atanh(offset / half)) * half - offset
        places = bounded.round().detach()
        rounded = (places + (bounded - bounded.detach())) / (levels // 2)
        codes = ((places + levels // 2) * basis).sum(1).long()  # (B, T)
        return Rounded(rounded.to(z.dtype), codes.unsqueeze(-1), z.new_zeros(len(z), dtype=torch.float32))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, T, 1) -> rounded latents (B, d, T)."""
        levels, basis = (value.long() for value in self._constants(codes))
        places = codes.transpose(1, 2) // basis % levels  # (B, d, T)
        return (places - levels // 2) / (levels // 2).float()

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Levels, and how many codes a step of each number is; (d, 1) float32 each."""
        steps = [math.prod(self.levels[:i]) for i in range(len(self.levels))]
        levels, basis = (
            constant(tuple(map(float, values)), torch.float32, like.device) for values in (self.levels, steps)
        )
        return levels.view(-1, 1), basis.view(-1, 1)

    @torch.no_grad()
    def follow(
        self, seen: Sequence[Any], sum_over_ranks: Callable[[Tensor], Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Learns nothing. Returns `perplexity`, exp of the entropy of the codes of the global batch. A collective.

        Args:
            seen: this rank's micro-batches, with `codes` (B, T, 1).
        """
        codes = torch.cat([one.codes.flatten() for one in seen]).sort().values
        edges = torch.searchsorted(codes, torch.arange(self.codebook_size + 1, device=codes.device))
        shares = sum_over_ranks(edges.diff().double())
        return {"perplexity": torch.special.entr(shares / shares.sum()).sum().exp()}

    def extra_repr(self) -> str:
        return f"levels={self.levels}, {self.codebook_size} codes"
