"""UniPC: a multistep predictor, and a corrector that sees the network's answer at the predicted place and costs no evaluation.

Source: Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework", algorithms 1 and 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from nexus_scale.samplers.grid import Point, Stepwise, Walk


@dataclass(kw_only=True)
class UniPC(Stepwise):
    """Of order 1 to 4 and one more by the corrector, one evaluation a step.

    Attributes:
        order: of the predictor; 2 for guided sampling, 3 without.
        predicts: which of the network's answers is taken for a polynomial: x0 or eps.
        scaling: B(h) of the paper: `bh1`, h, or `bh2`, e^h - 1.
        lower_order_final: lower orders in the last steps.
        corrects: whether the corrector is there.
    """

    order: Annotated[int, Field(ge=1, le=4)] = 2
    predicts: Literal["x0", "eps"] = "x0"
    scaling: Literal["bh1", "bh2"] = "bh2"
    lower_order_final: bool = True
    corrects: bool = True

    leaves_end_out = True

    @property
    def needs_signal(self) -> bool:
        return True

    def solve(self, walk: Walk, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        points, seen, order = walk.points, list[tuple[Tensor, Point]](), 0
        before = x
        for i in range(walk.steps):
            here, there = points[i], points[i + 1]
            x0, eps = walk.predict(x, here)
            answer = x0 if self.predicts == "x0" else eps
            if i > 0 and self.corrects:
                x = self._step(before, seen[:order], here, answer)
            seen = [(answer, here), *seen[:3]]
            left = walk.steps - i if self.lower_order_final else self.order
            order = 1 if there.sigma <= 0 else min(self.order, left, i + 1)
            before, x = x, self._step(x, seen[:order], there, None)
            yield x, x0

    def _step(self, x: Tensor, seen: Sequence[tuple[Tensor, Point]], there: Point, new: Tensor | None) -> Tensor:
        """x at `there` from x where the newest of `seen` was; with the answer at `there`, the corrector's."""
        (answer, here), *others = seen
        h = there.log_snr - here.log_snr
        if self.predicts == "x0":
            z, scale = -h, there.alpha
            x = there.sigma / here.sigma * x - there.alpha * math.expm1(-h) * answer
        else:
            z, scale = h, there.sigma
            x = there.alpha / here.alpha * x - (there.alpha * here.ratio - there.sigma) * answer
        if not others and new is None:
            return x
        places = [(point.log_snr - here.log_snr) / h for _, point in others]
        slopes = [(each - answer) / place for (each, _), place in zip(others, places, strict=True)]
        if new is not None:
            places, slopes = [*places, 1.0], [*slopes, new - answer]
        unit = z if self.scaling == "bh1" else math.expm1(z)
        for weight, slope in zip(_weights(z, unit, places), slopes, strict=True):
            x = x - scale * unit * weight * slope
        return x


def _weights(z: float, unit: float, places: Sequence[float]) -> list[float]:
    """Of the slopes to other places, so that polynomials are integrated exactly; one slope has 1/2, as the authors'."""
    count = len(places)
    if count == 1:
        return [0.5]
    phi, moments, factorial = math.expm1(z) / z - 1, list[float](), 1
    for power in range(1, count + 1):
        moments.append(phi * factorial / unit)
        factorial *= power + 1
        phi = phi / z - 1 / factorial
    rows = np.vander(np.array(places), count, increasing=True).T
    return [float(weight) for weight in np.linalg.solve(rows, np.array(moments))]
