"""Numbers and sides of things in a picture, by boxes that are known."""

from __future__ import annotations

import torch

from nexus_scale.metrics.scenes import Boxes, Scene, scene_said, sides_of

KNOWN = ("apple", "dog", "cat", "knife", "berry", "hot dog")


def found(*things: tuple[str, float, tuple[float, float, float, float]]) -> Boxes:
    names, scores, boxes = zip(*things, strict=True)
    return Boxes(list(names), torch.tensor(scores), torch.tensor(boxes))


def test_prompts_say_numbers_and_sides() -> None:
    assert scene_said("three apples", KNOWN) == Scene("apple", 3)
    assert scene_said("a photo of Two knives", KNOWN) == Scene("knife", 2)
    assert scene_said("four berries", KNOWN) == Scene("berry", 4)
    assert scene_said("a photo of a dog to the left of a cat", KNOWN) == Scene("dog", side="left of", other="cat")
    assert scene_said("an apple above a hot dog", KNOWN) == Scene("apple", side="above", other="hot dog")
    for nothing in ("a red apple", "three horses", "a dog left of a horse", "a horse below a cat", "one apple"):
        assert scene_said(nothing, KNOWN) is None, nothing


def test_things_are_counted_that_are_sure() -> None:
    two = Scene("apple", 2)
    square = (0.0, 0.0, 4.0, 4.0)
    assert two.follows(found(("apple", 0.95, square), ("apple", 0.91, square), ("dog", 0.99, square)))
    assert not two.follows(found(("apple", 0.95, square), ("apple", 0.8, square)))
    assert not two.follows(found(*[("apple", 0.95, square)] * 3))


def test_a_side_is_told_where_boxes_are_apart() -> None:
    left, right, low = (torch.tensor(box) for box in ((0.0, 0, 10, 10), (20.0, 0, 30, 10), (21.0, 15, 31, 25)))
    assert sides_of(left, right) == {"left of"} and sides_of(right, left) == {"right of"}
    assert sides_of(low, right) == {"below"} and sides_of(right, low) == {"above"}
    assert sides_of(low, left) == {"below", "right of"}, "obliquely it is both"
    assert sides_of(left, left + 1) == set(), "a tenth of both sizes is too near"
    dog_left = Scene("dog", side="left of", other="cat")
    seen = found(("dog", 0.5, (0.0, 0.0, 10.0, 10.0)), ("cat", 0.5, (20.0, 0.0, 30.0, 10.0)))
    assert dog_left.follows(seen) and not Scene("cat", side="left of", other="dog").follows(seen)
    assert not dog_left.follows(found(("dog", 0.2, (0.0, 0.0, 10.0, 10.0)), ("cat", 0.5, (20.0, 0.0, 30.0, 10.0))))
