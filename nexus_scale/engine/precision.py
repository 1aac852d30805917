"""`precision: auto` measures before it chooses: on a CPU without bf16 units, bf16 can be hundreds of times slower than
float32."""

from __future__ import annotations

import logging
import time
from typing import Literal

import torch

logger = logging.getLogger(__name__)


def _seconds(dtype: torch.dtype, size: int = 256) -> float:
    """Best of three of one matrix product."""
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - begun)
    return best


def measured_precision(device: str | torch.device) -> Literal["float32", "bf16"]:
    """`bf16` on a GPU that supports it; on a CPU, the one that multiplies matrices faster. Logs what it found."""
    if torch.device(device).type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        logger.info(
            "precision auto: %s (the GPU %s bf16)",
            "bf16" if supported else "float32",
            "computes in" if supported else "lacks",
        )
        return "bf16" if supported else "float32"
    float32, bf16 = _seconds(torch.float32), _seconds(torch.bfloat16)
    # A tie goes to float32: bf16 must pay for its rounding.
    chosen: Literal["float32", "bf16"] = "bf16" if bf16 < 0.8 * float32 else "float32"
    logger.info(
        "precision auto: %s (a 256x256 product takes %.3f ms in float32, %.3f ms in bf16)",
        chosen,
        1e3 * float32,
        1e3 * bf16,
    )
    return chosen
