"""VALL-E's autoregressive half: phonemes and the first codebook so far -> the next code of the first codebook.

Source: Wang et al. 2023, "Neural Codec Language Models are Zero-Shot Text to Speech Synthesizers", section 4.2.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network
from nexus_scale.models.layers import init
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.tokens import (
    AdaLayerNorm,
    KVCache,
    PositionEmbedding,
    TokenBlock,
    TokenTable,
    check_sizes,
    check_tokens,
    example_lengths,
    init_tokens_,
)


class ValleAR(Network):
    """A transformer over phonemes followed by codes: a prefix language model.

    Codes attend to all phonemes and to the codes before them; phonemes attend to one another in both directions, or with
    `causal_text` to those before them. Each of the two has places of its own that begin at 0. Token `codebook_size` of the
    output is the end of the speech.

    With `causal_text` false this is lifeiteng/vall-e's `VALLE` without prenets (`begin` is its `prepend_bos`), in outputs and gradients.
    The defaults are the paper's sizes: 153.8 M parameters.

    Args:
        num_phonemes: symbols of the text.
        codebook_size: V, codes of the first codebook.
        hidden_size: D.
        depth: number of blocks.
        num_heads: N.
        mlp_ratio: inner width of the MLPs over D.
        dropout: after embeddings and on residual branches.
        causal_text: phonemes see only those before them.
        begin: a token of its own precedes the codes, so that speech can begin without an acoustic prompt.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        num_phonemes: int = 512,
        codebook_size: int = 1024,
        hidden_size: int = 1024,
        depth: int = 12,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        causal_text: bool = False,
        begin: bool = False,
    ):
        super().__init__()
        check_sizes(
            "valle_ar",
            {
                "num_phonemes": num_phonemes,
                "codebook_size": codebook_size,
                "hidden_size": hidden_size,
                "depth": depth,
                "num_heads": num_heads,
            },
            mlp_ratio=mlp_ratio,
            dropout=dropout,
        )
        self.num_phonemes, self.codebook_size, self.hidden_size = num_phonemes, codebook_size, hidden_size
        self.depth, self.num_heads, self.causal_text, self.begin = depth, num_heads, causal_text, begin

        self.phoneme_embed = TokenTable(num_phonemes, hidden_size)
        self.code_embed = TokenTable(
            codebook_size + 1 + int(begin), hidden_size
        )  # the end token and, optionally, the begin token
        self.phoneme_places = PositionEmbedding(learned=True, dropout=dropout)
        self.code_places = PositionEmbedding(learned=True, dropout=dropout)
        self.token_blocks = nn.ModuleList(
            TokenBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, dropout=dropout) for _ in range(depth)
        )
        self.norm = AdaLayerNorm(hidden_size, staged=False)
        self.head = Linear(hidden_size, codebook_size + 1, bias=False)

    @property
    def end(self) -> int:
        """The token that ends the speech."""
        return self.codebook_size

    def forward(self, codes: Tensor, cond: Cond) -> Tensor:
        """
        Args:
            codes: of the first codebook, (B, T); what follows a sequence's own end may be anything, it is seen by none before it.
            cond: `phonemes` (B, L) integers; optional `phonemes_mask` (B, L) bool, True at real ones.
        Returns:
            Logits (B, T, V + 1): place t is for code t + 1; with `begin` (B, T + 1, V + 1), place t for code t.
        Raises:
            ValueError: a phoneme or a code that the tables do not have.
        """
        text, real = self._text(cond)
        x, places = self._joined(text, codes)
        mask = self._prefix_mask(real, len(places))
        for block in self.token_blocks:
            x = block(x, mask)
        return self.head(self.norm(x[:, text.shape[1] :]))

    # --------------------------------------------------------------------------------------- token by token

    def prefill(self, codes: Tensor, lengths: Tensor, cond: Cond, capacity: int) -> tuple[Tensor, KVCache]:
        """Reads phonemes and acoustic prompts, and begins a cache.

        Args:
            codes: prompts, (B, P); after each one's own length anything. P may be 0 with `begin`.
            lengths: of the prompts, (B,).
            cond: as for `forward`.
            capacity: codes that may follow.
        Returns:
            Logits of the code after the prompt, (B, V + 1), and the cache for `extend`.
        Raises:
            ValueError: a prompt of no codes, without `begin`.
        """
        lengths = lengths + int(self.begin)
        if int(lengths.min()) < 1:
            raise ValueError("got an empty prompt; expected at least one code, or a network with `begin: true`")
        text, real = self._text(cond)
        x, places = self._joined(text, codes)
        B, L = real.shape
        cache = KVCache(
            torch.cat([real, places < lengths[:, None]], dim=1), L, lengths, capacity=capacity, depth=self.depth,
            num_heads=self.num_heads, head_dim=self.hidden_size // self.num_heads, dtype=x.dtype, static=self.compiled,
        )  # fmt: skip
        mask, slots = self._prefix_mask(real, len(places)), cache.slots()
        for number, block in enumerate(self.token_blocks):
            x = block(x, mask, slots=slots, number=number)
        last = x[torch.arange(B, device=x.device), L + lengths - 1]  # (B, D)
        return self.head(self.norm(last)), cache

    def extend(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Logits of the next code, (B, V + 1), after appending `tokens` (B,); updates `cache` in place.

        Equal to `forward` on all codes so far.
        """
        places, slots = cache.grow()
        x = self.code_places(self.code_embed(tokens[:, None]), places)  # (B, 1, D)
        for number, block in enumerate(self.token_blocks):
            x = block(x, slots.mask, slots=slots, number=number)
        return self.head(self.norm(x[:, 0]))

    # ------------------------------------------------------------------------------------------------ parts

    def _text(self, cond: Cond) -> tuple[Tensor, Tensor]:
        """Embedded phonemes (B, L, D), and which are real, (B, L)."""
        phonemes = cond["phonemes"]
        check_tokens(phonemes, self.num_phonemes, "phonemes")
        real = cond.get("phonemes_mask")
        if real is None:
            real = torch.ones_like(phonemes, dtype=torch.bool)
        places = torch.arange(phonemes.shape[1], device=phonemes.device)
        return self.phoneme_places(self.phoneme_embed(phonemes), places), real

    def _joined(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Text and embedded codes, (B, L + T, D), and the places of the codes, (T,); with `begin` T is one more than was given."""
        check_tokens(codes, self.code_embed.rows.shape[0], "codes")
        if self.begin:
            codes = F.pad(codes, (1, 0), value=self.codebook_size + 1)
        places = torch.arange(codes.shape[1], device=codes.device)
        return torch.cat([text, self.code_places(self.code_embed(codes), places)], dim=1), places

    def _prefix_mask(self, real: Tensor, T: int) -> Tensor:
        """(B, 1, L + T, L + T) bool, True = attend, for text of which `real` (B, L) is no padding, and T codes."""
        L = real.shape[1]
        sees = torch.ones(L + T, L + T, dtype=torch.bool, device=real.device).tril()
        if not self.causal_text:
            sees[:L, :L] = True
        sees = sees & F.pad(real, (0, T), value=True)[:, None]  # (B, L + T, L + T)
        # The first phoneme is real; a row without any True would make attention NaN.
        return sees[:, None]

    def init_weights(self) -> None:
        """Embeddings N(0, 1) as the sinusoids beside them are, matrices Xavier, so that a norm sees both; the head N(0, 0.02^2)."""
        init_tokens_(self)
        init.normal_(self.head)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.token_blocks)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Arguments of `forward`, on any device, meta too: for FLOP counts and dry runs. `lengths`: of `phonemes` and `codes`;
        without them `text_tokens` phonemes and ten seconds at 75 codes a second."""
        L, T = example_lengths(lengths, text_tokens)
        phonemes = torch.zeros(batch_size, L, dtype=torch.int64, device=device)
        return torch.zeros(batch_size, T, dtype=torch.int64, device=device), {"phonemes": phonemes}

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Tokens of one sample of these lengths, as for `example_inputs`."""
        return sum(example_lengths(lengths, text_tokens))

    def extra_repr(self) -> str:
        return (
            f"num_phonemes={self.num_phonemes}, codebook_size={self.codebook_size}, hidden_size={self.hidden_size}, "
            f"depth={self.depth}, num_heads={self.num_heads}, causal_text={self.causal_text}, begin={self.begin}"
        )
