"""The trunk of Voicebox's networks: a transformer over frames or phones that sees both ways and fills in what is hidden.

Source: Le et al. 2023, "Voicebox: Text-Guided Multilingual Universal Speech Generation at Scale", sections 3.2 and 4; Baevski et al. 2020
(wav2vec 2.0), section 2, for positions by a convolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import UserError
from nexus_scale.models.audio.convnext import TimeConv
from nexus_scale.models.layers import init
from nexus_scale.models.layers.distances import distance_bias
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.tokens import AdaLayerNorm, TokenBlock, TokenTable, check_sizes, init_tokens_


class SkipBlock(nn.Module):
    """A pre-norm block; of the second half with the input of its twin in the first half beside its own, on channels."""

    def __init__(self, hidden_size: int, num_heads: int, *, mlp_ratio: float, dropout: float, skips: bool):
        super().__init__()
        self.combine = Linear(2 * hidden_size, hidden_size) if skips else None
        self.block = TokenBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, dropout=dropout)

    def forward(self, x: Tensor, bias: Tensor, twin: Tensor | None = None) -> Tensor:
        """x, twin: (B, L, D). bias: (B, N, L, L)."""
        if self.combine is not None and twin is not None:
            x = self.combine(torch.cat([x, twin], dim=-1))
        out: Tensor = self.block(x, None, bias=bias)
        return out


class InfillingTrunk(nn.Module):
    """Features (B, L, F) of places -> (B, L, D), normed. Places that are not real change nothing.

    Positions are a grouped convolution over the places, added; attention fades with distance (`layers.distances`); the blocks of the second
    half are given what went into those of the first, as in a U-Net.

    Args:
        kernel_size, conv_groups: of the convolution.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        *,
        hidden_size: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        dropout: float,
        kernel_size: int,
        conv_groups: int,
    ):
        super().__init__()
        counts = {"hidden_size": hidden_size, "depth": depth, "num_heads": num_heads, "conv_groups": conv_groups}
        check_sizes(name, counts, mlp_ratio=mlp_ratio, dropout=dropout, least={"depth": 2})
        if depth % 2 or hidden_size % conv_groups or kernel_size < 1 or kernel_size % 2 == 0:
            raise UserError(
                f"{name}: got depth {depth}, hidden_size {hidden_size} with conv_groups {conv_groups}, kernel_size {kernel_size}; expected "
                "an even depth, a multiple of conv_groups, and an odd kernel"
            )
        self.num_heads = num_heads
        self.proj_in = Linear(in_features, hidden_size)
        self.places = TimeConv(hidden_size, hidden_size, kernel_size, groups=conv_groups)
        self.skip_blocks = nn.ModuleList(
            SkipBlock(hidden_size, num_heads, mlp_ratio=mlp_ratio, dropout=dropout, skips=number >= depth // 2)
            for number in range(depth)
        )
        self.norm = AdaLayerNorm(hidden_size, staged=False)

    def forward(self, features: Tensor, real: Tensor, first: Tensor | None = None) -> Tensor:
        """`real` (B, L) bool; `first` (B, D): a token in front of the places, near to all of them."""
        real_rows = real[..., None].to(features.dtype)
        x = self.proj_in(features) * real_rows  # (B, L, D)
        x = x + F.gelu(self.places(x.transpose(1, 2))).transpose(1, 2) * real_rows
        before = 0 if first is None else 1
        if first is not None:
            x = torch.cat([first[:, None].to(x.dtype), x], dim=1)
        bias = distance_bias(real, self.num_heads, x.dtype, before=before)
        inputs: list[Tensor] = []
        for block in self.skip_blocks:
            if block.combine is None:
                inputs.append(x)
                x = block(x, bias)
            else:
                x = block(x, bias, inputs.pop())
        normed: Tensor = self.norm(x[:, before:])
        return normed

    def blocks(self) -> Sequence[nn.Module]:
        return list(self.skip_blocks)


class PhoneTable(TokenTable):
    """Phones as vectors, of places where they are told: (B, L) integers -> (B, L, H)."""

    def told(self, phones: Tensor, dropped: Tensor | None) -> Tensor:
        """`dropped` (B,) bool: samples that are told none."""
        rows = self(phones)
        return rows if dropped is None else rows * (~dropped).to(rows.dtype)[:, None, None]


def init_infilling_(net: nn.Module) -> None:
    """Matrices Xavier, phones N(0, 1), the convolution of places as torch draws it."""
    init_tokens_(net)
    for module in net.modules():
        if isinstance(module, TimeConv):
            init.uniform_(module)
