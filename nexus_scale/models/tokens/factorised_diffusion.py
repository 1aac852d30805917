"""Hidden tokens of one attribute of speech from those that are known, and from the phones that are said at each step.

One such network each draws durations, prosody, content and detail. Durations stand one to a phone; the others one to a frame, and a
frame is told the phone that it belongs to.

Source: Ju et al. 2024, "NaturalSpeech 3", section 4: a phoneme encoder, and for each attribute a transformer whose input are the tokens
of a prompt and the attributes before it. Theirs are told the diffusion time, ours the level of codes alone, as MaskGIT and SoundStorm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network
from nexus_scale.models.layers.tokens import (
    AdaLayerNorm,
    PositionEmbedding,
    TokenBlock,
    TokenTable,
    check_sizes,
    check_tokens,
    example_lengths,
    init_tokens_,
)
from nexus_scale.models.layers.told import StreamTables
from nexus_scale.models.tokens.masked_transformer import LevelHeads


class FactorisedDiffusion(Network):
    """Codes (B, T, K), of which some are hidden, -> logits of one level of them.

    Args:
        num_phonemes: symbols of the text.
        num_codebooks: K.
        codebook_size: V, tokens of each; V itself hides one.
        levels: (first, how many) that it predicts.
        hidden_size: D.
        text_depth, depth: blocks over phones, and over frames.
        num_heads: N.
        mlp_ratio: inner width of the MLPs over D.
        dropout: after embeddings and on residual branches.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        num_phonemes: int = 512,
        num_codebooks: int = 6,
        codebook_size: int = 1024,
        levels: tuple[int, int] = (0, 1),
        hidden_size: int = 1024,
        text_depth: int = 6,
        depth: int = 12,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
    ):
        super().__init__()
        first, count = levels
        sizes = {
            "num_phonemes": num_phonemes, "num_codebooks": num_codebooks, "codebook_size": codebook_size, "levels": count,
            "hidden_size": hidden_size, "text_depth": text_depth, "depth": depth, "num_heads": num_heads,
        }  # fmt: skip
        least = {"text_depth": 0, "num_codebooks": first + count}
        check_sizes("factorised_diffusion", sizes, mlp_ratio=mlp_ratio, dropout=dropout, least=least)
        self.num_phonemes, self.num_codebooks, self.codebook_size = num_phonemes, num_codebooks, codebook_size
        self.levels, self.hidden_size, self.depth, self.num_heads = (first, count), hidden_size, depth, num_heads

        self.phoneme_embed = TokenTable(num_phonemes, hidden_size)
        self.phoneme_places = PositionEmbedding(learned=True, dropout=dropout)
        self.text_blocks = nn.ModuleList(
            TokenBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, dropout=dropout) for _ in range(text_depth)
        )
        self.embed = StreamTables(num_codebooks, codebook_size, hidden_size)
        self.prompt_embed = TokenTable(2, hidden_size)
        self.level_embed = TokenTable(count, hidden_size)
        self.frame_places = PositionEmbedding(learned=True, dropout=dropout)
        self.token_blocks = nn.ModuleList(
            TokenBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, dropout=dropout, staged=True) for _ in range(depth)
        )
        self.norm = AdaLayerNorm(hidden_size, staged=True)
        self.heads = LevelHeads(count, codebook_size, hidden_size)

    def forward(self, codes: Tensor, level: int, cond: Cond) -> Tensor:
        """
        Args:
            codes: (B, T, K) integers in 0 .. V, V where one is hidden.
            level: the codebook to predict, one of `levels`.
            cond: `phonemes` (B, L) integers and `phonemes_mask` (B, L) bool; `phones` (B, T) integers, the place in the text that each
                frame belongs to, without which frames and phones stand one to one; `codes_mask` and `prompt` (B, T) bool, True at real
                frames and at those of the prompt.
        Returns:
            Logits of codebook `level`, (B, T, V).
        Raises:
            ValueError: a token that the tables do not have.
        """
        check_tokens(codes, self.codebook_size + 1, "codes")
        check_tokens(cond["phonemes"], self.num_phonemes, "phonemes")
        (B, T, _), device = codes.shape, codes.device
        phones = cond["phones"] if "phones" in cond else torch.arange(T, device=device).expand(B, T)
        text = self._text(cond["phonemes"], cond["phonemes_mask"])  # (B, L, D)
        said = text.gather(1, phones[..., None].expand(-1, -1, text.shape[2]))
        x = self.embed(codes) + said + self.prompt_embed(cond["prompt"].long())
        x = self.frame_places(x, torch.arange(T, device=device))
        stage, mask = self.level_embed(codes.new_full((), level - self.levels[0])), cond["codes_mask"][:, None, None]
        for block in self.token_blocks:
            x = block(x, mask, stage)
        return self.heads(self.norm(x, stage), level - self.levels[0])

    def _text(self, phonemes: Tensor, real: Tensor) -> Tensor:
        """What the phones are, each seeing all others, (B, L, D)."""
        x = self.phoneme_places(self.phoneme_embed(phonemes), torch.arange(phonemes.shape[1], device=phonemes.device))
        for block in self.text_blocks:
            x = block(x, real[:, None, None])
        return x

    def init_weights(self) -> None:
        """Embeddings N(0, 1) as the sinusoids beside them are, matrices Xavier, heads N(0, 0.02^2); norms begin as plain ones."""
        init_tokens_(self)
        self.heads.init_weights()

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.text_blocks, *self.token_blocks]

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Arguments of `forward`: of one codebook phones, of several frames."""
        L, T = example_lengths(lengths, text_tokens)
        T = L if self.num_codebooks == 1 else T

        def full(value: int | bool, *shape: int) -> Tensor:
            return torch.full((batch_size, *shape), value, device=device)

        cond = {"phonemes": full(0, L), "phonemes_mask": full(True, L), "phones": full(0, T)}
        cond |= {"codes_mask": full(True, T), "prompt": full(False, T)}
        return full(0, T, self.num_codebooks), self.levels[0], cond

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Phones and frames of one sample of these lengths."""
        L, T = example_lengths(lengths, text_tokens)
        return L + (L if self.num_codebooks == 1 else T)

    def extra_repr(self) -> str:
        return (
            f"num_phonemes={self.num_phonemes}, levels={self.levels} of {self.num_codebooks} of {self.codebook_size}, "
            f"hidden_size={self.hidden_size}, depth={self.depth}, num_heads={self.num_heads}"
        )
