"""Masked decoding: all tokens are hidden, and over a few steps more and more of them become known, level by level.

Source: Chang et al. 2022, "MaskGIT", section 3.2; Borsos et al. 2023, "SoundStorm", section 3.3, for levels of residual codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import Rng, UserError
from nexus_scale.processes.token_draws import cut, draw
from nexus_scale.processes.token_masks import find_masks, ranks

Count = Annotated[int, Field(ge=1, le=10_000)]
Temperature = Annotated[float, Field(ge=0, le=1000)]


class Masked:
    """Draws all hidden tokens at once, keeps those that the network is surest of, and asks again for the rest."""

    walks = "masks"

    def __init__(
        self,
        *,
        steps: Count = 16,
        fine_steps: Count | tuple[Count, ...] = 1,
        schedule: str | Mapping[str, Any] = "cosine",
        order: Literal["confidence", "random", "sequence"] = "confidence",
        temperature: Temperature = 1.0,
        fine_temperature: Temperature = 0.0,
        anneals: bool = False,
        choice_temperature: Temperature = 4.5,
        top_k: int | None = None,
        top_p: float = 1.0,
    ):
        """
        Args:
            steps: of the first level; each is one forward.
            fine_steps: of every other level, or of each of them.
            schedule: how many tokens are still hidden after each step, see `processes.token_masks`.
            order: which become known first: those with the highest probability; random ones, which draws exactly what the network says
                where each step draws one token; or those that come first.
            temperature: logits are divided by it; 0 takes the likeliest token.
            fine_temperature: that of levels with a single step.
            anneals: the temperature falls to 0 with the time left, as MaskGCT's does.
            choice_temperature: of `order: confidence`: Gumbel noise on log probabilities, falling to 0 with the time left; 4.5 is
                MaskGIT's.
            top_k, top_p: as for `autoregressive`.
        """
        if top_k is not None and top_k < 1:
            raise UserError(f"sample.top_k: got {top_k}; expected at least 1")
        if not 0 < top_p <= 1:
            raise UserError(f"sample.top_p: got {top_p}; expected a share in (0, 1]")
        self.steps, self.fine_steps, self.order = steps, fine_steps, order
        self.schedule = find_masks(schedule, "sample.schedule")
        self.temperature, self.fine_temperature, self.anneals = temperature, fine_temperature, anneals
        self.choice_temperature, self.top_k, self.top_p = choice_temperature, top_k, top_p

    def steps_of(self, num_levels: int) -> list[int]:
        """Steps of each of so many levels.

        Raises:
            UserError: `fine_steps` are those of another number.
        """
        if isinstance(self.fine_steps, int):
            return [self.steps, *[self.fine_steps] * (num_levels - 1)]
        if len(self.fine_steps) != num_levels - 1:
            raise UserError(
                f"sample.fine_steps: got {list(self.fine_steps)}; expected {num_levels - 1}, one for each level but the first"
            )
        return [self.steps, *self.fine_steps]

    def sample(
        self,
        logits: Callable[[Tensor, int], Tensor],
        codes: Tensor,
        hidden: Tensor,
        *,
        mask: int,
        levels: Sequence[int],
        rng: Rng,
        progress: Callable[[int, int], None] = lambda done, steps: None,
    ) -> Tensor:
        """Walks from what is known to all tokens, in as many forwards on every rank.

        Args:
            logits: `logits(codes, level) -> (B, T, V)` of codes of that level, of which those that are hidden are `mask`.
            codes: (B, T, K); where hidden anything.
            hidden: (B, T, K) bool.
            levels: those that are drawn, in order; others stay as they are.
            rng: draws `level_<level>_<step>`, (T, 2) a row.
            progress: told (steps done, steps).
        Returns:
            Codes (B, T, K) without any mask at these levels.
        """
        counts = self.steps_of(len(levels))
        codes, done = torch.where(hidden, mask, codes), 0
        for level, steps in zip(levels, counts, strict=True):
            left = hidden[..., level]  # (B, T)
            total = left.sum(1)  # (B,)
            for step in range(steps):
                u = rng.uniform(f"level_{level}_{step}", (codes.shape[1], 2))  # (B, T, 2)
                after = 1 - (step + 1) / steps
                token, sure = self._drawn(logits(codes, level).float(), u, 1 - step / steps, after, steps)
                share = self.schedule.share(torch.tensor(after, dtype=torch.float64, device=codes.device))
                # how many stay hidden after this step
                stay = torch.minimum((share * total + 1e-9).long(), left.sum(1) - 1).clamp(min=0)
                known = left & (ranks(-sure, left) < (left.sum(1) - stay)[:, None])
                codes = codes.clone()
                codes[..., level] = torch.where(known, token, codes[..., level])
                left = left & ~known
                progress(done := done + 1, sum(counts))
        return codes

    def _drawn(self, logits: Tensor, u: Tensor, now: float, after: float, steps: int) -> tuple[Tensor, Tensor]:
        """A token for each place, and how early it is to be known, (B, T) each, from u (B, T, 2) and the times before and after."""
        temperature = self.fine_temperature if steps == 1 else self.temperature * (now if self.anneals else 1.0)
        cut_off = cut(logits / (temperature or 1.0), self.top_k, self.top_p)
        token = draw(cut_off, u[..., 0]) if temperature else logits.argmax(-1)
        if self.order == "sequence":
            return token, -torch.arange(logits.shape[1], device=logits.device).float().expand(len(logits), -1)
        if self.order == "random":
            return token, u[..., 1]
        sure = logits.log_softmax(-1).gather(-1, token[..., None])[..., 0]
        gumbel = -torch.log(-torch.log(u[..., 1].clamp(1e-20, 1 - 1e-7)))
        return token, sure + self.choice_temperature * after * gumbel
