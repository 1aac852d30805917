"""Optimizer settings of a parameter, attached where the parameter is created.

The optimizer only filters: it reads `p.nexus_decay` and `p.nexus_lr_multiplier` and knows no layer by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from torch import Tensor, nn


class Tags(NamedTuple):
    """`decay`: whether weight decay applies. `lr_multiplier`: factor on the recipe's learning rate."""

    decay: bool = True
    lr_multiplier: float = 1.0


P = TypeVar("P", bound=Tensor)


def tag_param(p: P, *, decay: bool, lr_multiplier: float = 1.0) -> P:
    """Tags `p` in place and returns it."""
    p.nexus_decay = decay  # type: ignore[attr-defined]
    p.nexus_lr_multiplier = lr_multiplier  # type: ignore[attr-defined]
    return p


def tags_of(p: Tensor) -> Tags:
    """Tags of `p`; an untagged parameter decays at the recipe's rate."""
    return Tags(getattr(p, "nexus_decay", True), getattr(p, "nexus_lr_multiplier", 1.0))


class KeepsTags(nn.Module):
    """A module whose own parameters keep their tags when torch replaces the Parameter objects.

    It does so when a module leaves the meta device (`to_empty`) and in `load_state_dict(assign=True)`.
    """

    def _own_tags(self) -> dict[str, Tags]:
        return {name: tags_of(p) for name, p in self._parameters.items() if p is not None}

    def _tag_again(self, tags: dict[str, Tags]) -> None:
        for name, (decay, lr_multiplier) in tags.items():
            p = self._parameters[name]
            assert p is not None, name
            tag_param(p, decay=decay, lr_multiplier=lr_multiplier)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        tags = self._own_tags()
        super()._apply(fn, recurse)
        self._tag_again(tags)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        tags = self._own_tags()
        super()._load_from_state_dict(*args, **kwargs)
        self._tag_again(tags)
