"""DPM-Solver and DPM-Solver++, multistep: 2M, 3M, and their SDEs, in the log of alpha / sigma.

Source: Lu et al. 2022, "DPM-Solver++", algorithm 2 and appendix; "DPM-Solver", appendix D; k-diffusion, sample_dpmpp_2m_sde and
sample_dpmpp_3m_sde (the noise of eta, the third order of the SDE).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.samplers.grid import Point, Share, Stepwise, Walk

FEW_STEPS = 15
"""Below so many, the last steps are of lower order, as in the authors' code."""


@dataclass(kw_only=True)
class DPMMultistep(Stepwise):
    """Of order 1 to 3, one evaluation a step; draws noise if eta is above 0.

    Attributes:
        order: 2 is 2M, for guided sampling; 3 is 3M.
        eta: 0 follows the ODE, 1 the SDE.
        predicts: which of the network's answers is taken for a polynomial: `x0` is DPM-Solver++, `eps` DPM-Solver.
        method: of the second order, `midpoint` or `heun`.
        lower_order_final: lower orders in the last steps where there are fewer than 15.
        euler_at_final: the first order in the last step, however many there are.
    """

    order: Annotated[int, Field(ge=1, le=3)] = 2
    eta: Share = 0.0
    predicts: Literal["x0", "eps"] = "x0"
    method: Literal["midpoint", "heun"] = "midpoint"
    lower_order_final: bool = True
    euler_at_final: bool = False

    leaves_end_out = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.predicts == "eps" and self.eta > 0 and self.final == "data":
            raise UserError(
                f"sample.eta: got {self.eta} with predicts eps and final data; expected 0, or predicts x0, or final first: the SDE of eps "
                "does not reach the data"
            )

    @property
    def needs_signal(self) -> bool:
        return self.predicts == "eps"

    def orders(self, steps: int, ends_in_data: bool) -> list[int]:
        """The order of each step."""
        found = [min(self.order, i + 1) for i in range(steps)]
        few = self.lower_order_final and self.steps < FEW_STEPS
        if few and steps > 1:
            found[-2] = min(found[-2], 2)
        if few or ends_in_data or self.euler_at_final:
            found[-1] = 1
        return found

    def solve(self, walk: Walk, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        points, answers = walk.points, list[Tensor]()
        for i, order in enumerate(self.orders(walk.steps, points[-1].sigma <= 0)):
            here, there = points[i], points[i + 1]
            x0, eps = walk.predict(x, here)
            answers = [x0 if self.predicts == "x0" else eps, *answers[:2]]
            before = [points[i - back].log_snr for back in range(1, order)]
            x, std = exponential_step(
                x, backward(answers[:order], before, here, there), here, there, self.eta, self.predicts, self.method
            )
            if std > 0 and there.sigma > 0:
                x = x + std * walk.noise(f"noise_{i}", x)
            yield x, x0


def backward(answers: Sequence[Tensor], before: Sequence[float], here: Point, there: Point) -> list[Tensor]:
    """The newest answer and its first and second differences, each times the step's length in log(alpha / sigma).

    Args:
        answers: the newest first, at `here` and at `before`.
    """
    if len(answers) == 1:
        return [answers[0]]
    h = there.log_snr - here.log_snr
    r0 = (here.log_snr - before[0]) / h
    first = (answers[0] - answers[1]) / r0
    if len(answers) == 2:
        return [answers[0], first]
    r1 = (before[0] - before[1]) / h
    older = (answers[1] - answers[2]) / r1
    bend = (first - older) / (r0 + r1)
    return [answers[0], first + r0 * bend, bend]


def exponential_step(
    x: Tensor, parts: Sequence[Tensor], here: Point, there: Point, eta: float, predicts: str, method: str
) -> tuple[Tensor, float]:
    """x at `there`, and the standard deviation of the noise that is still to be added.

    Args:
        parts: an answer and its differences, as from `backward`, one for each order.
    """
    h = there.log_snr - here.log_snr
    if predicts == "x0":
        # (1 - e^-H) and the integrals of a polynomial against its exponential; H is infinite in a first or last step, of order 1
        reach = h * (1 + eta)
        grown = -math.expm1(-reach)
        kept, std = (math.exp(-eta * h), math.sqrt(-math.expm1(-2 * eta * h))) if eta > 0 else (1.0, 0.0)
        x = there.sigma / here.sigma * kept * x + there.alpha * grown * parts[0]
        scale, std = there.alpha, there.sigma * std
        slopes = _weights(-reach, len(parts), grown, method)
    else:
        # sigma' e^h is alpha' sigma / alpha, which is finite where sigma' is 0
        grown = there.alpha * here.ratio - there.sigma
        x = there.alpha / here.alpha * x - (1 + eta) * grown * parts[0]
        scale, std = -(1 + eta) * there.sigma, math.sqrt(eta * ((there.alpha * here.ratio) ** 2 - there.sigma**2))
        slopes = _weights(h, len(parts), grown / there.sigma if there.sigma > 0 else 0.0, method)
    for weight, part in zip(slopes, parts[1:], strict=True):
        x = x + scale * weight * part
    return x, std


def _weights(z: float, order: int, grown: float, method: str) -> list[float]:
    """Of the differences, in units of |e^z - 1|: z is minus the length of the step for x0, the length for eps."""
    if order == 1:
        return []
    phi = math.expm1(z) / z - 1  # the integral of a line
    if order == 2:
        return [grown / 2 if method == "midpoint" else abs(phi)]
    bend = (math.expm1(z) - z) / z**2 - 0.5
    return [abs(phi), -bend if z < 0 else bend]
