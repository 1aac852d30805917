"""Which phone each frame of a sound says: what a forced alignment of a recording goes by. A trunk of Vocos's blocks over mels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nexus_scale.contracts import Network
from nexus_scale.models.audio import convnext
from nexus_scale.models.audio.convnext import ConvNeXt
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.linear import Linear


class PhoneAligner(Network):
    """Mels (B, T, M) -> logits of the phone of each frame, (B, T, V). What follows the last real frame should be zeros.

    Args:
        num_phonemes: V.
        num_mels: M.
        hidden_channels, mlp_channels, depth: of the trunk, which sees three frames to each side in each block.
    """

    def __init__(
        self,
        *,
        num_phonemes: int = 512,
        num_mels: int = 80,
        hidden_channels: int = 256,
        mlp_channels: int = 768,
        depth: int = 4,
    ):
        super().__init__()
        sizes = {
            "num_phonemes": num_phonemes, "num_mels": num_mels, "hidden_channels": hidden_channels, "mlp_channels": mlp_channels,
            "depth": depth,
        }  # fmt: skip
        check_counts("phone_aligner", sizes)
        self.num_phonemes, self.num_mels = num_phonemes, num_mels
        self.trunk = ConvNeXt(num_mels, hidden_channels, mlp_channels, depth)
        self.out = Linear(hidden_channels, num_phonemes)

    def forward(self, mels: Tensor) -> Tensor:
        return self.out(self.trunk(mels.transpose(1, 2)))

    def init_weights(self) -> None:
        """Vocos's."""
        convnext.init_weights(self)

    def blocks(self) -> Sequence[nn.Module]:
        return convnext.blocks_of(self)

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor]:
        return (torch.zeros(batch_size, self.tokens(text_tokens, lengths), self.num_mels, device=device),)

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Frames of one sample."""
        return (lengths or {}).get("codes", 1000)
