"""How many tokens are hidden at a time, and which: the discrete twin of noise. At t = 0 all are known, at t = 1 all are hidden.

Source: Chang et al. 2022, "MaskGIT", section 3.3, whose r is 1 - t; Borsos et al. 2023, "SoundStorm", section 3.2, for levels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, get_args

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.processes.paths import find_named

Kind = Literal["uniform", "linear", "cosine"]
Levels = Kind | tuple[Annotated[float, Field(ge=0, le=1e6)], ...]
LEVELS = get_args(Kind)


class MaskSchedule(Protocol):
    """What share of the tokens is hidden."""

    def share(self, t: Tensor) -> Tensor:
        """Times in [0, 1] -> shares in [0, 1], rising from 0 to 1; elementwise."""
        ...


@dataclass(frozen=True, kw_only=True)
class CosineMasks:
    """sin(pi t / 2): most of the walk from t = 1 few tokens become known."""

    def share(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))


@dataclass(frozen=True, kw_only=True)
class PowerMasks:
    """1 - (1 - t)^exponent; 1 is linear, MaskGIT's square and cube are concave, a square root is convex."""

    exponent: Annotated[float, Field(gt=0, le=100)] = 1.0

    def share(self, t: Tensor) -> Tensor:
        return 1 - (1 - t) ** self.exponent


SCHEDULES: dict[str, type[Any]] = {"cosine": CosineMasks, "power": PowerMasks, "linear": PowerMasks}


def find_masks(spec: str | Mapping[str, Any], where: str = "schedule") -> MaskSchedule:
    """A schedule by its name in `SCHEDULES`, such as `cosine`, or {name: power, exponent: 2}."""
    schedule: MaskSchedule = find_named(SCHEDULES, spec, where)
    return schedule


def ranks(scores: Tensor, among: Tensor) -> Tensor:
    """The place of each score, (B, T), among those of its row where `among` is True, from the lowest, 0; others behind them."""
    ordered = torch.where(among, scores, math.inf).argsort(dim=1, stable=True)
    places = torch.arange(scores.shape[1], device=scores.device).expand_as(ordered)
    return torch.empty_like(ordered).scatter(1, ordered, places)


def hide(u: Tensor, count: Tensor, among: Tensor) -> Tensor:
    """Which tokens are hidden: of those `among` (B, T) that may be, `count` (B,) in each row, with the lowest u (B, T)."""
    return among & (ranks(u, among) < count[:, None])


def hide_each(u: Tensor, share: Tensor, among: Tensor) -> Tensor:
    """Which tokens are hidden, each by itself with probability `share` (B,); but one of each row, that with the lowest u, always."""
    lowest = torch.where(among, u, math.inf).amin(1)
    return among & (u <= torch.maximum(share, lowest)[:, None])


def level_weights(kind: Levels, num_levels: int, first: int = 0) -> Tensor:
    """How often each of K levels is trained, (K,) float64 that add up to 1; 0 before the first.

    `linear` and `cosine` train coarse levels more often: K - i and cos(pi i / (2 K)) for the i-th from `first`, as in MaskGCT's code; or
    a weight for each level.

    Raises:
        UserError: no such kind; weights of another number of levels, or of none that is trained.
    """
    i = torch.arange(num_levels, dtype=torch.float64) - first
    named = {"uniform": torch.ones_like(i), "linear": num_levels - i, "cosine": torch.cos(i / num_levels * math.pi / 2)}
    if kind not in LEVELS if isinstance(kind, str) else len(kind) != num_levels:
        raise UserError(
            f"objective.levels: got {kind!r}; expected {', '.join(LEVELS)}, or {num_levels} weights, one for each level"
        )
    weights = named[kind] if isinstance(kind, str) else torch.tensor(kind, dtype=torch.float64)
    weights = torch.where(i < 0, 0.0, weights)
    if not bool(weights.sum() > 0):
        raise UserError(
            f"objective.levels: got {kind!r}; expected a weight above 0 among levels {first} to {num_levels - 1}"
        )
    return weights / weights.sum()
