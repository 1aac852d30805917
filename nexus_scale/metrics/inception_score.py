"""Inception score: how sure a classifier is of each sample, and how varied its answers are over all of them."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nexus_scale.metrics.moments import checked


class InceptionScore(NamedTuple):
    """Mean and standard deviation (over n) of the splits: 1 at worst, the number of classes at best."""

    mean: float
    std: float


def inception_score(logits: Tensor, *, splits: int = 10, seed: int | None = 2020) -> InceptionScore:
    """exp(mean KL(p(class | sample) | p(class))) of each split, in float64.

    It rises with the number of samples; published figures are of 50,000, 10 splits, and Inception's logits without bias.
    Source: Salimans et al. 2016, "Improved Techniques for Training GANs".

    Args:
        logits: (N, classes).
        seed: of the order in which samples are split, drawn as torch-fidelity does; None: as they are.
    Raises:
        ValueError: fewer samples than splits, or logits that are not finite.
    """
    logits = checked(logits).double()
    if not 1 <= splits <= len(logits):
        raise ValueError(f"got {len(logits)} samples in {splits} splits; expected at least one in each")
    if seed is not None:
        logits = logits[torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))]
    bounds = [i * len(logits) // splits for i in range(splits + 1)]
    found = [_score(logits[a:b].log_softmax(1)) for a, b in pairwise(bounds)]
    return InceptionScore(float(np.mean(found)), float(np.std(found)))


def _score(log_p: Tensor) -> float:
    p = log_p.exp()
    return float((p * (log_p - p.mean(0).log())).sum(1).mean().exp())
