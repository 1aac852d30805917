"""Pitch classes of sound: the bank of filters is transformers', and notes are found where they sound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nexus_scale.conditioners.chroma import CHROMA, HOP, WINDOW, ChromaConditioner, chroma_filters


@pytest.mark.parametrize("rate", [32000, 16000])
def test_the_filters_are_those_of_transformers(rate: int) -> None:
    audio = pytest.importorskip("transformers.audio_utils")
    theirs = audio.chroma_filter_bank(sampling_rate=rate, num_frequency_bins=WINDOW, tuning=0, num_chroma=12)
    assert np.allclose(chroma_filters(rate).numpy(), theirs, atol=1e-6)


@pytest.mark.parametrize(("hz", "place"), [(261.63, 0), (440.0, 9), (739.99, 6), (1975.53, 11)])
def test_a_note_is_its_pitch_class_in_every_step(hz: float, place: int) -> None:
    rate, count = 32000, 40000
    tone = 0.3 * torch.sin(2 * torch.pi * hz * torch.arange(count) / rate)
    made = ChromaConditioner(rate).encode([tone[None], torch.stack([tone, tone])])
    for one in made:
        assert one[CHROMA].shape == (1 + count // HOP, 12) and one[CHROMA].dtype == np.float16
        assert (one[CHROMA].argmax(1) == place).all() and (one[CHROMA].sum(1) == 1).all()


def test_a_short_sound_has_the_steps_of_a_window_and_silence_is_the_first_class() -> None:
    (made,) = ChromaConditioner(32000).encode([torch.zeros(1, 100)])
    assert made[CHROMA].shape == (1 + WINDOW // HOP, 12) and (made[CHROMA][:, 0] == 1).all()
