"""A language model over streams of tokens: each step from all before it, and from what it is told and given.

Source: Kondratyuk et al. 2023 (VideoPoet), section 3.2, and Raffel et al. 2020 (T5), section 3.2.1, for the prefix; Copet et al. 2023
(MusicGen), section 2.2, for the streams, whose embeddings are added up and whose logits have a head each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network, UserError
from nexus_scale.models.layers import init
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.tokens import (
    AdaLayerNorm,
    KVCache,
    PositionEmbedding,
    TokenBlock,
    check_sizes,
    check_tokens,
    example_lengths,
    init_tokens_,
)
from nexus_scale.models.layers.told import StreamTables, Told


class PrefixLM(Network):
    """A pre-norm transformer over what it is told, which all see, followed by the steps of its streams.

    Args:
        num_codebooks: K, the streams.
        codebook_size: V, tokens of each; V itself stands where a stream has none.
        ends: its logits have a token V, the end.
        hidden_size: D.
        depth: number of blocks.
        num_heads: N.
        mlp_ratio: inner width of the MLPs over D.
        dropout: after embeddings and on residual branches.
        num_classes: of the condition `label`; 0: none.
        text_dim: of the condition `text`; 0: none.
        num_phonemes: of the condition `phonemes`; 0: none.
        pace: steps that a phoneme takes in the mean; see `layers.told.Told`.
        num_tokens: steps of an example, for FLOPs and dry runs; 0: those of `codes` in the recipe's `data.tokens`.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        num_codebooks: int = 1,
        codebook_size: int = 1024,
        ends: bool = False,
        hidden_size: int = 1024,
        depth: int = 12,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        num_classes: int = 0,
        text_dim: int = 0,
        num_phonemes: int = 0,
        pace: float = 1.0,
        num_tokens: int = 0,
    ):
        super().__init__()
        check_sizes(
            "prefix_lm",
            {
                "num_codebooks": num_codebooks,
                "codebook_size": codebook_size,
                "hidden_size": hidden_size,
                "depth": depth,
                "num_heads": num_heads,
                "num_tokens": num_tokens,
            },
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            least={"num_tokens": 0},
        )
        if num_phonemes < 0 or pace <= 0:
            raise UserError(
                f"prefix_lm: got num_phonemes {num_phonemes}, pace {pace}; expected at least 0, and above 0"
            )
        self.num_codebooks, self.codebook_size, self.ends = num_codebooks, codebook_size, ends
        self.num_tokens = num_tokens
        self.hidden_size, self.depth, self.num_heads, self.num_classes = hidden_size, depth, num_heads, num_classes

        self.told = Told(num_classes, text_dim, hidden_size, num_phonemes=num_phonemes, pace=pace)
        self.embed = StreamTables(num_codebooks, codebook_size, hidden_size)
        self.places = PositionEmbedding(learned=True, dropout=dropout)
        self.token_blocks = nn.ModuleList(
            TokenBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, dropout=dropout) for _ in range(depth)
        )
        self.norm = AdaLayerNorm(hidden_size, staged=False)
        self.head = Linear(hidden_size, num_codebooks * (codebook_size + int(ends)), bias=False)

    def forward(self, tokens: Tensor, cond: Cond) -> Tensor:
        """
        Args:
            tokens: (B, S, K) integers in 0 .. V; what follows a sequence's own end may be anything, it is seen by none before it.
            cond: what it is told (`layers.told.Told`); optional `prefix` (B, S) bool, the first steps, which see one another both ways.
        Returns:
            Logits (B, S, K, V), with `ends` (B, S, K, V + 1): at each step of the tokens that follow it.
        Raises:
            ValueError: a token that the tables do not have.
        """
        x, mask, L = self._begin(tokens, cond)
        for block in self.token_blocks:
            x = block(x, mask)
        return self._logits(x[:, L:])

    # --------------------------------------------------------------------------------------- step by step

    def prefill(self, tokens: Tensor, cond: Cond, capacity: int) -> tuple[Tensor, KVCache]:
        """Reads what it is told and the first steps, (B, P, K) with P at least 1, and begins a cache.

        Args:
            capacity: steps that may follow.
        Returns:
            Logits of the step after them, (B, K, V), and the cache for `extend`.
        """
        x, mask, L = self._begin(tokens, cond)
        (B, P), told = tokens.shape[:2], mask[:, 0, -1]  # the last step sees all that are real
        cache = KVCache(
            told, L, torch.full((B,), P, device=x.device), capacity=capacity, depth=self.depth, num_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads, dtype=x.dtype, static=self.compiled,
        )  # fmt: skip
        slots = cache.slots()
        for number, block in enumerate(self.token_blocks):
            x = block(x, mask, slots=slots, number=number)
        return self._logits(x[:, -1]), cache

    def extend(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Logits of the next step, (B, K, V), after appending `tokens` (B, K); updates `cache` in place.

        Equal to `forward` on all steps so far.
        """
        places, slots = cache.grow()
        x = self.places(self.embed(tokens[:, None]), places)  # (B, 1, D)
        for number, block in enumerate(self.token_blocks):
            x = block(x, slots.mask, slots=slots, number=number)
        return self._logits(x[:, 0])

    # ------------------------------------------------------------------------------------------------ parts

    def _begin(self, tokens: Tensor, cond: Cond) -> tuple[Tensor, Tensor, int]:
        """Embedded tokens after the L that it is told, (B, L + S, D), which each may see, (B, 1, L + S, L + S) bool, and L."""
        check_tokens(tokens, self.codebook_size + 1, "codes")
        S = tokens.shape[1]
        steps = self.places(self.embed(tokens), torch.arange(S, device=tokens.device))  # (B, S, D)
        told, real = self.told(cond, tokens)
        L = told.shape[1]
        sees = torch.ones(L + S, L + S, dtype=torch.bool, device=tokens.device).tril()
        if L:
            # The first one that it is told is real; a row without any True would make attention NaN.
            sees[:L, :L] = True
        sees = sees & F.pad(real, (0, S), value=True)[:, None]  # (B, L + S, L + S)
        if "prefix" in cond:
            both = F.pad(cond["prefix"], (L, 0))
            sees = sees | both[:, None] & both[:, :, None]
        return torch.cat([told, steps], dim=1), sees[:, None], L

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x)).unflatten(-1, (self.num_codebooks, -1))

    def init_weights(self) -> None:
        """Embeddings N(0, 1) as the sinusoids beside them are, matrices Xavier, so that a norm sees both; the head N(0, 0.02^2)."""
        init_tokens_(self)
        init.normal_(self.head)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.token_blocks)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Arguments of `forward`, on any device, meta too: for FLOP counts and dry runs. `lengths`: of `codes`; without them ten seconds
        at 75 steps a second."""
        L, S = example_lengths(lengths, text_tokens)
        S = self.num_tokens or S
        tokens = torch.zeros(batch_size, S, self.num_codebooks, dtype=torch.int64, device=device)
        return tokens, self.told.example(batch_size, L, device)

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Steps of one sample of these lengths, and what it is told."""
        L, S = example_lengths(lengths, text_tokens)
        return self.told.tokens(L) + (self.num_tokens or S)

    def extra_repr(self) -> str:
        return (
            f"num_codebooks={self.num_codebooks}, codebook_size={self.codebook_size}, ends={self.ends}, "
            f"hidden_size={self.hidden_size}, depth={self.depth}, num_heads={self.num_heads}"
        )
