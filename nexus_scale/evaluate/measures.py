"""Figures of sets by name: which is better, higher or lower, and how they are computed of features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nexus_scale.metrics.frechet import frechet_distance
from nexus_scale.metrics.inception_score import inception_score
from nexus_scale.metrics.kernel_distance import clip_mmd, kernel_inception_distance
from nexus_scale.metrics.neighbours import manifolds
from nexus_scale.metrics.statistics import Measure

Better = Literal["lower", "higher"]

WHOLE = 2000
"""Of at most so many samples the kernel distance is that of all; of more, the mean of a hundred subsets of a thousand."""

MANIFOLDS = ("precision", "recall", "density", "coverage")


def _kernel(x: Tensor, y: Tensor) -> float:
    size = None if min(len(x), len(y)) <= WHOLE else 1000
    return kernel_inception_distance(x, y, subset_size=size).mean


@dataclass(frozen=True)
class SetFigure:
    """One figure of a set.

    Attributes:
        better: None: neither by itself. Precision and density tell whether what is drawn lies among real samples, recall whether real ones
            lie among what is drawn. A model trained for a tenth of the steps may lead in one of them: early samples that are all alike lie
            among real ones (Kynkaanniemi et al. 2019, figure 1).
        of: how it is computed of drawn (M, D) and real (N, D) features; None: with others at once.
    """

    better: Better | None
    of: Callable[[Tensor, Tensor], float] | None = None


SETS: Mapping[str, SetFigure] = {
    "frechet": SetFigure("lower", frechet_distance),
    "kernel": SetFigure("lower", _kernel),
    "clip_mmd": SetFigure("lower", clip_mmd),
    "inception_score": SetFigure("higher", lambda x, _: inception_score(x).mean),
    **dict.fromkeys(MANIFOLDS, SetFigure(None)),
    "coverage": SetFigure("higher"),
}
"""`inception_score` takes logits (`inception.logits`), all others features of any kind."""

LEAST = 12
"""Samples of a set, at least: halves of them have more than the five neighbours that manifolds are made of."""


def measure_of(names: Sequence[str]) -> Measure:
    """What computes these figures of drawn and real features, together."""

    def measure(drawn: Tensor, real: Tensor) -> dict[str, float]:
        found = {name: of(drawn, real) for name in names if (of := SETS[name].of) is not None}
        if any(name in MANIFOLDS for name in names):
            k = min(5, len(real) - 1, len(drawn) - 1)
            neighbours = manifolds(real, drawn, k=k)._asdict()
            found |= {name: neighbours[name] for name in names if name in MANIFOLDS}
        return {name: float(found[name]) for name in names}

    return measure


ROWS: Mapping[str, Better] = {
    "following/group": "higher",
    "following/colour": "higher",
    "following/count": "higher",
    "following/position": "higher",
    "reconstruction/psnr": "higher",
    "reconstruction/ssim": "higher",
    "likelihood/bits": "lower",
    "speech/wer": "lower",
    "speech/cer": "lower",
    "speech/similarity": "higher",
    "music/key": "higher",
    "music/tempo": "higher",
    "music/instrument": "higher",
}
"""Figures that are means over samples."""


def better_of(figure: str) -> Better | None:
    """Which is better of a figure by its whole name, `classifier/frechet`; None: nothing says, or neither is by itself."""
    if figure in ROWS:
        return ROWS[figure]
    known = SETS.get(figure.rpartition("/")[2])
    return known.better if known else None


def finite_rows(values: Tensor) -> int:
    """How many samples a mean is of."""
    return int(torch.isfinite(values).sum())
