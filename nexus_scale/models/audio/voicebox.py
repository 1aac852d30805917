"""Voicebox's audio model: noisy mels, the mels around a gap and the phone of each frame -> the flow that fills the gap.

Source: Le et al. 2023, "Voicebox: Text-Guided Multilingual Universal Speech Generation at Scale", section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nexus_scale.contracts import Cond, Network
from nexus_scale.models.audio.infilling import InfillingTrunk, PhoneTable, init_infilling_
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.embeddings import sinusoid
from nexus_scale.models.layers.linear import Linear
from nexus_scale.models.layers.tokens import check_tokens


class Voicebox(Network):
    """(B, M, T), t (B,) -> (B, M, T). The defaults are the paper's sizes: 330 M parameters.

    Frame by frame, x_t, the context and the phone's embedding are projected together; the time is a token in front of the frames.

    Args:
        num_phonemes: symbols of the text.
        num_mels: M.
        phone_size: of a phone's embedding.
        hidden_size, depth, num_heads, mlp_ratio, dropout: of the transformer.
        kernel_size, conv_groups: of the convolution that gives places.
    Raises:
        UserError: sizes that do not fit one another.
    """

    def __init__(
        self,
        *,
        num_phonemes: int = 512,
        num_mels: int = 80,
        phone_size: int = 1024,
        hidden_size: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        kernel_size: int = 31,
        conv_groups: int = 16,
    ):
        super().__init__()
        check_counts("voicebox", {"num_phonemes": num_phonemes, "num_mels": num_mels, "phone_size": phone_size})
        self.num_phonemes, self.num_mels, self.hidden_size = num_phonemes, num_mels, hidden_size
        self.phones = PhoneTable(num_phonemes, phone_size)
        self.trunk = InfillingTrunk(
            "voicebox", 2 * num_mels + phone_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
            dropout=dropout, kernel_size=kernel_size, conv_groups=conv_groups,
        )  # fmt: skip
        self.out = Linear(hidden_size, num_mels)

    def forward(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """
        Args:
            x: noisy mels, (B, M, T).
            t: (B,), 0 is data.
            cond: `phones` (B, T) integers; `context` (B, M, T), mels with zeros where they are to be filled in; optional `frame_mask`
                (B, T) bool, True at real frames, and `drop` (B,) bool: samples that are told no phones.
        """
        phones, context = cond["phones"], cond["context"].to(x.dtype)
        check_tokens(phones, self.num_phonemes, "phonemes")
        real = cond.get("frame_mask", torch.ones_like(phones, dtype=torch.bool))
        told = self.phones.told(phones, cond.get("drop"))  # (B, T, H)
        frames = torch.cat([x, context], dim=1).transpose(1, 2).to(told.dtype)  # (B, T, 2M)
        time = sinusoid(t.float() * 1000.0, self.hidden_size)  # (B, D)
        h = self.trunk(torch.cat([frames, told], dim=-1), real, time)
        return self.out(h).transpose(1, 2)

    def init_weights(self) -> None:
        init_infilling_(self)

    def blocks(self) -> Sequence[nn.Module]:
        return self.trunk.blocks()

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Arguments of `forward` for as many frames as a recipe pads `codes` to, or ten seconds at 100 frames a second."""
        T = self.tokens(text_tokens, lengths)
        x = torch.zeros(batch_size, self.num_mels, T, device=device)
        phones = torch.zeros(batch_size, T, dtype=torch.int64, device=device)
        return x, torch.zeros(batch_size, device=device), {"phones": phones, "context": x}

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Frames of one sample."""
        return (lengths or {}).get("codes", 1000)
