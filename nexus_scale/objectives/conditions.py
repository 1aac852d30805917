"""Conditions that training drops, so that a network learns to do without them, and the unconditional ones of guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nexus_scale.config.registry import nearest
from nexus_scale.contracts import Cond, Rng, UserError, on_both


def _rows(mask: Tensor, x: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1)."""
    return mask.view(-1, *[1] * (x.ndim - 1))


def _chosen(rng: Rng, name: str, probability: float) -> Tensor:
    """Each sample with this probability, (B,) bool, known to the host as well."""
    return on_both(lambda u: u < probability, rng.uniform(name))


def _first_token(mask: Tensor, real: Tensor) -> Tensor:
    """`real` (B, L), and where `mask` (B,) is True the first token alone."""
    first = torch.arange(real.shape[-1], device=real.device) == 0  # (L,)
    return torch.where(mask[:, None], first, real)


def drop_condition(cond: Cond, drop: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`cond` with some samples' conditions replaced by the unconditional ones.

    Dropped text is zeros with one real token, the first: a row without any would make attention NaN. Dropped vectors are
    zeros. Labels stay: networks that embed them read `drop`, which comes beside the rest.

    Args:
        cond: conditions by name, each (B, ...).
        drop: by name of a condition, (B,) bool, True = dropped.
    Returns:
        New mapping; with `drop`, (B,) bool: that of the label, or without a label, samples that lost everything.
    """
    dropped = dict(cond)
    for name, mask in drop.items():
        value = cond[name]
        if value.is_floating_point():
            # A product is four times as fast as masked_fill with a broadcast mask (0.5 ms against 2.0 at 3 MB, one core).
            dropped[name] = value * _rows(~mask, value).to(value.dtype)
        if f"{name}_mask" in cond:
            real = cond[f"{name}_mask"]
            dropped[f"{name}_mask"] = on_both(_first_token, mask, real)
    if drop:
        dropped["drop"] = drop["label"] if "label" in drop else torch.stack(list(drop.values())).all(0)
    return dropped


def null_condition(cond: Cond, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The unconditional version of `cond`, as condition drops present it in training.

    Args:
        cond: conditions by name, each (B, ...).
        names: those that training drops; default all but masks.
    """
    if names is None:
        names = [name for name in cond if not name.endswith("_mask") and name != "drop"]
    names = [name for name in names if name in cond]
    return drop_condition(
        cond, {name: torch.ones(len(cond[name]), dtype=torch.bool, device=cond[name].device) for name in names}
    )


class ConditionDrop:
    """Drops conditions of a batch's samples, all of a sample's at once or by name. Draws `drop`, or `drop_<names>`."""

    def __init__(self, probabilities: float | Mapping[str, float], conditions: Sequence[str]):
        """
        Args:
            probabilities: that a sample loses all its conditions; by name, each is lost independently, and names joined by + together.
            conditions: names of those that a batch has.
        Raises:
            UserError: no probability, or of no condition.
        """
        self.conditions = tuple(conditions)
        self.by_name = dict(probabilities) if isinstance(probabilities, Mapping) else None
        self.probability = 0.0 if isinstance(probabilities, Mapping) else probabilities
        for name, probability in (self.by_name or {"all": self.probability}).items():
            if not 0 <= probability <= 1:
                raise UserError(
                    f"objective.condition_drop: got {probability} for {name}; expected a probability in [0, 1]"
                )
        for name in self.by_name or ():
            for part in name.split("+"):
                if part not in self.conditions:
                    raise UserError(
                        f"objective.condition_drop.{name}: no condition {part!r}; {nearest(part, list(self.conditions))}"
                    )

    @property
    def drops(self) -> bool:
        """Whether any sample loses any condition."""
        return bool(self.probability) or any((self.by_name or {}).values())

    def __call__(self, cond: Cond, rng: Rng) -> dict[str, Tensor]:
        """See `drop_condition`."""
        masks: dict[str, Tensor] = {}
        if self.by_name is not None:
            together = {name: _chosen(rng, f"drop_{name}", p) for name, p in self.by_name.items() if p > 0}
            masks = {part: mask for name, mask in together.items() for part in name.split("+")}
        elif self.probability > 0:
            masks = dict.fromkeys(self.conditions, _chosen(rng, "drop", self.probability))
        return drop_condition(cond, masks)
