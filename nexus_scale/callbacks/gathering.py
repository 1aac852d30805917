"""What all ranks draw while a run trains, measured by each of its own samples and brought together in the order of these."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Engine, UserError
from nexus_scale.engine import distributed


class Drawing(Protocol):
    """What draws a run in its current state; see `generate.trained.Drawing`."""

    def own(self, engine: Engine, count: int, anew: bool = False) -> Iterator[tuple[Batch, Tensor]]:
        """This rank's samples in model space, with the batches whose conditions they have. A collective."""
        ...

    def decoded(self, samples: Tensor) -> Tensor:
        """Samples as images (B, 3, H, W) or clips (B, 3, F, H, W)."""
        ...


def gathered(
    engine: Engine, draw: Drawing, samples: int, measured: Callable[[Batch, Tensor], dict[str, Tensor]], where: str
) -> dict[str, Tensor] | None:
    """What is measured of each of so many samples, (N, ...) by name, in their order whatever the number of ranks: on rank 0. A collective.

    Args:
        measured: of a batch and of what was drawn under its conditions; rows, with `position` among them.
        where: what mistakes are said of.
    Raises:
        UserError: on all ranks, where samples of one cannot be measured, or have several sizes.
    """
    parts: list[dict[str, Tensor]] = []
    sizes: set[torch.Size] = set()
    wrong: UserError | None = None
    for batch, made in draw.own(engine, samples, anew=True):  # to the end: what draws is a collective
        sizes.add(made.shape[1:])
        try:
            parts.append({name: value.cpu() for name, value in measured(batch, made).items()})
        except UserError as error:
            wrong = wrong or error
    raise_together(wrong, where)
    mine = zlib.crc32(repr(sorted(sizes)).encode())
    if distributed.any_rank(len(sizes) > 1 or mine != distributed.broadcast_int(mine)):
        raise UserError(
            f"{where}: samples are {' and '.join(str(tuple(size)) for size in sorted(sizes))} here; it compares those of one "
            "size: leave it out, or use data of one size"
        )
    own = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    values = {name: whole for name, value in own.items() if (whole := distributed.gather(value)) is not None}
    if engine.rank:
        return None
    # ranks may repeat the last one
    once = {position: row for row, position in enumerate(values["position"].tolist())}
    rows = torch.tensor([once[position] for position in sorted(once)])
    return {name: value[rows] for name, value in values.items()}


def raise_together(wrong: UserError | None, where: str) -> None:
    """Raises on all ranks where there is an error on one, so that none waits for it. A collective."""
    if distributed.any_rank(wrong is not None):
        raise wrong or UserError(f"{where}: another worker found a mistake; its log says which")
