"""How strong several systems are, of pairwise comparisons: Bradley and Terry's model, with Davidson's for ties.

P(i beats j) = s_i / (s_i + s_j + nu sqrt(s_i s_j)) and P(tie) = nu sqrt(s_i s_j) / (...), s = exp(score). Without ties nu is 0. Both are
multinomial logits, so that the likelihood is concave and Newton's method finds its one maximum.

Sources: Bradley and Terry (1952); Davidson (1970), "On extending the Bradley-Terry model to accommodate ties".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

PRIOR = 1.0
"""Comparisons that each pair of systems has beforehand, spread evenly over the outcomes: one that wins all has a finite score, too."""

ROUNDS, LARGEST_STEP, PRECISION = 200, 1.0, 1e-10


class Strengths(NamedTuple):
    """`scores` (..., S): logarithms of strength, with mean 0 over the systems; `ties` (...): log nu, minus infinity without ties."""

    scores: np.ndarray
    ties: np.ndarray

    def beats(self) -> np.ndarray:
        """The chance that the row's system wins over the column's where there is a choice, (..., S, S)."""
        apart = self.scores[..., :, None] - self.scores[..., None, :]
        return np.asarray(1 / (1 + np.exp(-apart)))


def strengths(wins: np.ndarray, ties: np.ndarray | None = None, prior: float = PRIOR) -> Strengths:
    """The scores that make comparisons likeliest, for any number of tables at once.

    Args:
        wins: how often the row's system won over the column's, (..., S, S).
        ties: how often neither did, (..., S, S), symmetric; None where there were none to choose.
        prior: see `PRIOR`; 0 is the plain likelihood, which has no maximum where a system never loses.
    """
    systems = wins.shape[-1]
    first, second = np.triu_indices(systems, 1)
    counts = [wins[..., first, second], wins[..., second, first]]
    if ties is not None:
        counts.append(ties[..., first, second])
    observed = np.stack(counts, -1).astype(np.float64) + prior / len(counts)  # (..., pairs, outcomes)
    features = _features(systems, first, second, len(counts))
    flat = observed.reshape(-1, *observed.shape[-2:])
    values = _maximum(flat, features).reshape(*wins.shape[:-2], -1)
    scores = values[..., :systems]
    nu = values[..., systems] if ties is not None else np.full(wins.shape[:-2], -np.inf)
    return Strengths(scores - scores.mean(-1, keepdims=True), nu)


def _features(systems: int, first: np.ndarray, second: np.ndarray, outcomes: int) -> np.ndarray:
    """What each outcome of each pair adds to its logit, of the scores and log nu: (pairs, outcomes, parameters)."""
    one = np.eye(systems)
    rows = [one[first], one[second]]
    if outcomes == 3:
        rows.append((one[first] + one[second]) / 2)
    features = np.stack(rows, 1)
    if outcomes == 3:
        tied = np.broadcast_to(np.array([0.0, 0.0, 1.0])[:, None], (len(first), 3, 1))
        features = np.concatenate([features, tied], -1)
    return features


def _maximum(observed: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Newton's method, tables (B, pairs, outcomes) at once -> parameters (B, P)."""
    parameters = features.shape[-1]
    systems = parameters - (features.shape[1] == 3)
    values = np.zeros((len(observed), parameters))
    totals = observed.sum(-1)
    flat = features.reshape(-1, parameters)
    squares = (flat[:, :, None] * flat[:, None, :]).reshape(len(flat), -1)
    held = np.zeros((parameters, parameters))
    held[:systems, :systems] = 1.0  # a shift of all scores changes nothing: hold their sum
    for _ in range(ROUNDS):
        logits = (values @ flat.T).reshape(observed.shape)
        chances = np.exp(logits - logits.max(-1, keepdims=True))
        chances /= chances.sum(-1, keepdims=True)
        expected = totals[..., None] * chances
        slope = (observed - expected).reshape(len(values), -1) @ flat
        mean = np.einsum("bpk,pkj->bpj", chances, features)
        curve = (expected.reshape(len(values), -1) @ squares).reshape(-1, parameters, parameters)
        curve -= mean.swapaxes(1, 2) @ (totals[..., None] * mean)
        try:
            step = np.linalg.solve(curve + held, slope[..., None])[..., 0]
        except np.linalg.LinAlgError:  # scores that run away leave a flat likelihood behind
            break
        values += np.clip(step, -LARGEST_STEP, LARGEST_STEP)
        if np.abs(step).max(initial=0.0) < PRECISION:
            return values
    raise ValueError(
        "these comparisons have no likeliest scores: a system never loses, or two groups never meet; use a prior"
    )
