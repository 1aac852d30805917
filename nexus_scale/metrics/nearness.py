"""Whether what was drawn for something resembles that more than it resembles what others were drawn for; or what a run has seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nexus_scale.metrics.neighbours import nearest


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


class Memory(NamedTuple):
    """How near samples lie to what a run was trained on.

    Attributes:
        nearer_train: the share of drawn samples that are nearer to a training sample than to a held-out one, of equally many of both: 1/2
            where the run draws of the distribution, 1 where it draws what it was trained on. Ties count half.
        copied: the share that lie nearer to a training sample than all but 1 in 100 held-out samples do: 0.01 where nothing is copied.
        distances, places: of each drawn sample to its nearest training sample, (N,), and which that is.
    """

    nearer_train: float
    copied: float
    distances: Tensor
    places: Tensor


def memory_of(drawn: Tensor, train: Tensor, heldout: Tensor, seed: int = 0) -> Memory:
    """Compares distances of drawn (N, D) features to training (M, D) and held-out (K, D) ones.

    Source: Meehan et al. 2020, "A Three Sample Hypothesis Test for Evaluating Generative Models", whose idea this is, not its statistic.

    Raises:
        ValueError: widths that differ, values that are not finite, an empty set.
    """
    distances, places = (one[:, 0] for one in nearest(drawn, train))
    count = min(len(train), len(heldout))
    some_train, some_heldout = (
        of[torch.randperm(len(of), generator=torch.Generator().manual_seed(seed))[:count]] for of in (train, heldout)
    )
    to_train, to_heldout = (nearest(drawn, of).distances[:, 0] for of in (some_train, some_heldout))
    won = (to_train < to_heldout).double() + 0.5 * (to_train == to_heldout).double()
    usual = nearest(heldout, train).distances[:, 0].quantile(0.01)
    return Memory(float(won.mean()), float((distances < usual).double().mean()), distances, places)
