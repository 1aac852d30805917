"""How far two pictures of edges, or other marks, agree."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def overlap(a: Tensor, b: Tensor, within: int = 0) -> Tensor:
    """Intersection over union of marks (B, H, W) bool, (B,) float32; two pictures without marks agree.

    `within`: a mark agrees with one of the other picture that is so many pixels away at most; of the two counts of agreeing marks, in `a`
    and in `b`, the mean is the intersection.
    """
    near_a, near_b = (F.max_pool2d(one[:, None].float(), 2 * within + 1, 1, within)[:, 0].bool() for one in (a, b))
    agree = ((a & near_b).flatten(1).sum(1) + (b & near_a).flatten(1).sum(1)).float() / 2
    union = a.flatten(1).sum(1) + b.flatten(1).sum(1) - agree
    return agree.where(union > 0, union + 1) / union.where(union > 0, union + 1)
