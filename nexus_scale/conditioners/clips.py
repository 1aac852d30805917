"""Clips as the codes of a tokenizer: whole, without what a mask covers, as outlines, and at half the size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import CondField, Conditioner, UserError
from nexus_scale.data.manifest import DataError
from nexus_scale.processes.followed import Canny
from nexus_scale.processes.masks import without
from nexus_scale.processes.pixels import to_unit_range

VIDEO_CODES = "video_codes"
MASKED, OUTLINES, LOW = (f"{view}_{VIDEO_CODES}" for view in ("masked", "outline", "low"))


def outlines_of(clip: Tensor) -> Tensor:
    """What `Canny` makes of each frame of a clip (3, F, H, W) uint8; of the same shape."""
    return torch.stack([Canny()(frame) for frame in clip.unbind(1)], dim=1)


class ClipConditioner(Conditioner):
    """Clips (3, F, H, W) uint8 -> `video_codes` (T,), frame by frame and row by row; the first frame's are those of an image of it.

    Args:
        tokenizer: `interop.tokenizers.OwnTokenizer`.
    """

    reads = "video"

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.fingerprint = tokenizer, str(tokenizer.fingerprint)
        self.dtype = "int16" if tokenizer.codebook_size <= 1 << 15 else "int32"
        self.fields = {VIDEO_CODES: CondField((None,), self.dtype)}

    def encode(self, values: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        """The codes of each, of one size.

        Raises:
            DataError: clips that the tokenizer does not take.
        """
        return [{VIDEO_CODES: codes} for codes in self._coded(self.pixels(values))]

    def encode_more(
        self, values: Sequence[Any], masks: Tensor | None, *, outlined: bool, low: bool
    ) -> list[dict[str, np.ndarray]]:
        """Beside `video_codes`, with masks (B, 1, H, W) `masked_video_codes` of what they leave; where `outlined`,
        `outline_video_codes` of what `Canny` makes of each frame; where `low`, `low_video_codes` of clips of half the height and width."""
        x = self.pixels(values)
        views: dict[str, Tensor] = {VIDEO_CODES: x}
        if masks is not None:
            views[MASKED] = without(x, masks[:, :, None])
        if outlined:
            views[OUTLINES] = self.pixels([outlines_of(clip) for clip in values])
        if low:
            views[LOW] = F.avg_pool3d(x, (1, 2, 2))
        coded: Mapping[str, list[np.ndarray]] = {name: self._coded(view) for name, view in views.items()}
        return [{name: each[row] for name, each in coded.items()} for row in range(len(values))]

    def pixels(self, values: Sequence[Any]) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1]."""
        clips = torch.stack(list(values))
        try:
            self.tokenizer.check(clips.shape[1:])
        except UserError as error:
            raise DataError(str(error)) from error
        return to_unit_range(clips, clips.dtype, "video")

    def _coded(self, x: Tensor) -> list[np.ndarray]:
        return list(self.tokenizer.encode(x).numpy().astype(self.dtype))
