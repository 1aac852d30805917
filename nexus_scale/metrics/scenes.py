"""Whether a picture has as many things as its prompt says, or one of them where it says, by boxes that a detector finds.

Source: Ghosh et al. 2023, "GenEval": counting and relative positions, with the rules and the numbers of its published code.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Where a thing lies from another: across and down."""

SURE, SURE_TO_COUNT = 0.3, 0.9
"""From which probability on a box is one, and from which it is counted."""
APART = 0.1
"""How much of both boxes' sizes their centres are apart before a side is told."""

_COUNT = re.compile(rf"\b({'|'.join(NUMBERS[1:])})\b (.+)$", re.IGNORECASE)
_PLACE = re.compile(rf"\ban? (.+?)(?: to the)? ({'|'.join(SIDES)}) an? (.+)$", re.IGNORECASE)


class Boxes(NamedTuple):
    """What a detector finds in a picture: names, probabilities (N,), and boxes (N, 4): left, top, right, bottom."""

    names: list[str]
    scores: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Scene:
    """What a prompt asks for: so many of `thing`, or, with `side`, one of it on that side of `other`."""

    thing: str
    count: int = 1
    side: str | None = None
    other: str | None = None

    @property
    def kind(self) -> str:
        """`count` or `position`."""
        return "count" if self.side is None else "position"

    def things(self) -> list[str]:
        return [self.thing] if self.other is None else [self.thing, self.other]

    def follows(self, found: Boxes) -> bool:
        """Whether a picture has what is asked for."""
        if self.side is None:
            return len(_of(found, self.thing, SURE_TO_COUNT)) == self.count
        assert self.other is not None
        return any(
            self.side in sides_of(a, b)
            for a in _of(found, self.thing, SURE)
            for b in _of(found, self.other, SURE)
            if a is not b
        )


def scene_said(prompt: str, known: Collection[str]) -> Scene | None:
    """`three apples`, `a photo of a dog left of a cat`: what is asked for, in names that a detector knows; None where nothing is."""
    names = {name.lower(): name for name in known}
    if place := _PLACE.search(prompt):
        words = (re.split(r"\ban? ", place[1])[-1], place[3])
        things = [names.get(word.strip().lower()) for word in words]
        return None if None in things else Scene(str(things[0]), side=place[2].lower(), other=things[1])
    if counted := _COUNT.search(prompt):
        word = counted[2].strip().lower()
        for single in (
            word,
            word.removesuffix("s"),
            word.removesuffix("es"),
            re.sub("ies$", "y", word),
            re.sub("ves$", "fe", word),
        ):
            if single in names:
                return Scene(names[single], NUMBERS.index(counted[1].lower()) + 1)
    return None


def sides_of(a: Tensor, b: Tensor) -> set[str]:
    """On which sides of box `b` box `a` lies, (4,) each; none where their centres are near for their sizes."""
    centre_a, centre_b = ((box[:2] + box[2:]) / 2 for box in (a, b))
    size_a, size_b = (box[2:] - box[:2] for box in (a, b))
    offset = centre_a - centre_b
    clear = (offset.abs() - APART * (size_a + size_b)).clamp_min(0) * offset.sign()
    if bool((clear.abs() < 1e-3).all()):
        return set()
    across, down = (clear / offset.norm()).tolist()
    return {side for side, (x, y) in SIDES.items() if across * x + down * y > 0.5}


def _of(found: Boxes, name: str, least: float) -> list[Tensor]:
    kept = torch.tensor([one == name for one in found.names], dtype=torch.bool) & (found.scores > least)
    return list(found.boxes[kept])
