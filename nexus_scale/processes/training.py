"""Which path, target, times and weight can be trained together."""

from __future__ import annotations

import torch
from torch import Tensor

from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError
from nexus_scale.processes.gaussian import TARGETS, coefficients
from nexus_scale.processes.paths import Path
from nexus_scale.processes.times import Times
from nexus_scale.processes.weights import LARGEST, Weight, weight_of

RAREST = 2.0**-24
"""Of draws in float32."""


def check_training(path: Path, target: str, times: Times, weight: Weight) -> None:
    """Checks that the times lie on the path, and that a network can learn the target at all of them.

    Raises:
        UserError: names what does not fit, and what would.
    """
    if target not in TARGETS:
        raise UserError(f"objective.target: no {target!r}; {nearest(target, list(TARGETS))}")
    _check_times(path, times)
    first = torch.zeros(1) if times.draws_zero else times.quantile(torch.tensor([RAREST]))
    drawn = torch.cat([first, times.quantile(torch.tensor([1e-4, 0.5, 1 - RAREST]))]).clamp_max(path.t_max)
    _check_target(path, target, times, drawn)
    _check_weight(path, target, weight, drawn[1:])  # the rarest are not met often enough to count


def _check_times(path: Path, times: Times) -> None:
    late, last = times.quantile(torch.tensor([0.999, 1 - RAREST])).tolist()
    if path.t_max == 1.0 and late > 1.0:
        raise UserError(
            f"objective.times: {times} reaches t = {late:.3g}, and {path} ends at 1; choose uniform, discrete, logit_normal, mode or "
            "stratified, or path edm"
        )
    if last <= 1.0 < path.t_max:
        raise UserError(
            f"objective.times: {times} ends at {last:.3g}, and {path} begins in noise at {path.t_max:g}, which the network would never "
            "see; choose log_normal"
        )


def _check_target(path: Path, target: str, times: Times, drawn: Tensor) -> None:
    try:
        a, b = coefficients(path, target, drawn)
    except ValueError as error:
        raise UserError(f"objective.target: {error}") from None
    finite = a.isfinite() & b.isfinite()
    if not finite.all():
        raise UserError(
            f"objective.target: {target!r} on {path} is infinite at t = {float(drawn[~finite][0]):.3g}, which {times} may draw; choose "
            "target v, eps or x0, or times that keep off it, such as discrete or {name: uniform, earliest: 0.00001}"
        )


def _check_weight(path: Path, target: str, weight: Weight, drawn: Tensor) -> None:
    values = weight_of(weight, path, target, drawn)
    if values is None:
        return
    largest = int(values.nan_to_num(nan=torch.inf).argmax())
    if not values[largest] <= LARGEST:
        raise UserError(
            f"objective.weight: {weight} on {path} is {float(values[largest]):.3g} at t = {float(drawn[largest]):.3g} for target "
            f"{target!r}, and the rest would count for nothing; expected at most {LARGEST:g}: choose another weight or target, or times "
            "that keep off that end, such as discrete or {name: uniform, earliest: 0.01}"
        )
