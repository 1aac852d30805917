"""How far several raters agree beyond chance."""

from __future__ import annotations

import numpy as np


def krippendorff_alpha(counts: np.ndarray) -> float:
    """Krippendorff's alpha for categories without order: 1 is agreement throughout, 0 is chance; raters may have left units out.

    Args:
        counts: how many raters gave each unit each category, (units, categories). Units with fewer than two ratings say nothing.
    Returns:
        alpha; NaN where no unit has two ratings, or where all ratings are one category, of which nobody can say what chance would give.
    Source: Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), C and D.
    """
    counts = np.asarray(counts, np.float64)
    counts = counts[counts.sum(1) >= 2]
    if not len(counts):
        return float("nan")
    ratings = counts.sum(1)
    together = (counts * (counts - 1) / (ratings - 1)[:, None]).sum()  # pairs within units that agree
    totals, n = counts.sum(0), counts.sum()
    by_chance = (totals * (totals - 1)).sum()
    if by_chance == n * (n - 1):
        return float("nan")
    return float(((n - 1) * together - by_chance) / (n * (n - 1) - by_chance))


def alpha_of_pairs(counts: np.ndarray) -> float:
    """Krippendorff's alpha of choices within pairs, whichever of a pair is called its first: each counts once in either order.

    Args:
        counts: how many raters chose the first, the second and neither of each pair, (pairs, 3).
    """
    counts = np.asarray(counts)
    return krippendorff_alpha(np.concatenate([counts, counts[:, [1, 0, 2]]]))
