"""Attention that fades with distance: a penalty on logits by how far places lie apart, in both directions.

Source: Press et al. 2022, "Train Short, Test Long: Attention with Linear Biases" (ALiBi), for sequences that are read one way; symmetric
as Voicebox has it (Le et al. 2023, section 4).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=64)
def slopes(num_heads: int) -> tuple[float, ...]:
    """Of each head: 2^(-8 / N), 2^(-16 / N), ... for a power of two N, else those of the power below and every other one of twice it."""
    power = 2 ** math.floor(math.log2(num_heads))
    first = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    more = [2.0 ** (-8 * (i + 1) / (2 * power)) for i in range(0, 2 * (num_heads - power), 2)]
    return (*first, *more)


def distance_bias(real: Tensor, num_heads: int, dtype: torch.dtype, *, before: int = 0) -> Tensor:
    """Minus slope times distance, and -inf at places that are not real, (B, N, before + L, before + L) of that dtype.

    Args:
        real: (B, L) bool.
        before: tokens in front, which lie near to every place and are all real: a time, a class.
    """
    places = torch.arange(real.shape[1], device=real.device)
    far = (places[:, None] - places).abs().float()  # bfloat16 counts to 256
    slope = torch.stack([far * -one for one in slopes(num_heads)]).to(dtype)  # (N, L, L)
    slope = F.pad(slope, (before, 0, before, 0))
    hidden = F.pad(~real, (before, 0))[:, None, None]  # (B, 1, 1, before + L)
    return slope.masked_fill(hidden, float("-inf"))
