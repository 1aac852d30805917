"""A transformer that predicts hidden tokens from those that are known: all places of one level of codes at once.

Source: Chang et al. 2022 (MaskGIT), section 3.1; Borsos et al. 2023 (SoundStorm), section 3.1, for levels of residual codes, whose
embeddings are added up. SoundStorm's blocks are a Conformer's; these are VALL-E's, whose norms are told the level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network
from nexus_scale.kernels.linear import linear
from nexus_scale.models.layers.tags import KeepsTags, tag_param
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
from nexus_scale.models.layers.told import StreamTables, Told


class LevelHeads(KeepsTags, nn.Module):
    """Logits of one of K levels: (..., D) -> (..., V). One parameter has all of them, so that every step sees every parameter."""

    def __init__(self, num_levels: int, codebook_size: int, hidden_size: int):
        super().__init__()
        self.rows = tag_param(nn.Parameter(torch.empty(num_levels, codebook_size, hidden_size)), decay=True)

    def forward(self, x: Tensor, level: int) -> Tensor:
        return linear(x, self.rows[level])

    def init_weights(self) -> None:
        nn.init.normal_(self.rows, std=0.02)


class MaskedTransformer(Network):
    """A pre-norm transformer over what it is told and the frames, each seeing all others.

    Args:
        num_codebooks: K, the levels.
        codebook_size: V, tokens of each; V itself hides one.
        hidden_size: D.
        depth: number of blocks.
        num_heads: N.
        mlp_ratio: inner width of the MLPs over D.
        dropout: after embeddings and on residual branches.
        num_classes: of the condition `label`; 0: none.
        text_dim: of the condition `text`; 0: none.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        num_codebooks: int = 8,
        codebook_size: int = 1024,
        hidden_size: int = 1024,
        depth: int = 12,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        num_classes: int = 0,
        text_dim: int = 0,
    ):
        super().__init__()
        check_sizes(
            "masked_transformer",
            {
                "num_codebooks": num_codebooks,
                "codebook_size": codebook_size,
                "hidden_size": hidden_size,
                "depth": depth,
                "num_heads": num_heads,
            },
            mlp_ratio=mlp_ratio,
            dropout=dropout,
        )
        self.num_codebooks, self.codebook_size, self.num_classes = num_codebooks, codebook_size, num_classes
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads

        self.told = Told(num_classes, text_dim, hidden_size)
        self.embed = StreamTables(num_codebooks, codebook_size, hidden_size)
        self.level_embed = TokenTable(num_codebooks, hidden_size)
        self.places = PositionEmbedding(learned=True, dropout=dropout)
        self.token_blocks = nn.ModuleList(
            TokenBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, dropout=dropout, staged=True) for _ in range(depth)
        )
        self.norm = AdaLayerNorm(hidden_size, staged=True)
        self.heads = LevelHeads(num_codebooks, codebook_size, hidden_size)

    def forward(self, codes: Tensor, level: int, cond: Cond) -> Tensor:
        """
        Args:
            codes: (B, T, K) integers in 0 .. V, V where one is hidden.
            level: the codebook to predict, 0 .. K - 1.
            cond: what it is told (`layers.told.Told`); optional `codes_mask` (B, T) bool, True at real frames.
        Returns:
            Logits of codebook `level`, (B, T, V).
        Raises:
            ValueError: a token that the tables do not have.
        """
        check_tokens(codes, self.codebook_size + 1, "codes")
        T = codes.shape[1]
        frames = self.places(self.embed(codes), torch.arange(T, device=codes.device))  # (B, T, D)
        told, real = self.told(cond, codes)
        L = told.shape[1]
        x = torch.cat([told, frames], dim=1)  # (B, L + T, D)
        whole = F.pad(real, (0, T), value=True)
        if "codes_mask" in cond:
            whole = torch.cat([real, cond["codes_mask"]], dim=1)
        stage, mask = self.level_embed(codes.new_full((), level)), whole[:, None, None]  # (D,), (B, 1, 1, L + T)
        for block in self.token_blocks:
            x = block(x, mask, stage)
        return self.heads(self.norm(x[:, L:], stage), level)

    def init_weights(self) -> None:
        """Embeddings N(0, 1) as the sinusoids beside them are, matrices Xavier, heads N(0, 0.02^2); norms begin as plain ones."""
        init_tokens_(self)
        self.heads.init_weights()

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.token_blocks)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Arguments of `forward`, as `PrefixLM.example_inputs` has them."""
        _, T = example_lengths(lengths, text_tokens)
        codes = torch.zeros(batch_size, T, self.num_codebooks, dtype=torch.int64, device=device)
        return codes, 0, self.told.example(batch_size, text_tokens, device)

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Frames of one sample of these lengths, and what it is told."""
        return self.told.tokens(text_tokens) + example_lengths(lengths, text_tokens)[1]

    def extra_repr(self) -> str:
        return (
            f"num_codebooks={self.num_codebooks}, codebook_size={self.codebook_size}, hidden_size={self.hidden_size}, "
            f"depth={self.depth}, num_heads={self.num_heads}"
        )
