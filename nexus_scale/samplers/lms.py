"""Linear multistep (Adams-Bashforth on uneven steps) in sigma / alpha.

Source: k-diffusion, sample_lms; its coefficients are integrals of Lagrange's polynomials, exact here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field
from torch import Tensor

from nexus_scale.samplers.grid import Stepwise, Walk


@dataclass(kw_only=True)
class LMS(Stepwise):
    """Of the order of the slopes it remembers, one evaluation a step.

    Attributes:
        order: slopes, that of the step included.
    """

    order: Annotated[int, Field(ge=1, le=8)] = 4

    ends_at_ratio = True

    @property
    def needs_signal(self) -> bool:
        return True

    def solve(self, walk: Walk, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        ratios = [point.ratio for point in walk.points]
        y, slopes = x / walk.points[0].alpha, list[Tensor]()
        for i, (here, there) in enumerate(walk.pairs):
            x0, slope = walk.predict(here.alpha * y, here)
            slopes = [slope, *slopes[: self.order - 1]]
            weights = lagrange_weights(ratios[i::-1][: len(slopes)], ratios[i + 1])
            y = y + sum(weight * each for weight, each in zip(weights, slopes, strict=True))
            yield there.alpha * y, x0


def lagrange_weights(nodes: Sequence[float], end: float) -> list[float]:
    """The integral from nodes[0] to `end` of each of Lagrange's polynomials through the nodes."""
    scale = end - nodes[0]
    places = [(node - nodes[0]) / scale for node in nodes]
    weights = []
    for i, place in enumerate(places):
        others = places[:i] + places[i + 1 :]
        polynomial = np.polynomial.Polynomial.fromroots(others) if others else np.polynomial.Polynomial([1.0])
        weights.append(float(polynomial.integ()(1.0) / polynomial(place)) * scale)
    return weights
