"""The parts of a modulated transformer block: fused qkv, MLP, adaLN modulation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.models.layers.linear import Linear, RMSNorm


class QKV(nn.Module):
    """One projection to queries, keys and values, with RMS norm of queries and keys per head where asked.

    Returns q, k, v: each (B, L, N, E), views of one buffer where there is no norm.
    Source: Dehghani et al. 2023 (norm of q and k); SD3, section 5.3.2, for why: attention logits grow without it.
    """

    def __init__(self, hidden_size: int, num_heads: int, *, qk_norm: bool, eps: float = 1e-6):
        super().__init__()
        self.num_heads, self.head_dim = num_heads, hidden_size // num_heads
        self.linear = Linear(hidden_size, 3 * hidden_size)
        self.q_norm: nn.Module = RMSNorm(self.head_dim, eps=eps) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(self.head_dim, eps=eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.linear(x).unflatten(-1, (3, self.num_heads, self.head_dim))  # (B, L, 3, N, E)
        q, k, v = qkv.unbind(2)  # (B, L, N, E) each
        return self.q_norm(q), self.k_norm(k), v

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"


class MLP(nn.Module):
    """Linear, tanh-approximated GELU, linear."""

    def __init__(self, hidden_size: int, mlp_ratio: float = 4.0):
        super().__init__()
        inner = int(hidden_size * mlp_ratio)
        self.fc1 = Linear(hidden_size, inner)
        self.fc2 = Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulation(nn.Module):
    """`parts` vectors of hidden size from the conditioning, in adaLN's order: shift, scale, gate, shift, ...

    It takes silu(c), which is the same for all blocks and is computed once.
    Source: Peebles & Xie 2022, adaLN-Zero.
    """

    def __init__(self, hidden_size: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = Linear(hidden_size, parts * hidden_size)

    def forward(self, silu_c: Tensor) -> tuple[Tensor, ...]:
        return self.linear(silu_c).chunk(self.parts, dim=-1)  # parts x (B, D)

    def extra_repr(self) -> str:
        return f"parts={self.parts}"
