"""PNDM as Stable Diffusion draws with it (PLMS): DDIM's step with a slope that is extrapolated from the last four.

The first step is taken twice: once to see the slope at its end, then with the mean of both. The weights are those of even steps.
Source: Liu et al. 2022, "Pseudo Numerical Methods for Diffusion Models on Manifolds", equations 11 and 12.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from nexus_scale.samplers.grid import Point, Stepwise, Walk

WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
"""Of the slopes, the newest first, by how many there are: Adams and Bashforth's."""


@dataclass(kw_only=True)
class PNDM(Stepwise):
    """Second order to begin with, fourth later."""

    @property
    def needs_signal(self) -> bool:
        return True

    def solve(self, walk: Walk, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        slopes = list[Tensor]()
        for here, there in walk.pairs:
            x0, eps = walk.predict(x, here)
            slopes = [eps, *slopes[:3]]
            slope = sum(weight * each for weight, each in zip(WEIGHTS[len(slopes) - 1], slopes, strict=True))
            assert isinstance(slope, Tensor)
            if len(slopes) == 1 and walk.steps > 1:
                slope = (eps + walk.predict(_moved(x, eps, here, there), there)[1]) / 2
            x = _moved(x, slope, here, there)
            yield x, x0


def _moved(x: Tensor, eps: Tensor, here: Point, there: Point) -> Tensor:
    ratio = there.alpha / here.alpha
    return ratio * x + (there.sigma - ratio * here.sigma) * eps
