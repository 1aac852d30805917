"""CLIP's text encoder: a transformer that reads a caption from left to right.

Source: Radford et al. 2021, section 2.4; layers as in the transformers library, whose weights it takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import Network, UserError
from nexus_scale.models.layers import init
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.tokens import AdaLayerNorm, TokenBlock, TokenTable, check_sizes, check_tokens

BY_NUMBER = 2
"""The `eos_token` of older configurations, which is wrong there: a text then ends at its highest number, as transformers has it."""


class ClipText(Network):
    """Tokens (B, L) -> their states (B, L, D) and the text's embedding (B, Dp).

    Attributes:
        text_dim, pooled_dim: D and Dp.
    """

    def __init__(
        self,
        *,
        num_tokens: int = 49_408,
        max_tokens: int = 77,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_width: int = 3072,
        activation: Literal["quick_gelu", "gelu"] = "quick_gelu",
        projection_dim: int = 0,
        eos_token: int = 49_407,
        states: Literal["last", "penultimate"] = "penultimate",
    ):
        """
        Args:
            num_tokens, max_tokens: of its tables of tokens and places.
            activation: of the MLPs; CLIP's own is quick_gelu, x sigmoid(1.702 x).
            projection_dim: of the text's embedding; 0: it is the state at the text's end.
            eos_token: the token that ends a text; 2, as older configurations say: the highest number in it.
            states: of tokens, behind the last block and the last norm (Stable Diffusion 1 and 2), or of the block before (XL, 3).
        """
        super().__init__()
        counts = {"hidden_size": hidden_size, "num_heads": num_heads, "depth": depth, "mlp_width": mlp_width}
        counts |= {"num_tokens": num_tokens, "max_tokens": max_tokens}
        check_sizes("clip_text", counts, mlp_ratio=1.0, dropout=0.0)
        if projection_dim < 0 or (states == "penultimate" and depth < 2):
            raise UserError(
                f"clip_text: got projection_dim {projection_dim}, states {states} with depth {depth}; expected 0 or more, and two blocks"
            )
        self.num_tokens, self.max_tokens, self.hidden_size, self.depth = num_tokens, max_tokens, hidden_size, depth
        self.num_heads, self.mlp_width, self.activation, self.states = num_heads, mlp_width, activation, states
        self.projection_dim, self.eos_token = projection_dim, eos_token
        self.text_dim, self.pooled_dim = hidden_size, projection_dim or hidden_size
        self.token_embed = TokenTable(num_tokens, hidden_size)
        self.place_embed = TokenTable(max_tokens, hidden_size)
        self.text_blocks = nn.ModuleList(
            TokenBlock(hidden_size, num_heads, mlp_ratio=mlp_width / hidden_size, dropout=0.0, activation=activation)
            for _ in range(depth)
        )
        self.norm = AdaLayerNorm(hidden_size, staged=False)
        self.project = Linear(hidden_size, projection_dim, bias=False) if projection_dim else None

    def forward(self, tokens: Tensor, new_rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`new_rows`: (n, D), embeddings of the tokens behind those of its table (models/adapters/new_tokens.py)."""
        L = tokens.shape[1]
        if self.max_tokens < L:
            raise UserError(f"texts have {L} tokens; clip_text.max_tokens is {self.max_tokens}: cut or pad them there")
        places = torch.arange(L, device=tokens.device)
        x = self._embedded(tokens, new_rows) + self.place_embed(places)  # (B, L, D)
        past = (places[:, None] >= places).expand(len(tokens), 1, L, L)
        before = x
        for block in self.text_blocks:
            before = x
            x = block(x, past)
        normed = self.norm(x)
        ends = (tokens if self.eos_token == BY_NUMBER else (tokens == self.eos_token).int()).argmax(1)  # (B,)
        pooled = normed[torch.arange(len(tokens), device=tokens.device), ends]
        return before if self.states == "penultimate" else normed, pooled if self.project is None else self.project(
            pooled
        )

    def _embedded(self, tokens: Tensor, new_rows: Tensor | None) -> Tensor:
        known = self.num_tokens + (0 if new_rows is None else len(new_rows))
        check_tokens(tokens, known, "tokens of texts are numbered")
        if new_rows is None:
            return self.token_embed(tokens)
        new = tokens >= self.num_tokens  # (B, L)
        old = self.token_embed(tokens.clamp(max=self.num_tokens - 1))
        return torch.where(new[..., None], F.embedding((tokens - self.num_tokens).clamp(min=0), new_rows), old)

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.text_blocks)

    def init_weights(self) -> None:
        """Tables N(0, 0.02^2) and N(0, 0.01^2) as CLIP's, matrices N(0, 0.02^2), norms one."""
        for module in self.modules():
            if isinstance(module, Linear):
                init.normal_(module)
            elif isinstance(module, AdaLayerNorm):
                module.init_weights()
        self.token_embed.init_weights(std=0.02)
        self.place_embed.init_weights(std=0.01)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Any, ...]:
        return (torch.zeros(batch_size, self.max_tokens, dtype=torch.long, device=device),)

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        return self.max_tokens
