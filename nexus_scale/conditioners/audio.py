"""Sound as the codes of a codec: what speech goes on from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from nexus_scale.contracts import CondField, Conditioner
from nexus_scale.data.manifest import DataError

CODES, TIMBRE = "codes", "timbre"
LARGEST_BOOK = 1 << 15
"""Codes of a book, at most: int16 holds them."""


class CodeConditioner(Conditioner):
    """Waves (1, T) in [-1, 1] at the codec's rate -> `codes` (T', K), of as many steps as it takes to cover them: whole numbers, or of a
    vocoder mels.

    Of a codec that hears whose voice it is, `timbre` (D,) too. Silence fills the last step and no more, so that the codes of a wave do
    not depend on its company.

    Args:
        codec: `interop.encoders.OwnCodec`, or a stand-in.
    """

    reads = "audio"

    def __init__(self, codec: Any):
        if codec.codebook_size > LARGEST_BOOK:
            raise DataError(
                f"codec: got books of {codec.codebook_size} codes, expected at most {LARGEST_BOOK}, since int16 holds them"
            )
        self.codec, self.fingerprint = codec, str(codec.fingerprint)
        self.dtype = getattr(codec, "codes_dtype", "int16")
        self.fields = {CODES: CondField((None, codec.num_codebooks), self.dtype)}
        if size := getattr(codec, "timbre_size", 0):
            self.fields[TIMBRE] = CondField((size,), "float32")

    def encode(self, values: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        """The codes of each wave; those of one number of steps are encoded together."""
        steps = [-(-wave.shape[1] // self.codec.hop) for wave in values]
        rows: dict[int, dict[str, np.ndarray]] = {}
        for count in sorted(set(steps)):
            some = [place for place, own in enumerate(steps) if own == count]
            length = count * self.codec.hop
            batch = torch.stack(
                [F.pad(values[place], (0, length - values[place].shape[1])) for place in some]
            )  # (n, 1, T)
            codes = self.codec.encode(batch, torch.full((len(some),), length))  # (n, T', K)
            for place, code in zip(some, codes[:, :count].cpu().numpy().astype(self.dtype), strict=True):
                rows[place] = {CODES: code}
            if TIMBRE in self.fields:
                for place, voice in zip(some, self.codec.voice(batch).numpy(), strict=True):
                    rows[place][TIMBRE] = voice
        return [rows[place] for place in range(len(values))]
