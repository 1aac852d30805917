"""Pictures as prompts: what an image encoder makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nexus_scale.contracts import CondField, Conditioner
from nexus_scale.interop.image_encoders import ImageEncoder

IMAGE_PROMPT = "image_prompt"


class ImagePromptConditioner(Conditioner):
    """Images (3, H, W) uint8 -> `image_prompt`: an embedding (D,), or with `states` (L, D).

    Args:
        spec: see `interop.image_encoders.find_image_encoder`.
        root: where relative folders start.
    """

    reads = "image"

    def __init__(self, spec: Mapping[str, Any], root: Path | None = None, device: str = "cpu"):
        self.encoder = ImageEncoder(spec, root, device)
        self.fingerprint = self.encoder.fingerprint
        self.fields = {IMAGE_PROMPT: CondField(self.encoder.shape, "float16")}

    def encode(self, values: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        made = self.encoder.encode(list(values)).numpy().astype(np.float16)
        return [{IMAGE_PROMPT: one} for one in made]
