"""Keys and tempos of sounds that are made of known notes."""

from __future__ import annotations

import math

import pytest
import torch

from nexus_scale.evaluate.music import judged, key_said, player_said, tempo_said
from nexus_scale.metrics.music import NOTES, Timbres, key_of, same_tempo, tempo_of

RATE = 8000
SCALES = {"major": (0, 4, 7, 12, 11, 9, 7, 5, 4, 2, 0, 7), "minor": (0, 3, 7, 12, 10, 8, 7, 5, 3, 2, 0, 7)}


def tune(
    tonic: int, mode: str, beats_a_minute: float, seconds: float = 8.0, *, dull: float = 2, dies: float = 4.0
) -> torch.Tensor:
    """A scale and its chord, a note a beat with three overtones, over and over: (T,)."""
    length = round(60 / beats_a_minute * RATE)
    time = torch.arange(length, dtype=torch.float64) / RATE
    notes = []
    for step in SCALES[mode]:
        hertz = 440.0 * 2 ** ((tonic + step - 9) / 12)
        tone = sum(torch.sin(2 * math.pi * hertz * k * time) / k**dull for k in (1, 2, 3))
        notes.append(torch.as_tensor(tone) * torch.exp(-dies * time))
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


def test_instruments_are_those_whose_recordings_sound_alike() -> None:
    """A bright one that is held, a dull one that is held, a dull one that dies away; in keys and at tempos that are not the recordings'."""
    kinds = {"trumpet": {"dull": 0, "dies": 0.0}, "flute": {"dull": 5, "dies": 0.0}, "harp": {"dull": 5, "dies": 9.0}}
    names = [name for name in kinds for _ in range(4)]
    known = [(tune(n % 12, "major", 80 + 7 * n, 3.0, **kinds[name]), RATE) for n, name in enumerate(names)]
    timbres = Timbres(names, known)
    for name, sound in kinds.items():
        assert timbres(tune(7, "minor", 123, 3.0, **sound), RATE) == name
    assert timbres(torch.zeros(RATE), RATE) in kinds
    captions = [f"played by a {name}" for name in names]
    found = judged(captions, known, timbres)
    assert (found["instrument"], found["instrument_chance"], found["key"]) == (1.0, 3 / 11, None)
    assert found["instrument_p"] == pytest.approx((3 / 11) ** 12)
    assert judged(captions[4:] + captions[:4], known, timbres)["instrument"] == 0.0


def test_captions_say_keys_and_tempos() -> None:
    said = "a lively reel in E flat minor, 2/4, 120 beats a minute, played by a flute with guitar chords"
    assert (key_said(said), tempo_said(said)) == ("E flat minor", 120.0)
    assert (key_said("in A dorian at 90.5 BPM"), tempo_said("in A dorian at 90.5 BPM")) == (None, 90.5)
    assert (key_said("music"), tempo_said("music"), player_said("music")) == (None, None, None)
    assert (player_said(said), player_said("played by an organ")) == ("flute", "organ")


def test_chance_is_what_the_captions_of_others_would_have_got() -> None:
    """Two of three tunes share a key: of six pairs of a tune and another's caption, two are right."""
    captions = ["in C major, 90 beats a minute", "in C major, 70 beats a minute", "in A minor"]
    waves = [(tune(0, "major", 90), RATE), (tune(0, "major", 70), RATE), (tune(9, "minor", 120), RATE)]
    found = judged(captions, waves)
    assert found == {
        "key": 1.0,
        "key_chance": 2 / 6,
        "key_p": pytest.approx(1 / 27),
        "tempo": 1.0,
        "tempo_chance": 0.0,
        "tempo_p": 0.0,
    }
    assert judged(captions[::-1], waves)["key"] == 1 / 3
    assert set(judged(["a", "b"], waves[:2]).values()) == {None}
