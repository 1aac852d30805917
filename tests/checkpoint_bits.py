"""What a checkpoint holds, as hashes: equal exactly where all bits are."""

from __future__ import annotations

from typing import Any

import torch
import xxhash


def hashes(checkpoint: Any) -> dict[str, str]:
    """XXH3-128 of each tensor of a checkpoint, by name."""
    return {
        name: xxhash.xxh3_128_hexdigest(checkpoint.tensor(name).contiguous().reshape(-1).view(torch.uint8).numpy())
        for name in checkpoint.names
    }
