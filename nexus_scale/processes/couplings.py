"""Which noise goes with which data: drawn independently, assigned so that the lines are short, or given by the data.

Source: Tong et al. 2023 and Pooladian et al. 2023 (minibatch optimal transport); Liu et al. 2022 (reflow: a flow's own pairs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.processes.paths import find_named


class Coupling(Protocol):
    """How data and noise are paired in training."""

    @property
    def fields(self) -> Sequence[str]:
        """Of batches: those of clean samples in model space and of their noise; empty: data are noised anew each time."""
        ...

    @property
    def group(self) -> int:
        """Neighbours in the global batch that exchange their noise; 1: none do."""
        ...

    def paired(self, x0: Tensor, noise: Tensor, positions: Tensor, whole: bool) -> Tensor:
        """The noise that goes with each of x0, (B, ...).

        Args:
            noise: one draw for each position.
            positions: of the samples in the global batch, (B,) on the CPU.
            whole: refuses a micro-batch which is no multiple of what is paired together.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Independent:
    """Each sample has the noise of its position."""

    fields = ()
    group = 1

    def paired(self, x0: Tensor, noise: Tensor, positions: Tensor, whole: bool) -> Tensor:
        return noise


@dataclass(frozen=True, kw_only=True)
class OptimalTransport:
    """Neighbours in the global batch exchange their noise, so that the squared distances from data to noise add up to the least.

    The assignment is exact. Positions [0, group), [group, 2 group), ... of the global batch exchange among themselves, so the pairs
    are the same on any number of workers whose micro-batch is a multiple of `group`; another micro-batch is refused. The host computes
    it from the values, and waits for the device once in a micro-batch. Conditions stay with their data, and noise then depends on them,
    which classifier-free guidance does not know.
    """

    group: Annotated[int, Field(ge=2, le=10_000)] = 64

    fields = ()

    def paired(self, x0: Tensor, noise: Tensor, positions: Tensor, whole: bool) -> Tensor:
        if x0.is_meta:
            return noise  # a rehearsal, without values
        parts = _runs(positions // self.group)
        if whole and any(len(rows) != self.group for rows in parts):
            raise UserError(
                f"objective.coupling.group: {self.group} samples exchange their noise, and the micro-batch has {len(positions)}: set "
                f"cluster.micro_batch to a multiple of {self.group}, or group to a divisor of {len(positions)}"
            )
        order = torch.cat([rows[_assignment(x0[rows], noise[rows])] for rows in parts])
        return noise[order.to(noise.device)]


@dataclass(frozen=True, kw_only=True)
class Given:
    """Samples with the noise that they were drawn from: `latents` and `noise` of `nexus generate --latents` (reflow, distillation)."""

    fields = ("latents", "noise")
    group = 1

    def paired(self, x0: Tensor, noise: Tensor, positions: Tensor, whole: bool) -> Tensor:
        return noise


def _runs(groups: Tensor) -> list[Tensor]:
    """Rows of equal, neighbouring numbers."""
    _, counts = torch.unique_consecutive(groups, return_counts=True)
    return list(torch.arange(len(groups)).split(counts.tolist()))


def _assignment(x0: Tensor, noise: Tensor) -> Tensor:
    """For each row of x0 that of its noise, (B,) on the CPU: the permutation of the least sum of squared distances."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise UserError(
            "objective.coupling: optimal_transport needs scipy, which is not installed: pip install 'nexus-scale[flow]'"
        ) from None
    # |x - y|^2 = |x|^2 + |y|^2 - 2 x.y, and only the last depends on the assignment
    cost = -(x0.double().flatten(1) @ noise.double().flatten(1).T)
    return torch.from_numpy(linear_sum_assignment(cost.cpu().numpy())[1])


COUPLINGS: dict[str, type[Any]] = {"independent": Independent, "optimal_transport": OptimalTransport, "given": Given}


def find_coupling(spec: str | Mapping[str, Any]) -> Coupling:
    """A coupling by name (`independent`, `optimal_transport`, `given`), or {name: ..., arguments}.

    Raises:
        UserError: unknown name or argument; names the nearest.
    """
    coupling: Coupling = find_named(COUPLINGS, spec, "objective.coupling")
    return coupling
