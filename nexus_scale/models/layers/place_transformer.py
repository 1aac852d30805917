"""Transformers between the places of an image and the tokens of a text: the attention of latent diffusion's U-Net.

Source: Rombach et al. 2022, section 3.3 and appendix E.2.1; Shazeer 2020 (GEGLU).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.kernels.attention import attention
from nexus_scale.models.layers import init
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.norms import AffineNorm, GroupNorm
from nexus_scale.models.layers.transformer import Heads

LAYER_EPS, GROUP_EPS = 1e-5, 1e-6


Image = tuple[Tensor, Tensor]
"""Tokens of a picture that is told beside the text, (B, n, D), and how much of them counts, (B, 1, 1, 1)."""


class SelfAttention(nn.Module):
    """Of tokens to each other, (B, L, D) -> (B, L, D)."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=False)
        self.heads = Heads(num_heads, hidden_size // num_heads, ("img",), qk_norm=False)
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None, image: Image | None = None) -> Tensor:
        """Reads no text."""
        return self.proj(attention(*self.heads(self.qkv(x))).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Of tokens to those of a text, (B, L, D) and (B, T, text_dim) -> (B, L, D).

    `beside`: what else the queries attend to, `read(q, image)` of each adapter that there is (B, N, L, E), None while it is not at work.
    """

    def __init__(self, hidden_size: int, text_dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(hidden_size, hidden_size, bias=False)
        self.kv = Linear(text_dim, 2 * hidden_size, bias=False)
        self.proj = Linear(hidden_size, hidden_size)
        self.beside: list[Callable[[Tensor, Image], Tensor | None]] = []

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None, image: Image | None = None) -> Tensor:
        """mask: (B, 1, 1, T) bool, True at tokens to attend to; None for all."""
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, N, L or T, E)
            for part in (self.q(x), *self.kv(text).chunk(2, dim=-1))
        )
        y = attention(q, k, v, mask=mask)
        if image is not None:
            for read in self.beside:
                if (more := read(q, image)) is not None:
                    y = y + more
        return self.proj(y.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """Linear, a half gated by GELU of the other, linear; (B, L, D) -> (B, L, D)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.fc1 = Linear(hidden_size, 8 * hidden_size)
        self.fc2 = Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(value * F.gelu(gate))


class TextLayer(nn.Module):
    """Self-attention, attention to the text and an MLP, each normed before and added, (B, L, D) -> (B, L, D).

    `only_cross`: the first attention reads the text as well.
    """

    def __init__(self, hidden_size: int, text_dim: int, num_heads: int, *, only_cross: bool = False):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (AffineNorm(hidden_size, LAYER_EPS) for _ in range(3))
        self.attn1 = (
            CrossAttention(hidden_size, text_dim, num_heads) if only_cross else SelfAttention(hidden_size, num_heads)
        )
        self.attn2 = CrossAttention(hidden_size, text_dim, num_heads)
        self.mlp = GatedMLP(hidden_size)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None, image: Image | None = None) -> Tensor:
        x = x + self.attn1(self.norm1(x), text, mask)
        x = x + self.attn2(self.norm2(x), text, mask, image)
        return x + self.mlp(self.norm3(x))


class PlaceTransformer(nn.Module):
    """Layers over an image's places beside a shortcut, (B, C, H, W) -> (B, C, H, W)."""

    def __init__(
        self, channels: int, text_dim: int, *, num_heads: int, depth: int, num_groups: int, only_cross: bool = False
    ):
        super().__init__()
        self.norm = GroupNorm(channels, num_groups, GROUP_EPS)
        self.proj_in = Linear(channels, channels)
        self.layers = nn.ModuleList(
            TextLayer(channels, text_dim, num_heads, only_cross=only_cross) for _ in range(depth)
        )
        self.proj_out = Linear(channels, channels)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None = None, image: Image | None = None) -> Tensor:
        y = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, H*W, C)
        for layer in self.layers:
            y = layer(y, text, mask, image)
        return x + self.proj_out(y).transpose(1, 2).unflatten(2, x.shape[2:])

    def init_weights(self) -> None:
        """It starts as its shortcut."""
        init.zero_(self.proj_out)
