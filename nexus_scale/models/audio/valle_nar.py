"""VALL-E's non-autoregressive half: phonemes, an acoustic prompt and the previous codebooks -> all codes of the next one.

Source: Wang et al. 2023, "Neural Codec Language Models are Zero-Shot Text to Speech Synthesizers", section 4.2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network
from nexus_scale.kernels.linear import linear
from nexus_scale.models.layers import init
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.tags import KeepsTags, tag_param
from nexus_scale.models.layers.tokens import (
    AdaLayerNorm,
    PositionEmbedding,
    TokenBlock,
    TokenTable,
    check_sizes,
    check_tokens,
    example_lengths,
)


class CodeTables(KeepsTags, nn.Module):
    """Input and output embeddings of codes: K + 1 tables of V rows if they are shared, else 2K - 1.

    Codebook k is embedded by table k and predicted by table k + 1 (the paper: the weights of the j-th prediction layer are
    the (j + 1)-th acoustic embedding), so that the last alone is an output only; where they are not shared, by table K + k - 1.
    One parameter holds them all: every step sees every parameter, whatever its level, as sharded engines like it.
    """

    def __init__(self, num_codebooks: int, codebook_size: int, hidden_size: int, *, shared: bool):
        super().__init__()
        self.num_codebooks, self.shared = num_codebooks, shared
        num_tables = num_codebooks + 1 if shared else 2 * num_codebooks - 1
        # rows of codes that a batch lacks would decay without learning
        self.rows = tag_param(nn.Parameter(torch.empty(num_tables, codebook_size, hidden_size)), decay=False)

    def output(self, level: int) -> int:
        """The table that predicts codebook `level`."""
        return level + 1 if self.shared else self.num_codebooks + level - 1

    def forward(self, codes: Tensor, level: int, prompt: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            codes: (B, T, K) integers.
            level: codebooks before it are embedded, at frames of the prompt all are.
            prompt: (B, T) bool.
        Returns:
            The sum of the embeddings, (B, T, D), and the rows that predict codebook `level`, (V, D).
        """
        tables = self.rows.unbind(0)
        x = F.embedding(codes[..., 0], tables[0])  # (B, T, D)
        for k in range(1, self.num_codebooks):
            embedded = F.embedding(codes[..., k], tables[k])
            x = x + (embedded if k < level else embedded * prompt[..., None].to(embedded.dtype))
        # A copy: it outlives this call, and under ZeRO-3 the parameter is whole only here.
        return x, tables[self.output(level)].clone()

    def init_weights(self) -> None:
        """N(0, 1 / D) where inputs are outputs too, so that logits begin near N(0, 1); else N(0, 1) and N(0, 0.02^2)."""
        if self.shared:
            nn.init.normal_(self.rows, std=self.rows.shape[-1] ** -0.5)
        else:
            nn.init.normal_(self.rows[: self.num_codebooks])
            nn.init.normal_(self.rows[self.num_codebooks :], std=0.02)

    def extra_repr(self) -> str:
        return f"{tuple(self.rows.shape)}, shared={self.shared}"


class ValleNAR(Network):
    """A transformer over phonemes followed by frames, each seeing all others; its norms are conditioned on the codebook to predict.

    With `share_embedding` as here this is lifeiteng/vall-e's `VALLE` without prenets: its prefix mode 0 without a prompt, 1 where
    the prompt is the beginning of the utterance, 2 and 4 where it is put before it; in outputs and gradients.
    The defaults are the paper's sizes: 213.6 M parameters.

    Args:
        num_phonemes: symbols of the text.
        num_codebooks: K; codebook 0 is given, 1 .. K - 1 are predicted, level by level.
        codebook_size: V.
        hidden_size: D.
        depth: number of blocks.
        num_heads: N.
        mlp_ratio: inner width of the MLPs over D.
        dropout: after embedded frames and on residual branches.
        share_embedding: codes are predicted by the rows that embed them, one level on.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        num_phonemes: int = 512,
        num_codebooks: int = 8,
        codebook_size: int = 1024,
        hidden_size: int = 1024,
        depth: int = 12,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        share_embedding: bool = True,
    ):
        super().__init__()
        check_sizes(
            "valle_nar",
            {
                "num_phonemes": num_phonemes,
                "num_codebooks": num_codebooks,
                "codebook_size": codebook_size,
                "hidden_size": hidden_size,
                "depth": depth,
                "num_heads": num_heads,
            },
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            least={"num_codebooks": 2},
        )
        self.num_phonemes, self.num_codebooks, self.codebook_size = num_phonemes, num_codebooks, codebook_size
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads

        self.phoneme_embed = TokenTable(num_phonemes, hidden_size)
        self.codes = CodeTables(num_codebooks, codebook_size, hidden_size, shared=share_embedding)
        self.stage_embed = TokenTable(num_codebooks - 1, hidden_size)
        self.phoneme_places = PositionEmbedding(learned=False, dropout=0.0)
        self.frame_places = PositionEmbedding(learned=False, dropout=dropout)
        self.token_blocks = nn.ModuleList(
            TokenBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, dropout=dropout, staged=True) for _ in range(depth)
        )
        self.norm = AdaLayerNorm(hidden_size, staged=True)

    def forward(self, codes: Tensor, level: int, cond: Cond) -> Tensor:
        """
        Args:
            codes: (B, T, K) integers; of codebooks `level` and later only what the prompt has is looked at.
            level: the codebook to predict, 1 .. K - 1.
            cond: `phonemes` (B, L) integers; optional `phonemes_mask` (B, L) and `codes_mask` (B, T) bool, True at real ones;
                optional `prompt` (B, T) bool, True at frames whose codes are all known.
        Returns:
            Logits of codebook `level`, (B, T, V); those of the prompt's frames mean nothing.
        Raises:
            ValueError: no such level; a phoneme or a code that the tables do not have.
        """
        if not 1 <= level < self.num_codebooks:
            raise ValueError(f"level {level}; expected 1 .. {self.num_codebooks - 1}: codebook 0 is given")
        phonemes, (B, T, _) = cond["phonemes"], codes.shape
        L = phonemes.shape[1]
        check_tokens(phonemes, self.num_phonemes, "phonemes")
        check_tokens(codes, self.codebook_size, "codes")
        prompt = cond.get("prompt", torch.zeros(B, T, dtype=torch.bool, device=codes.device))

        # embed
        text = self.phoneme_places(self.phoneme_embed(phonemes), torch.arange(L, device=codes.device))  # (B, L, D)
        frames, outputs = self.codes(codes, level, prompt)  # (B, T, D), (V, D)
        frames = self.frame_places(frames, torch.arange(T, device=codes.device))
        stage = self.stage_embed(codes.new_full((), level - 1))  # (D,)

        # transform; text and frames see one another, padding is seen by none
        x = torch.cat([text, frames], dim=1)  # (B, L + T, D)
        real = [
            cond.get(name, torch.ones(B, length, dtype=torch.bool, device=codes.device))
            for name, length in (("phonemes_mask", L), ("codes_mask", T))
        ]
        mask = torch.cat(real, dim=1)[:, None, None]  # (B, 1, 1, L + T)
        for block in self.token_blocks:
            x = block(x, mask, stage)
        return linear(self.norm(x[:, L:], stage), outputs)

    def init_weights(self) -> None:
        """Embeddings of text and stage N(0, 1), of codes as CodeTables says, matrices Xavier; staged norms begin as plain ones."""
        for module in self.modules():
            if isinstance(module, Linear):
                init.xavier_(module)
        for module in self.modules():
            if isinstance(module, AdaLayerNorm | PositionEmbedding | CodeTables):
                module.init_weights()
            elif isinstance(module, TokenTable):
                module.init_weights(std=1.0)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.token_blocks)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Arguments of `forward`, as `ValleAR.example_inputs` has them."""
        L, T = example_lengths(lengths, text_tokens)
        phonemes = torch.zeros(batch_size, L, dtype=torch.int64, device=device)
        codes = torch.zeros(batch_size, T, self.num_codebooks, dtype=torch.int64, device=device)
        return codes, 1, {"phonemes": phonemes}

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Tokens of one sample of these lengths, as for `example_inputs`."""
        return sum(example_lengths(lengths, text_tokens))

    def extra_repr(self) -> str:
        return (
            f"num_phonemes={self.num_phonemes}, num_codebooks={self.num_codebooks}, codebook_size={self.codebook_size}, "
            f"hidden_size={self.hidden_size}, depth={self.depth}, num_heads={self.num_heads}"
        )
