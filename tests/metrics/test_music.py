"""Keys and tempos of sounds that are made of known notes."""

from __future__ import annotations

import math

import pytest
import torch

from nexus_scale.evaluate.music import judged, key_said, tempo_said
from nexus_scale.metrics.music import NOTES, key_of, same_tempo, tempo_of

RATE = 8000
SCALES = {"major": (0, 4, 7, 12, 11, 9, 7, 5, 4, 2, 0, 7), "minor": (0, 3, 7, 12, 10, 8, 7, 5, 3, 2, 0, 7)}


def tune(tonic: int, mode: str, beats_a_minute: float, seconds: float = 8.0) -> torch.Tensor:
    """A scale and its chord, a note a beat with three overtones, over and over: (T,)."""
    length = round(60 / beats_a_minute * RATE)
    time = torch.arange(length, dtype=torch.float64) / RATE
    notes = []
    for step in SCALES[mode]:
        hertz = 440.0 * 2 ** ((tonic + step - 9) / 12)
        tone = sum(torch.sin(2 * math.pi * hertz * k * time) / k**2 for k in (1, 2, 3))
        notes.append(torch.as_tensor(tone) * torch.exp(-4 * time))
    once = torch.cat(notes)
    return once.repeat(math.ceil(seconds * RATE / len(once)))[: round(seconds * RATE)].float()


@pytest.mark.parametrize("mode", SCALES)
def test_keys_are_heard(mode: str) -> None:
    for tonic, note in enumerate(NOTES):
        assert key_of(tune(tonic, mode, 100), RATE) == f"{note} {mode}"


@pytest.mark.parametrize("beats", [60.0, 70.0, 90.0, 120.0, 150.0])
def test_tempos_are_heard(beats: float) -> None:
    found = tempo_of(tune(4, "major", beats), RATE)
    assert found is not None and same_tempo(found, beats), found


def test_silence_has_neither_and_one_sound_no_tempo_of_its_own() -> None:
    assert key_of(torch.zeros(RATE), RATE) is None and tempo_of(torch.zeros(RATE), RATE) is None
    assert key_of(torch.zeros(3), RATE) is None and tempo_of(torch.ones(3), RATE) is None


def test_tempos_are_the_same_up_to_a_simple_factor() -> None:
    assert all(same_tempo(found, 120) for found in (120, 60, 240, 40, 360, 124.7))
    assert not any(same_tempo(found, 120) for found in (None, 90, 150, 130, 480))


def test_captions_say_keys_and_tempos() -> None:
    said = "a lively reel in E flat minor, 2/4, 120 beats a minute, played by a flute with guitar chords"
    assert (key_said(said), tempo_said(said)) == ("E flat minor", 120.0)
    assert (key_said("in A dorian at 90.5 BPM"), tempo_said("in A dorian at 90.5 BPM")) == (None, 90.5)
    assert (key_said("music"), tempo_said("music")) == (None, None)


def test_chance_is_what_the_captions_of_others_would_have_got() -> None:
    """Two of three tunes share a key: of six pairs of a tune and another's caption, two are right."""
    captions = ["in C major, 90 beats a minute", "in C major, 70 beats a minute", "in A minor"]
    waves = [(tune(0, "major", 90), RATE), (tune(0, "major", 70), RATE), (tune(9, "minor", 120), RATE)]
    found = judged(captions, waves)
    assert found == {"key": 1.0, "key_chance": 2 / 6, "tempo": 1.0, "tempo_chance": 0.0}
    assert judged(captions[::-1], waves)["key"] == 1 / 3
    assert judged(["a", "b"], waves[:2]) == {"key": None, "key_chance": None, "tempo": None, "tempo_chance": None}
