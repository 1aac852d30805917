"""Features as they stream by: their moments, or the features themselves, merged over workers.

`Moments` keeps sums and no sample; `Stack` keeps the features, each at the position of its sample, for metrics that need all of them.
Both have a `state` of tensors. How a set is split into batches and over workers does not matter:

- to a `Stack` not at all: what is computed of it has the same bits, since features are put in the order of their positions first;
- to `Moments` up to the order of its sums in float64, some 1e-15 of the second moment, where features of networks have 1e-7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
import xxhash
from torch import Tensor


def checked(features: Tensor, width: int | None = None) -> Tensor:
    """Features (N, D) without their graph.

    Raises:
        ValueError: another shape or width, or values that are not finite.
    """
    if features.ndim != 2 or (width is not None and features.shape[1] != width):
        raise ValueError(f"got features {tuple(features.shape)}; expected (N, {'D' if width is None else width})")
    if not bool(features.isfinite().all()):
        bad = int((~features.isfinite()).any(1).sum())
        raise ValueError(f"got features that are not finite in {bad} of {len(features)} samples")
    return features.detach()


class Moments:
    """Count, mean and covariance of features that are seen once, in float64.

    The sums are of the values and not of deviations from a mean, so the sum of two states is the state of both sets: an all-reduce merges.

    Attributes:
        count: samples seen.
    """

    def __init__(self, width: int):
        """For features of `width` values, on the device of the first that are added."""
        self.width, self.count = width, 0
        self._weights = torch.zeros(2, dtype=torch.float64)  # sums of w and of w^2
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._outer = torch.zeros(width, width, dtype=torch.float64)

    @classmethod
    def of(cls, features: Tensor, weights: Tensor | None = None) -> Moments:
        """The moments of one set (N, D)."""
        return cls(checked(features).shape[1]).add(features, weights)

    def add(self, features: Tensor, weights: Tensor | None = None) -> Self:
        """Adds (N, D), alike unless positive `weights` (N,) are given; only their ratios count.

        Raises:
            ValueError: another width, values that are not finite, weights of another shape or not positive.
        """
        x = checked(features, self.width).double()
        w = torch.ones(len(x), dtype=x.dtype, device=x.device) if weights is None else weights.detach().to(x)
        if w.shape != (len(x),) or not bool((w > 0).all()):
            raise ValueError(f"got weights {tuple(w.shape)}; expected a positive one for each of {len(x)}")
        self._to(x.device)
        weighted = w[:, None] * x
        self.count += len(x)
        self._weights += torch.stack([w.sum(), w.square().sum()])
        self._sum += weighted.sum(0)
        self._outer += weighted.T @ x
        return self

    def merge(self, other: Moments) -> Self:
        """Adds what another has seen."""
        if other.width != self.width:
            raise ValueError(f"got moments of {other.width} values; expected {self.width}")
        self.count += other.count
        for mine, theirs in zip(self._sums, other._sums, strict=True):
            mine += theirs.to(mine.device)
        return self

    @property
    def mean(self) -> Tensor:
        """(D,) float64."""
        self._need(1)
        return self._sum / self._weights[0]

    @property
    def covariance(self) -> Tensor:
        """(D, D) float64, unbiased: over n - 1, and over its like for weights that differ (as `numpy.cov(..., aweights)`)."""
        self._need(2)
        total, squares = self._weights
        outer = self._outer - torch.outer(self._sum, self._sum) / total
        return (outer + outer.T) / 2 / (total - squares / total)

    def factor(self) -> Tensor:
        """A (rank, D) with A^T A = the covariance. Directions that are nothing but rounding are left out: the roots of their
        variances, each 1e-8 and not 1e-16, would add up."""
        values, vectors = torch.linalg.eigh(self.covariance)
        second = self._outer.diagonal().sum() / self._weights[0]
        kept = values > self.width * torch.finfo(torch.float64).eps * second
        return values[kept].sqrt()[:, None] * vectors[:, kept].T

    def state(self) -> dict[str, Tensor]:
        """Copies of the sums; added to those of other workers, they are the state of all."""
        count = torch.tensor([self.count], dtype=torch.int64)
        return {"count": count} | dict(zip(self._NAMES, (s.clone() for s in self._sums), strict=True))

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Moments:
        """Raises a ValueError for what is no state of moments."""
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        width = shapes.get("sum", (0,))[0]
        if shapes != {"count": (1,), "weights": (2,), "sum": (width,), "outer": (width, width)}:
            raise ValueError(f"got {shapes}; expected the state of Moments: count, weights, sum, outer")
        made = cls(width)
        made.count = int(state["count"])
        made._weights, made._sum, made._outer = (state[name].double().clone() for name in cls._NAMES)
        return made

    _NAMES = ("weights", "sum", "outer")

    @property
    def _sums(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._weights, self._sum, self._outer

    def _to(self, device: torch.device) -> None:
        if self._sum.device != device:
            self._weights, self._sum, self._outer = (one.to(device) for one in self._sums)

    def _need(self, samples: int) -> None:
        if self.count < samples:
            raise ValueError(f"got moments of {self.count} samples; expected at least {samples}")


CHUNK = 1024
"""Samples at a time, where moments are taken of a stack: fixed, so that the order of sums is."""


class Stack:
    """Features of all samples, or of a random `limit` of them, by the position of each sample in its set.

    Which are kept is a function of (seed, position), the `limit` smallest hashes, and so the same for any split and order.
    """

    def __init__(self, limit: int | None = None, seed: int = 0):
        self.limit, self.seed = limit, seed
        self._positions: list[Tensor] = []
        self._features: list[Tensor] = []

    def __len__(self) -> int:
        return sum(len(one) for one in self._positions)

    def add(self, features: Tensor, positions: Tensor) -> Self:
        """Adds (N, D) of the samples at `positions` (N,); kept on the host.

        Raises:
            ValueError: another width or number of positions, values that are not finite.
        """
        features = checked(features, self._features[0].shape[1] if self._features else None).cpu()
        if positions.shape != (len(features),):
            raise ValueError(f"got positions {tuple(positions.shape)} for {len(features)} samples")
        self._positions.append(positions.detach().cpu().to(torch.int64))
        self._features.append(features)
        if self.limit is not None and len(self) > 2 * self.limit:
            self._keep()
        return self

    def merge(self, other: Stack) -> Self:
        """Adds what another has kept."""
        if (other.limit, other.seed) != (self.limit, self.seed):
            raise ValueError(
                f"got a stack of limit {other.limit}, seed {other.seed}; expected {self.limit}, {self.seed}"
            )
        for features, positions in zip(other._features, other._positions, strict=True):
            self.add(features, positions)
        return self

    def positions(self) -> Tensor:
        """(N,) ascending."""
        self._keep()
        return self._positions[0]

    def features(self) -> Tensor:
        """(N, D) in the order of positions.

        Raises:
            ValueError: nothing was added, or two samples at one position.
        """
        self._keep()
        return self._features[0]

    def moments(self) -> Moments:
        """Of all that is kept, with the same bits for every split."""
        features = self.features()
        made = Moments(features.shape[1])
        for part in features.split(CHUNK):
            made.add(part)
        return made

    def state(self) -> dict[str, Tensor]:
        """Positions and features; concatenated with those of other workers, they are the state of all."""
        return {"positions": self.positions(), "features": self.features()}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], limit: int | None = None, seed: int = 0) -> Stack:
        return cls(limit, seed).add(state["features"], state["positions"])

    def _keep(self) -> None:
        """Puts everything in order, and forgets what is beyond the limit."""
        if not self._positions:
            raise ValueError("got no features; expected at least one sample")
        positions, order = torch.cat(self._positions).sort(stable=True)
        if bool((positions.diff() == 0).any()):
            twice = int(positions[1:][positions.diff() == 0][0])
            raise ValueError(
                f"got two samples at position {twice}; expected one: the number in the set, on all workers"
            )
        if self.limit is not None and len(positions) > self.limit:
            hashes = np.array(
                [xxhash.xxh64_intdigest(str(p).encode(), seed=self.seed) for p in positions.tolist()], np.uint64
            )
            chosen = torch.from_numpy(np.sort(np.argsort(hashes, kind="stable")[: self.limit]))
            positions, order = positions[chosen], order[chosen]
        self._positions, self._features = [positions], [torch.cat(self._features)[order]]
