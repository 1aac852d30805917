"""Voicebox's duration model: phones, and how long some of them last -> how long the others do.

Source: Le et al. 2023, "Voicebox", sections 3.3 and 4: by regression, as in FastSpeech 2, but told the durations around a gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network
from nexus_scale.models.audio.infilling import InfillingTrunk, PhoneTable, init_infilling_
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.tokens import check_tokens


class VoiceboxDurations(Network):
    """Logarithms of one plus the number of frames of each phone, (B, L). The defaults are the paper's sizes: 28 M parameters.

    Args: see `Voicebox`; `phone_size` is of a phone's embedding.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        num_phonemes: int = 512,
        phone_size: int = 512,
        hidden_size: int = 512,
        depth: int = 8,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        kernel_size: int = 15,
        conv_groups: int = 16,
    ):
        super().__init__()
        check_counts("voicebox_durations", {"num_phonemes": num_phonemes, "phone_size": phone_size})
        self.num_phonemes = num_phonemes
        self.phones = PhoneTable(num_phonemes, phone_size)
        self.trunk = InfillingTrunk(
            "voicebox_durations", 2 + phone_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
            dropout=dropout, kernel_size=kernel_size, conv_groups=conv_groups,
        )  # fmt: skip
        self.out = Linear(hidden_size, 1)

    def forward(self, known: Tensor, hidden: Tensor, cond: Cond) -> Tensor:
        """
        Args:
            known: logarithms of one plus durations, (B, L); those that are hidden count for nothing.
            hidden: (B, L) bool.
            cond: `phonemes` (B, L) integers and `phonemes_mask` (B, L) bool.
        """
        phonemes, real = cond["phonemes"], cond["phonemes_mask"]
        check_tokens(phonemes, self.num_phonemes, "phonemes")
        told = self.phones(phonemes)  # (B, L, H)
        shown = (~hidden).to(told.dtype)
        context = torch.stack([known.to(told.dtype) * shown, shown], dim=-1)
        return self.out(self.trunk(torch.cat([context, told], dim=-1), real))[..., 0]

    def init_weights(self) -> None:
        init_infilling_(self)

    def blocks(self) -> Sequence[nn.Module]:
        return self.trunk.blocks()

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Arguments of `forward` for as many phones as a recipe pads `phonemes` to."""
        L = self.tokens(text_tokens, lengths)
        phonemes = torch.zeros(batch_size, L, dtype=torch.int64, device=device)
        all_of_them = torch.ones(batch_size, L, dtype=torch.bool, device=device)
        known = torch.zeros(batch_size, L, device=device)
        return known, all_of_them, {"phonemes": phonemes, "phonemes_mask": all_of_them}

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Phones of one sample."""
        return (lengths or {}).get("phonemes", text_tokens)
