"""Spans of a sequence that are hidden, for a network that fills them in from what is left.

Source: Le et al. 2023, "Voicebox: Text-Guided Multilingual Universal Speech Generation at Scale", section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nexus_scale.contracts import Rng, UserError


@dataclass(frozen=True, kw_only=True)
class Spans:
    """Of each sample one span is hidden: a share of its places, drawn evenly between `least` and `most`, somewhere; or all of them, with
    probability `whole`. Draws one name.
    """

    least: float = 0.7
    most: float = 1.0
    whole: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.least <= self.most <= 1 or not 0 <= self.whole <= 1:
            raise UserError(
                f"a gap: got {self}; expected shares with 0 < least <= most <= 1, and a probability whole from 0 to 1"
            )

    def draw(self, rng: Rng, name: str, real: Tensor) -> Tensor:
        """The hidden places of samples whose real ones are `real` (B, T) bool, (B, T) bool: at least one of each sample."""
        u = rng.uniform(name, (3,))  # (B, 3)
        lengths = real.sum(1)
        share = self.least + (self.most - self.least) * u[:, 0]
        share = torch.where(u[:, 1] < self.whole, 1.0, share)
        hidden = (share * lengths).round().long().clamp(min=1)
        first = (u[:, 2] * (lengths - hidden + 1)).long()
        places = torch.arange(real.shape[1], device=real.device)
        return (places >= first[:, None]) & (places < (first + hidden)[:, None]) & real
