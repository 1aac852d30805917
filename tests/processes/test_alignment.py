"""Monotonic alignments against all that there are, and gaps of the right size."""

from __future__ import annotations

import itertools

import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.processes.alignment import aligned, frames_of, monotonic
from nexus_scale.processes.infilling import Spans
from nexus_scale.processes.phones import BEGIN, END, TABLE


def every_path(frames: int, optional: list[bool]) -> list[tuple[int, ...]]:
    """All durations of symbols that add up to the frames."""
    shares = itertools.product(*(range(0 if free else 1, frames + 1) for free in optional))
    return [each for each in shares if sum(each) == frames]


def test_the_best_alignment_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths, symbols = torch.tensor([7, 5, 6]), torch.tensor([4, 3, 1])
    optional = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    scores = torch.randn(3, 7, 4, generator=generator).double()
    found = monotonic(scores, lengths, symbols, optional)
    for b, (T, L) in enumerate(zip(lengths.tolist(), symbols.tolist(), strict=True)):

        def score(path: tuple[int, ...], b: int = b, T: int = T) -> float:
            said = torch.arange(len(path)).repeat_interleave(torch.tensor(path))
            return float(scores[b, torch.arange(T), said].sum())

        best = max(every_path(T, optional[b, :L].tolist()), key=score)
        assert found[b, :L].tolist() == list(best) and int(found[b].sum()) == T


def test_marks_have_no_frames_and_of_pauses_in_a_row_the_first_has_them() -> None:
    text = torch.tensor([[BEGIN, *(TABLE.index(one) for one in "ˈa, bː"), END, 0]])
    frames = [0, 0, 2, 2, 2, 3, 3, 5, 7, 7]  # symbols by place: begin, a, comma, b, end
    scores = torch.zeros(1, 12, 9)
    scores[0, torch.arange(10), torch.tensor(frames)] = 5.0
    real, mask = torch.arange(12)[None] < 10, torch.arange(9)[None] < 8
    durations = aligned(scores, real, text, mask)
    assert durations.tolist() == [[2, 0, 3, 2, 0, 1, 0, 2, 0]]
    assert frames_of(durations, 12)[0, :10].tolist() == frames


def test_gaps_are_spans_of_the_share_that_is_asked_for() -> None:
    rng = ProgressRng(0, 0, "main", torch.arange(2000), torch.device("cpu"))
    real = torch.arange(60)[None] < torch.randint(20, 61, (2000, 1), generator=torch.Generator().manual_seed(0))
    gap = Spans().draw(rng, "gap", real)
    share = gap.sum(1) / real.sum(1)
    assert not bool((gap & ~real).any()) and float(share.min()) > 0.67
    assert bool(((gap.int().diff(dim=1, prepend=gap.new_zeros(2000, 1).int()) == 1).sum(1) == 1).all())  # one span each
    whole = float((share == 1).float().mean())
    assert abs(whole - 0.3 - 0.7 * 0.025) < 0.05  # what rounds up to all is among it
    assert abs(float(share[share < 1].mean()) - 0.85) < 0.02
    with pytest.raises(UserError, match="least"):
        Spans(least=0.9, most=0.5)
