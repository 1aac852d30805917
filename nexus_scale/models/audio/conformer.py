"""The Conformer's block: attention for what is far, a depthwise convolution for what is near, between two halves of an MLP.

Source: Gulati et al. 2020, "Conformer: Convolution-augmented Transformer for Speech Recognition", section 2; with rotary positions, as
SoundStorm has them. Behind the depthwise convolution stands a layer norm in place of the paper's batch norm: statistics of a batch would
make a sample depend on its company and on padding.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.kernels.attention import attention
from nexus_scale.kernels.rope import apply_rope
from nexus_scale.models.audio.convnext import TimeConv
from nexus_scale.models.layers import init
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.tokens import AdaLayerNorm


class FeedForward(nn.Module):
    """norm, linear, SiLU, linear: (B, T, D)."""

    def __init__(self, hidden_size: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.norm = AdaLayerNorm(hidden_size, staged=False)
        self.fc1 = Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(F.silu(self.fc1(self.norm(x))), self.dropout, self.training)
        return F.dropout(self.fc2(y), self.dropout, self.training)


class ConvModule(nn.Module):
    """norm, gated linear unit, depthwise convolution along time, norm, SiLU, linear: (B, T, D).

    Args:
        ratio: channels of the convolution over D.
    """

    def __init__(self, hidden_size: int, kernel_size: int, ratio: float, dropout: float):
        super().__init__()
        self.dropout, inner = dropout, int(hidden_size * ratio)
        self.norm = AdaLayerNorm(hidden_size, staged=False)
        self.gated = Linear(hidden_size, 2 * inner)
        self.depthwise = TimeConv(inner, inner, kernel_size, depthwise=True)
        self.depthwise_norm = AdaLayerNorm(inner, staged=False)
        self.out = Linear(inner, hidden_size)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        """real: (B, T, 1) bool; frames that are not are zeros to their neighbours."""
        y = F.glu(self.gated(self.norm(x)), dim=-1) * real.to(x.dtype)
        y = self.depthwise(y.transpose(1, 2)).transpose(1, 2)  # (B, T, inner)
        return F.dropout(self.out(F.silu(self.depthwise_norm(y))), self.dropout, self.training)


class ConformerBlock(nn.Module):
    """x + mlp(x) / 2, then + attention, then + convolution, then + mlp / 2, and a norm.

    But for the norm behind the convolution this is the block of transformers' `LasrEncoder`, in outputs and gradients.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        mlp_ratio: float = 4.0,
        kernel_size: int = 31,
        conv_ratio: float = 1.0,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.mlp1 = FeedForward(hidden_size, mlp_ratio, dropout)
        self.attention_norm = AdaLayerNorm(hidden_size, staged=False)
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        self.proj = Linear(hidden_size, hidden_size)
        self.conv = ConvModule(hidden_size, kernel_size, conv_ratio, dropout)
        self.mlp2 = FeedForward(hidden_size, mlp_ratio, dropout)
        self.norm = AdaLayerNorm(hidden_size, staged=False)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """
        Args:
            x: (B, T, D).
            mask: (B, 1, 1, T) bool, True at real frames.
            cos, sin: of the places, (T, E / 2), see `kernels.rope`.
        """
        x = x + 0.5 * self.mlp1(x)
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, mask=mask)  # (B, N, T, E)
        x = x + F.dropout(self.proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)
        x = x + self.conv(x, mask[:, 0, 0, :, None])
        return self.norm(x + 0.5 * self.mlp2(x))

    def init_weights(self) -> None:
        """The depthwise convolution's; `init_tokens_` sees to the rest."""
        init.uniform_(self.conv.depthwise)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, dropout={self.dropout}"
