"""Autoregressive sampling: temperature, top-k, top-p, a guard against loops, and an end token.

Source: Holtzman et al. 2020 (top-p); Chen et al. 2024 ("VALL-E 2"), section 4.1, repetition-aware sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import Rng, UserError
from nexus_scale.processes.token_draws import cut, draw


class Sequences(NamedTuple):
    """`tokens` (B, T), of several streams (B, T, K), 0 from each row's end on; `lengths` (B,); `ended` (B,) bool, False if `max_tokens`
    cut the row short."""

    tokens: Tensor
    lengths: Tensor
    ended: Tensor


class Autoregressive:
    """Draws tokens from the network's (truncated) distribution until each row has ended."""

    walks = "logits"

    def __init__(
        self,
        *,
        temperature: Annotated[float, Field(ge=0, le=1000)] = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        repetition_window: int = 0,
        repetition_ratio: float = 0.1,
        min_tokens: int = 1,
        max_tokens: Annotated[int, Field(ge=1, le=10**6)] = 1500,
    ):
        """
        Args:
            temperature: logits are divided by it; 0 takes the likeliest token.
            top_k: number of likeliest tokens to draw from; None: all.
            top_p: the fewest of the likeliest tokens that have this probability together.
            repetition_window: 0, or how many tokens back the guard looks; VALL-E 2 takes 10. A token that makes up more than
                `repetition_ratio` of them is replaced by a draw from the whole distribution.
            min_tokens: no row ends before this many.
            max_tokens: every row ends after this many.
        """
        for name, value, least in (
            ("temperature", temperature, 0),
            ("top_k", 1 if top_k is None else top_k, 1),
            ("repetition_window", repetition_window, 0),
            ("min_tokens", min_tokens, 0),
            ("max_tokens", max_tokens, 1),
        ):
            if value < least:
                raise UserError(f"sample.{name}: got {value}; expected at least {least}")
        for name, share in (("top_p", top_p), ("repetition_ratio", repetition_ratio)):
            if not 0 < share <= 1:
                raise UserError(f"sample.{name}: got {share}; expected a share in (0, 1]")
        if min_tokens > max_tokens:
            raise UserError(f"sample.min_tokens: got {min_tokens}; expected at most max_tokens, {max_tokens}")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.repetition_window, self.repetition_ratio = repetition_window, repetition_ratio
        self.min_tokens, self.max_tokens = min_tokens, max_tokens

    @property
    def steps(self) -> int:
        """The largest number of tokens."""
        return self.max_tokens

    def sample(
        self,
        logits: Callable[[Tensor | None], Tensor],
        *,
        end: int | None,
        rng: Rng,
        finished: Callable[[bool], bool] = bool,
        steps: range | None = None,
    ) -> Sequences:
        """Walks until all rows have ended.

        Args:
            logits: `logits(tokens) -> (B, V)` of the next token, given those just drawn, (B,); None asks for the first. Of K streams that
                are drawn side by side (B, K, V), given (B, K).
            end: the token that ends a row, of several streams once all have drawn it; it is no part of the result. None: rows end
                together.
            rng: draws `token_<step>`, two numbers a row, so that a row's tokens depend on no other.
            finished: whether to stop, given whether all rows here have ended. Where ranks share a network it asks them all: none
                may stop before the others, and all call it after every token.
            steps: numbers of the tokens that are drawn, at most; None: the first `max_tokens`. What is drawn depends on a token's number,
                as does whether its row may end, and not on where the walk began.
        """
        drawn: list[Tensor] = []
        token: Tensor | None = None
        ended = lengths = torch.zeros(())
        for step in range(self.max_tokens) if steps is None else steps:
            scores = logits(token).float()  # (B, V) or (B, K, V)
            if token is None:
                ended = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
                lengths = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
            if end is not None and step < self.min_tokens:
                scores = scores.index_fill(-1, torch.tensor([end], device=scores.device), float("-inf"))
            token = self._next(scores, drawn, rng.uniform(f"token_{step}", (*scores.shape[1:-1], 2)))  # (B,) or (B, K)
            if end is not None:
                ended = ended | (token == end).view(len(token), -1).all(1)
                token = torch.where(_rows(ended, token), end, token)  # a row that has ended stays ended
            lengths = lengths + (~ended).long()
            if finished(bool(ended.all())):
                break
            drawn.append(token)
        tokens = torch.stack(drawn, dim=1) if drawn else lengths.new_zeros(len(lengths), 0)
        real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
        return Sequences(torch.where(_rows(real, tokens), tokens, 0), lengths, ended)

    def _next(self, scores: Tensor, drawn: list[Tensor], u: Tensor) -> Tensor:
        """One token for each row and stream, (...), from logits (..., V), the tokens drawn so far, and u (..., 2) in [0, 1)."""
        if self.temperature == 0:
            return scores.argmax(-1)
        scores = scores / self.temperature
        token = draw(cut(scores, self.top_k, self.top_p), u[..., 0])
        if self.repetition_window and drawn:
            recent = torch.stack(drawn[-self.repetition_window :], dim=-1)  # (..., at most window)
            share = (recent == token[..., None]).sum(-1) / self.repetition_window
            token = torch.where(share > self.repetition_ratio, draw(scores, u[..., 1]), token)
        return token


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """The first axes of `like`, with as many behind them of length 1."""
    return values.view(*values.shape, *[1] * (like.ndim - values.ndim))
