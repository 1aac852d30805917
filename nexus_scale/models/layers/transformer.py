"""The parts of a modulated transformer block: heads from fused projections, MLP, adaLN modulation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.kernels import heads
from nexus_scale.kernels.blocked import join_heads
from nexus_scale.kernels.heads import Rotation
from nexus_scale.kernels.rope import apply_rope
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.packed import TextLengths, interleave, repeat_rows
from nexus_scale.models.layers.tags import KeepsTags, tag_param


class Heads(KeepsTags, nn.Module):
    """Splits the fused projections of one or several streams into heads, and joins the streams along the sequence.

    With `qk_norm` each stream's queries and keys are RMS-normed per head with weights of its own. The weights lie here and
    not in norms of their own, since a module's parameters are whole only while it runs (ZeRO-3).

    Source: Dehghani et al. 2023 (norm of queries and keys); SD3, section 5.3.2, for why: attention logits grow without it.

    Args:
        streams: their names, in the order of the sequence.
        num_q: queries are taken of so many of the first streams; all unless given.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        streams: Sequence[str],
        *,
        qk_norm: bool,
        num_q: int | None = None,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.num_heads, self.head_dim, self.streams, self.qk_norm, self.eps = num_heads, head_dim, streams, qk_norm, eps
        self.num_q = len(streams) if num_q is None else num_q
        if qk_norm:
            for name in self.norm_names():
                self.register_parameter(name, tag_param(nn.Parameter(torch.ones(head_dim)), decay=False))

    def norm_names(self) -> list[str]:
        return [f"{stream}_{part}_norm" for part in "qk" for stream in self.streams]

    def forward(
        self, *qkvs: Tensor, lengths: TextLengths | None = None, rotation: Rotation | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Per stream (B, L_i, 3D) -> q (B, N, L, E), k, v (B, N, S, E) with S the sum of L_i; queries and keys turned by `rotation`.

        With `lengths` the second of two streams is packed, (1, sum of lengths, 3D), and so are the results: B is 1 and S
        counts the tokens of all samples (layers.packed).
        """
        weights = [getattr(self, name) for name in self.norm_names()] if self.qk_norm else []
        q_weights, k_weights = weights[: len(qkvs)], weights[len(qkvs) :]
        norm = heads.RMS if self.qk_norm else heads.PLAIN
        if lengths is None and heads.serves(qkvs, self.num_heads, norm, rotation):
            own = [w for pair in zip(q_weights, k_weights, strict=True) for w in pair]
            q, k, v = heads.joined(
                qkvs, own, rotation, norm=norm, num_heads=self.num_heads, eps=self.eps, num_q=self.num_q
            )
            return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if lengths is None:
            q, k, v = join_heads(qkvs, q_weights, k_weights, self.num_q, self.num_heads, self.eps)  # (B, S, N, E)
        else:
            img, txt = (
                join_heads((qkv,), q_weights[i : i + 1], k_weights[i : i + 1], 1, self.num_heads, self.eps)
                for i, qkv in enumerate(qkvs)
            )
            k, v = (interleave(img[j], txt[j][0], lengths)[None] for j in (1, 2))  # (1, S, N, E)
            q = interleave(img[0], txt[0][0], lengths)[None] if self.num_q == 2 else img[0].flatten(0, 1)[None]
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return (q, k, v) if rotation is None else (apply_rope(q, *rotation), apply_rope(k, *rotation), v)

    def init_weights(self) -> None:
        for p in self.parameters(recurse=False):
            nn.init.ones_(p)

    def extra_repr(self) -> str:
        return (
            f"{' + '.join(self.streams)}, num_heads={self.num_heads}, head_dim={self.head_dim}, qk_norm={self.qk_norm}"
        )


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

    def forward(self, silu_c: Tensor, lengths: Sequence[int] | None = None) -> tuple[Tensor, ...]:
        """(B, D) -> parts x (B, D); with `lengths` a row for each token of packed samples, parts x (S, D)."""
        modulation = self.linear(silu_c)
        if lengths is not None:
            modulation = repeat_rows(modulation, lengths)
        return modulation.chunk(self.parts, dim=-1)

    def extra_repr(self) -> str:
        return f"parts={self.parts}"
