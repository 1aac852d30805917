"""MusicGen that follows a melody: pitch classes and a text stand before the codes.

Source: Copet et al. 2023, "Simple and Controllable Music Generation", section 2.3; facebookresearch/audiocraft, `prepend` of its fuser.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from nexus_scale.contracts import Cond
from nexus_scale.models.audio.musicgen import MusicGen, Told
from nexus_scale.models.layers.counts import check_counts
from nexus_scale.models.layers.linear import Linear


class MusicGenMelody(MusicGen):
    """`MusicGen` whose blocks attend to no text: a melody's pitch classes and the text stand before the codes.

    A melody of zeros is none. Texts are padded to one length, since padding is seen as zeros, as in training of the public model.
    In outputs and gradients this is transformers' `MusicgenMelodyForConditionalGeneration`. The defaults are the released size.

    Args:
        chroma_dim: pitch classes.
        chroma_length: steps that a melody is repeated or cut to; 235 are 30 seconds.
    Others: see `MusicGen`.
    """

    reads_text = False

    def __init__(
        self,
        *,
        num_codebooks: int = 4,
        codebook_size: int = 2048,
        hidden_size: int = 1536,
        depth: int = 48,
        num_heads: int = 24,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        text_dim: int = 768,
        audio_channels: int = 1,
        chroma_dim: int = 12,
        chroma_length: int = 235,
    ):
        super().__init__(
            num_codebooks=num_codebooks,
            codebook_size=codebook_size,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            text_dim=text_dim,
            audio_channels=audio_channels,
        )
        check_counts("musicgen_melody", {"chroma_dim": chroma_dim, "chroma_length": chroma_length})
        self.chroma_dim, self.chroma_length = chroma_dim, chroma_length
        self.chroma_in = Linear(chroma_dim, hidden_size) if chroma_dim != hidden_size else None

    def _told(self, cond: Cond) -> Told:
        text = self._text(cond)
        return Told(torch.cat([self._melody(cond, text), text], dim=1))

    def _melody(self, cond: Cond, text: Tensor) -> Tensor:
        """`chroma` (B, T', chroma_dim), projected, over and over or cut: (B, chroma_length, D). No melody is the first class throughout."""
        chroma = cond.get("chroma", text.new_zeros(len(text), 1, self.chroma_dim)).to(text.dtype)
        silent = (chroma == 0).all(-1, keepdim=True)
        first = torch.arange(self.chroma_dim, device=chroma.device) == 0
        chroma = torch.where(silent & first, 1.0, chroma)
        x = chroma if self.chroma_in is None else self.chroma_in(chroma)  # (B, T', D)
        return x.repeat(1, math.ceil(self.chroma_length / x.shape[1]), 1)[:, : self.chroma_length]

    def example_inputs(
        self, batch_size: int, text_tokens: int, device: torch.device | str, lengths: Mapping[str, int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As `MusicGen.example_inputs`, with a melody."""
        tokens, cond = super().example_inputs(batch_size, text_tokens, device, lengths)
        chroma = torch.zeros(batch_size, self.chroma_length, self.chroma_dim, device=device)
        return tokens, {**cond, "chroma": chroma}

    def tokens(self, text_tokens: int, lengths: Mapping[str, int] | None = None) -> int:
        """Steps of one sample of these lengths, and what stands before them."""
        return super().tokens(text_tokens, lengths) + text_tokens + self.chroma_length

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, chroma_dim={self.chroma_dim}, chroma_length={self.chroma_length}"
