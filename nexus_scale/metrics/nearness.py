"""Whether what was drawn for something resembles that more than it resembles what others were drawn for."""

from __future__ import annotations

import torch
from torch import Tensor


def nearer(samples: Tensor, prompts: Tensor) -> float:
    """How often a sample is nearer to its own prompt than to another's, over all others: 1 always, 1/2 by chance, 0 never.

    Args:
        samples, prompts: features (N, D) in one space, a row of each belongs together; nearness is their cosine, of deviations from the
            prompts' mean, since what all features share says nothing. Ties count half.
    """
    mean = prompts.mean(0)
    similar = (
        torch.nn.functional.normalize(samples - mean, dim=1) @ torch.nn.functional.normalize(prompts - mean, dim=1).T
    )
    own = similar.diagonal()[:, None]
    others = ~torch.eye(len(samples), dtype=torch.bool)
    won = (own > similar).float() + 0.5 * (own == similar).float()
    return float(won[others].mean())
