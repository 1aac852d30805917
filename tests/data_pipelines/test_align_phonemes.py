"""Alignments that nobody trained: made-up voices whose durations are known."""

from __future__ import annotations

import torch
from torch import Tensor

from data_pipelines.align_phonemes import Gaussians, evenly
from nexus_scale.processes.phones import BEGIN, END, PAUSES, TABLE

SOUNDS = [TABLE.index(letter) for letter in "abdefhijklmnoprstuw"]
SPACE, STRESS = TABLE.index(" "), TABLE.index("ˈ")


def spoken(count: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Texts, mels of 20 bands and the durations with which they are said; a pause between two words is often none."""
    generator = torch.Generator().manual_seed(0)

    def pick(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    sound_of = 2 * torch.randn(len(TABLE), 20, generator=generator)
    sound_of[list(PAUSES)] = -4.0
    texts, mels, durations = [], [], []
    for _ in range(count):
        text, own = [BEGIN], [pick(1, 4)]
        for word in range(pick(2, 5)):
            if word:
                text, own = [*text, SPACE], [*own, pick(0, 2) * pick(1, 5)]
            text, own = [*text, STRESS], [*own, 0]
            for _ in range(pick(2, 5)):
                text, own = [*text, SOUNDS[pick(0, len(SOUNDS))]], [*own, pick(2, 9)]
        text, own = [*text, END], [*own, pick(1, 4)]
        said = torch.tensor(text).repeat_interleave(torch.tensor(own))
        texts, durations = [*texts, torch.tensor(text)], [*durations, torch.tensor(own)]
        mels.append(sound_of[said] + 0.7 * torch.randn(len(said), 20, generator=generator))
    return texts, mels, durations


def test_durations_are_found_from_even_ones_on() -> None:
    texts, mels, durations = spoken(60)
    voice = Gaussians.learned(texts, mels)
    found = voice.align(texts, mels)
    assert all(int(one.sum()) == len(mel) for one, mel in zip(found, mels, strict=True))

    def wrong(guess: list[Tensor]) -> float:
        """Mean distance of ends from where they are, in frames; of equal neighbours nothing shows where one ends."""
        ends = torch.cat([(a.cumsum(0) - b.cumsum(0)).abs() for a, b in zip(guess, durations, strict=True)])
        return float(ends.float().mean())

    assert wrong([evenly(text, len(mel)) for text, mel in zip(texts, mels, strict=True)]) > 2.0
    assert wrong(found) < 0.5
