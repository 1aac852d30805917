"""GANs with state beside their weights, killed at random five times: the same bits in the end."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.training_ranks import Ranks, assert_same_end, final, newest_step

STEPS, EVERY, KILLS = 24, 2, 5
ADAPTS = {"name": "ada", "changes": "bc", "probability": 0.3, "every": 1, "images": 200}
GANS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    # recipe: changes to it, and what its state must hold beside weights, averages and moments
    "gan/tiny_projection_fashion_mnist": (
        {"objective": {"augment": ADAPTS}},
        (".left.buffer", "mean.buffer", "objective/"),
    ),
    "cyclegan/tiny_emoji": ({}, ("objective/",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", GANS)
def test_killed_five_times_it_ends_with_the_same_bits(recipe: str, tmp_path: Path) -> None:
    """Two ZeRO-3 workers; every kill takes both, in a step, in a save or between them."""
    changed, held = GANS[recipe]
    callbacks = {"checkpoint": {"every": EVERY}, "metrics": {"every": 1}, "monitor": None}

    def started(root: Path) -> Ranks:
        return Ranks(root, 2, recipe=recipe, steps=STEPS, callbacks=callbacks, **changed)

    whole = started(tmp_path / "whole").done().root
    names = final(whole)[0].keys()
    assert all(any(part in name for name in names) for part in held), sorted(names)
    chance = random.Random(seed := random.randrange(1 << 32))
    broken, died = tmp_path / "broken", []
    for target in sorted(chance.sample(range(1, STEPS // 2), KILLS)):
        ranks = started(broken)
        ranks.reached(target)
        time.sleep(chance.random() * 0.05)
        for rank in range(2):
            ranks.send(rank, signal.SIGKILL)
        assert ranks.wait() == [-signal.SIGKILL] * 2, f"it ended before it was killed; seed {seed}\n{ranks.said()}"
        died.append(newest_step(broken))
    started(broken).done()
    print("seed", seed, "newest saved steps at the kills", died)
    assert_same_end(whole, broken)
