"""How far a prediction is from its target: squared, or robust to outliers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.processes.paths import find_named

Mean = Callable[[Tensor], Tensor]
"""Of a sample's values: (B, C, ...) -> (B,)."""


def pseudo_huber(squares: Tensor, c: Tensor | float) -> Tensor:
    """sqrt(d^2 + c^2) - c of squares d^2, elementwise: d^2 / 2c of small distances, d - c of large ones.

    Source: Charbonnier et al. 1997; Song & Dhariwal 2024, "Improved Techniques for Training Consistency Models", equation 8.
    """
    # without the difference, which would lose the digits of small ones
    return squares / (torch.sqrt(squares + c**2) + c)


class Distance(Protocol):
    """A distance of predictions from targets, one a sample."""

    def of(self, squares: Tensor, mean: Mean) -> Tensor:
        """From the squared differences (B, C, ...) and the mean over a sample's values, (B,)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Squared:
    """The mean squared difference."""

    def of(self, squares: Tensor, mean: Mean) -> Tensor:
        return mean(squares)


@dataclass(frozen=True, kw_only=True)
class PseudoHuber:
    """2c (sqrt(d^2 + c^2) - c): the squared difference where it is small, 2c times the distance where it is large.

    Args:
        c: where the one becomes the other, in units of the target.
        per: `value`: d is each value's difference, and their mean is taken; `sample`: d is a sample's root mean square.
    """

    c: Annotated[float, Field(gt=0, le=1e6)] = 0.1
    per: Literal["value", "sample"] = "value"

    def of(self, squares: Tensor, mean: Mean) -> Tensor:
        if self.per == "sample":
            return 2 * self.c * pseudo_huber(mean(squares), self.c)
        return mean(2 * self.c * pseudo_huber(squares, self.c))


DISTANCES: dict[str, type[Any]] = {"squared": Squared, "pseudo_huber": PseudoHuber}


def find_distance(spec: str | Mapping[str, Any], where: str = "distance") -> Distance:
    """A distance by its name in `DISTANCES`, `squared` or `pseudo_huber`, or {name: ..., arguments}.

    Raises:
        UserError: unknown name or argument; names the nearest.
    """
    distance: Distance = find_named(DISTANCES, spec, where)
    return distance
