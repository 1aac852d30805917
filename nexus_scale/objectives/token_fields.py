"""A batch's codes and what is told with them, for objectives of tokens; and how generation is told it, with guidance or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Cond, Guidance, Objective, Request, Sampler, UserError
from nexus_scale.objectives.conditions import ConditionDrop, null_condition
from nexus_scale.objectives.token_scores import TokenLoss
from nexus_scale.processes.guidance import concatenate

MOST_CODEBOOKS = 1024
"""Codecs have up to 32."""


class TokenObjective(Objective):
    """What objectives of one network over K streams of codes have in common; see their constructors."""

    def __init__(
        self,
        field: str,
        num_codebooks: int,
        codebook_size: int,
        conditions: Sequence[str],
        condition_drop: float | Mapping[str, float],
        token_loss: TokenLoss,
    ):
        if num_codebooks > MOST_CODEBOOKS:
            raise UserError(f"objective.num_codebooks: got {num_codebooks}; expected at most {MOST_CODEBOOKS}")
        for name, value in (("num_codebooks", num_codebooks), ("codebook_size", codebook_size)):
            if value < 1:
                raise UserError(f"objective.{name}: got {value}; expected at least 1")
        self.field, self.num_codebooks, self.codebook_size = field, num_codebooks, codebook_size
        self.conditions, self.condition_drop = tuple(conditions), ConditionDrop(condition_drop, conditions)
        self.token_loss = token_loss

    @property
    def needs(self) -> Sequence[str]:
        return ("model",)

    @property
    def fields(self) -> Sequence[str]:
        return (self.field, *self.conditions)

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """What the network is told, with the loader's masks."""
        names = [*self.conditions, *(f"{name}_mask" for name in self.conditions)]
        return {name: batch[name] for name in names if name in batch}

    def codes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The batch's codes (B, T, K), and which frames are real, (B, T)."""
        codes = batch[self.field]
        codes = codes[..., None] if codes.ndim == 2 else codes
        if codes.ndim != 3 or codes.shape[2] < self.num_codebooks:
            raise ValueError(
                f"{self.field}: got codes {tuple(codes.shape)}; objective.num_codebooks is {self.num_codebooks}: make them with a codec "
                "that has as many, or set objective and network to theirs"
            )
        mask = f"{self.field}_mask"
        real = batch[mask] if mask in batch else torch.ones_like(codes[..., 0], dtype=torch.bool)
        return codes[..., : self.num_codebooks], real

    def misfit(self, sampler: Sampler, guidance: Guidance) -> str | None:
        if guidance.interval or guidance.channels or guidance.rescale or guidance.by:
            return "tokens under guidance other than one scale: give guidance a number"
        return None

    def unconditional(self, cond: Cond) -> Cond:
        return null_condition(cond, self.conditions)

    def given(self, request: Request, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The beginnings that samples go on from, (count, P, K), and which of their frames there are, (count, P); P may be 0."""
        none = torch.zeros(count, 0, self.num_codebooks, dtype=torch.int64, device=device)
        known = request.given.get(self.field, none)
        known = (known[..., None] if known.ndim == 2 else known)[..., : self.num_codebooks]
        return known, request.given.get(f"{self.field}_mask", torch.ones_like(known[..., 0], dtype=torch.bool))

    def told(self, cond: Cond, request: Request) -> Guided:
        """What the network is told while it draws."""
        scale, own = request.guidance.scale, dict(cond)
        if scale == 1 or not own:
            return Guided(own, None)
        away = self.unconditional(own) if request.negative is None else dict(request.negative)
        return Guided(away, None) if scale == 0 else Guided(concatenate(own, away), scale)


class Guided:
    """Conditions of the samples; where they are guided, first their own and behind them those to be guided away from.

    Guidance is of logits: away + scale * (own - away). Source: Copet et al. 2023 (MusicGen), section 3.3; Sanchez et al. 2023.
    """

    def __init__(self, cond: Cond, scale: float | None):
        self.cond, self.scale = cond, scale

    def rows(self, tokens: Tensor) -> Tensor:
        """Tokens (B, ...) for each set of conditions."""
        return tokens if self.scale is None else torch.cat([tokens, tokens])

    def guided(self, logits: Tensor) -> Tensor:
        """One answer (B, ...) of those for each set of conditions."""
        if self.scale is None:
            return logits
        own, away = logits.float().chunk(2)
        return away + self.scale * (own - away)
