"""Codes in the order of a pattern and back, held against audiocraft's layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.processes.codebooks import find_pattern

# What audiocraft 1.3.0's providers make of 4 frames of 3 codebooks, code (t, k) being 3 t + k; -1 where it has its special token.
THEIRS: dict[str, tuple[Any, list[list[int]]]] = {
    "DelayedPatternProvider": (
        "delay",
        [[-1, -1, -1], [0, -1, -1], [3, 1, -1], [6, 4, 2], [9, 7, 5], [-1, 10, 8], [-1, -1, 11]],
    ),
    "DelayedPatternProvider [0, 0, 2]": (
        {"name": "delay", "delays": [0, 0, 2]},
        [[-1, -1, -1], [0, 1, -1], [3, 4, -1], [6, 7, 2], [9, 10, 5], [-1, -1, 8], [-1, -1, 11]],
    ),
    "ParallelPatternProvider": ("parallel", [[-1, -1, -1], [0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]),
    "UnrolledPatternProvider": (
        "flat",
        [[-1, -1, -1], *([3 * t + k if k == group else -1 for k in range(3)] for t in range(4) for group in range(3))],
    ),
    "UnrolledPatternProvider [0, 1, 1]": (
        {"name": "flat", "groups": [0, 1, 1]},
        [[-1, -1, -1], *(row for t in range(4) for row in ([3 * t, -1, -1], [-1, 3 * t + 1, 3 * t + 2]))],
    ),
    "CoarseFirstPattern [0, 1]": (
        {"name": "coarse_to_fine", "delays": [0, 1]},
        [
            [-1, -1, -1], [0, -1, -1], [3, -1, -1], [6, -1, -1], [9, -1, -1],
            [-1, 1, -1], [-1, 4, 2], [-1, 7, 5], [-1, 10, 8], [-1, -1, 11],
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", THEIRS)
def test_codes_stand_where_audiocraft_puts_them(name: str) -> None:
    spec, expected = THEIRS[name]
    pattern = find_pattern(spec, 3)
    made = pattern.apply(torch.arange(12).view(1, 4, 3), -1)
    assert made.tokens[0].tolist() == expected and pattern.steps(4, 3) == len(expected)
    assert torch.equal(made.filled[0], torch.tensor(expected) >= 0)


@pytest.mark.parametrize("name", THEIRS)
def test_what_is_put_in_order_comes_out_again(name: str) -> None:
    """Samples of many lengths, each as it is alone; tokens, and what is predicted of them a step ahead."""
    pattern, lengths = find_pattern(THEIRS[name][0], 3), torch.tensor([5, 3, 0, 1])
    real = torch.arange(5) < lengths[:, None]
    codes = torch.where(real[..., None], torch.randint(0, 9, (4, 5, 3)), 0)
    made = pattern.apply(torch.where(real[..., None], codes, 77), 9, real)
    assert torch.equal(pattern.revert(made.tokens, 5, lengths), codes)
    assert bool((made.tokens[~made.filled] == 9).all()) and int(made.filled.sum()) == 3 * int(lengths.sum())
    for row, length in enumerate(lengths.tolist()):
        alone = pattern.apply(codes[row : row + 1, :length], 9).tokens[0]
        assert torch.equal(made.tokens[row, : len(alone)], alone)
    ahead = torch.nn.functional.one_hot(made.tokens[:, 1:], 10).float()  # at step s, logits of the token at step s + 1
    found = pattern.revert(ahead, 5, lengths, ahead=1, fill=-1.0)
    assert torch.equal(found.argmax(-1)[real], codes[real]) and bool((found[~real] == -1).all())


def test_a_code_stands_after_those_that_it_may_depend_on() -> None:
    """No pattern puts a frame before an earlier one of its codebook; and all but parallel put finer books after coarser ones."""
    for name in ("parallel", "delay", "flat", "coarse_to_fine"):
        places = find_pattern(name, 4).places(torch.tensor([6]), 6, 4)[0]
        assert bool((places.diff(dim=0) > 0).all()), name
        assert bool((places.diff(dim=1) >= 0).all()), name
        for frames, books in ((6, 4), (1, 4), (5, 1)):
            pattern, whole = find_pattern(name, books), torch.tensor([frames])
            assert pattern.steps(frames, books) == 1 + int(pattern.places(whole, frames, books).amax())


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("delayed", "no 'delayed'; did you mean 'delay'"),
        ({"name": "delay", "delays": [0, 1]}, r"pattern\.delays: got 2, \[0, 1\]; expected 3"),
        ({"name": "delay", "delays": [0, 1, -1]}, "greater than or equal to 0"),
        ({"name": "flat", "groups": [0, 2, 2]}, "without a gap"),
        ({"name": "coarse_to_fine", "delays": [0, 1, 2]}, "expected 2"),
        ({"name": "parallel", "delays": [0]}, "unknown key"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(spec: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        find_pattern(spec, 3)
