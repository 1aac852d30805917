"""A Conformer that predicts hidden tokens of one level of codes, told other tokens at the same frames: SoundStorm's network.

Source: Borsos et al. 2023 (SoundStorm), section 3.1: the embeddings of a frame's tokens are added up, those of the semantic ones too, and
each level has a head. Which level is asked for shows in what is hidden; nothing else tells it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network, UserError
from nexus_scale.kernels.rope import rope_frequencies
from nexus_scale.models.audio.conformer import ConformerBlock
from nexus_scale.models.layers.tokens import TokenTable, check_sizes, check_tokens, example_lengths, init_tokens_
from nexus_scale.models.layers.told import StreamTables
from nexus_scale.models.tokens.masked_transformer import LevelHeads


class MaskedConformer(Network):
    """Conformer blocks over frames, each seeing all others; the defaults are SoundStorm's sizes.

    Args:
        num_codebooks: K, the levels.
        codebook_size: V, tokens of each; V itself hides one.
        told: conditions with tokens at the frames, and how many tokens each has, such as {semantic: 1024}.
        repeats: of conditions that come at a lower rate, how many frames each of their tokens stands for; others 1.
        hidden_size: D.
        depth: number of blocks.
        num_heads: N.
        mlp_ratio: inner width of the MLPs over D.
        kernel_size: of the convolutions, odd.
        conv_ratio: channels of the convolutions over D.
        dropout: on residual branches.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        num_codebooks: int = 12,
        codebook_size: int = 1024,
        told: Mapping[str, int] | None = None,
        repeats: Mapping[str, int] | None = None,
        hidden_size: int = 1024,
        depth: int = 12,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        kernel_size: int = 5,
        conv_ratio: float = 1.0,
        dropout: float = 0.1,
    ):
        super().__init__()
        sizes, repeats = dict(told or {}), dict(repeats or {})
        check_sizes(
            "masked_conformer",
            {
                "num_codebooks": num_codebooks,
                "codebook_size": codebook_size,
                "hidden_size": hidden_size,
                "depth": depth,
                "num_heads": num_heads,
                "kernel_size": kernel_size,
                **{f"told.{name}": size for name, size in sizes.items()},
                **{f"repeats.{name}": count for name, count in repeats.items()},
            },
            mlp_ratio=mlp_ratio,
            dropout=dropout,
        )
        if kernel_size % 2 == 0 or conv_ratio <= 0 or hidden_size // num_heads % 2:
            raise UserError(
                f"masked_conformer: got kernel_size {kernel_size}, conv_ratio {conv_ratio}, hidden_size {hidden_size} with num_heads "
                f"{num_heads}; expected an odd kernel, a ratio above 0, and heads of an even width, which positions turn in pairs"
            )
        if unknown := sorted(set(repeats) - set(sizes)):
            raise UserError(f"masked_conformer.repeats: got {unknown}; expected names among told: {sorted(sizes)}")
        self.num_codebooks, self.codebook_size, self.sizes, self.repeats = num_codebooks, codebook_size, sizes, repeats
        self.hidden_size, self.depth, self.num_heads = hidden_size, depth, num_heads

        self.embed = StreamTables(num_codebooks, codebook_size, hidden_size)
        self.told = nn.ModuleDict({name: TokenTable(size, hidden_size) for name, size in sizes.items()})
        self.conformer_blocks = nn.ModuleList(
            ConformerBlock(
                hidden_size, num_heads, mlp_ratio=mlp_ratio, kernel_size=kernel_size, conv_ratio=conv_ratio, dropout=dropout
            )
            for _ in range(depth)
        )  # fmt: skip
        self.heads = LevelHeads(num_codebooks, codebook_size, hidden_size)

    def forward(self, codes: Tensor, level: int, cond: Cond) -> Tensor:
        """
        Args:
            codes: (B, T, K) integers in 0 .. V, V where one is hidden.
            level: the codebook to predict, 0 .. K - 1.
            cond: by the names of `told` (B, T') integers, of which what goes beyond the frames is cut and what is missing counts as 0;
                optional `codes_mask` (B, T) bool, True at real frames.
        Returns:
            Logits of codebook `level`, (B, T, V).
        Raises:
            ValueError: a token that the tables do not have.
        """
        check_tokens(codes, self.codebook_size + 1, "codes")
        B, T, _ = codes.shape
        x = self.embed(codes)  # (B, T, D)
        for name, table in self.told.items():
            x = x + table(self._at_frames(cond[name], name, T))
        mask = cond.get("codes_mask", torch.ones(B, T, dtype=torch.bool, device=codes.device))[:, None, None]
        places = torch.arange(T, device=codes.device)[:, None]
        cos, sin = rope_frequencies(places, (self.hidden_size // self.num_heads,))
        for block in self.conformer_blocks:
            x = block(x, mask, cos, sin)
        return self.heads(x, level)

    def _at_frames(self, tokens: Tensor, name: str, T: int) -> Tensor:
        """Tokens (B, T') of a condition, one for each of T frames."""
        check_tokens(tokens, self.sizes[name], name)
        tokens = tokens.repeat_interleave(self.repeats.get(name, 1), dim=1)
        return F.pad(tokens, (0, max(0, T - tokens.shape[1])))[:, :T]

    def init_weights(self) -> None:
        """Embeddings N(0, 1), matrices Xavier, convolutions uniform, heads N(0, 0.02^2); hidden codes begin as zeros.

        Of K levels most are hidden in most steps. As N(0, 1) they add up to K times the variance of what is told: with eight levels the
        first book of speech/train stood at 5.0 nats after 100 steps of batch 16 that began so, and at 3.0 of those that begin with zeros.
        """
        init_tokens_(self)
        self.embed.zero_hidden_()
        for module in self.modules():
            if isinstance(module, ConformerBlock | LevelHeads):
                module.init_weights()

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.conformer_blocks)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Arguments of `forward`, as `MaskedTransformer.example_inputs` has them."""
        _, T = example_lengths(lengths, text_tokens)
        codes = torch.zeros(batch_size, T, self.num_codebooks, dtype=torch.int64, device=device)
        return codes, 0, {name: codes[:, : -(-T // self.repeats.get(name, 1)), 0] for name in self.sizes}

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Frames of one sample of these lengths."""
        return example_lengths(lengths, text_tokens)[1]

    def extra_repr(self) -> str:
        return (
            f"num_codebooks={self.num_codebooks}, codebook_size={self.codebook_size}, told={self.sizes}, hidden_size={self.hidden_size}, "
            f"depth={self.depth}, num_heads={self.num_heads}"
        )
