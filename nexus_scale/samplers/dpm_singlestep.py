"""DPM-Solver++, singlestep: 2S and 3S. Each step of order k looks at k places of the grid, and begins anew.

Source: Lu et al. 2022, "DPM-Solver++", algorithm 1; orders by the number of evaluations as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from nexus_scale.samplers.dpm_multistep import exponential_step
from nexus_scale.samplers.grid import Point, Stepwise, Walk


@dataclass(kw_only=True)
class DPMSinglestep(Stepwise):
    """Of order 1 to 3; `steps` counts evaluations.

    Attributes:
        order: 2 is 2S.
        method: `midpoint` or `heun`.
        lower_order_final: the last step is of the first order, and the one before it of a lower one where `steps` does not divide.
    """

    order: Annotated[int, Field(ge=1, le=3)] = 2
    method: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = True

    leaves_end_out = True

    @property
    def needs_signal(self) -> bool:
        return self.order > 1

    def orders(self, steps: int, ends_in_data: bool) -> list[int]:
        """The order with which each place of the grid is reached from the beginning of its step."""
        whole = [i % self.order + 1 for i in range(steps)]
        if self.lower_order_final and steps % self.order == 0 and self.order > 1:
            # the last whole step makes place for a step of the first order
            whole[-self.order :] = [1, *range(1, self.order)] if self.order == 2 else [1, 2, 1]
        if ends_in_data:
            whole[-1] = 1
        return whole

    def solve(self, walk: Walk, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        points, begin, seen = walk.points, x, list[tuple[Tensor, Point]]()
        for i, order in enumerate(self.orders(walk.steps, points[-1].sigma <= 0)):
            x0, _ = walk.predict(x, points[i])
            if order == 1:
                begin, seen = x, []
            seen.append((x0, points[i]))
            method = "heun" if order == 3 else self.method
            x, _ = exponential_step(
                begin, self._forward(seen, points[i + 1]), seen[0][1], points[i + 1], 0.0, "x0", method
            )
            yield x, x0

    def _forward(self, seen: list[tuple[Tensor, Point]], there: Point) -> list[Tensor]:
        """The first answer and its differences to those since, each times the length of the whole step."""
        (first, begin), *later = seen
        if not later:
            return [first]
        h = there.log_snr - begin.log_snr
        far = (later[-1][1].log_snr - begin.log_snr) / h
        slope = (later[-1][0] - first) / far
        if len(later) == 1 or self.method == "midpoint":
            return [first, slope]
        near = (later[0][1].log_snr - begin.log_snr) / h
        bend = ((later[0][0] - first) / near - slope) / (near - far)
        return [first, slope - far * bend, 2 * bend]
