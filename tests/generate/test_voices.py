"""`nexus sample` of a run that fills in sound: a sentence in a voice, other words in a recording, a span anew, another voice's timing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nexus_scale.contracts import UserError
from nexus_scale.data.sounds import decode_wav, encode_wav
from nexus_scale.data.stand_ins import HOP, SAMPLE_RATE_HZ
from nexus_scale.evaluate.speech import Utterance
from nexus_scale.evaluate.speech_edits import EditScoreSettings, changed, spoken_anew, with_noise, with_other_words
from nexus_scale.generate.prompts import draw_prompts
from nexus_scale.generate.trained import Trained
from nexus_scale.train import Place
from tests.generate.test_prompts import trained_on_made_up_data


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return trained_on_made_up_data(tmp_path_factory.mktemp("voices"), "voicebox/tiny_speech")


def test_the_words_and_the_middle_of_recordings_are_changed_to_be_heard(place: Place) -> None:
    """What `nexus score` draws of them, before anyone listens."""
    assert changed("Dogs chase a dog home.", {"dog": "cat", "Dogs": "Cats"}) == ("Dogs chase a cat home.", "dog", "cat")
    assert changed("A dog", {"dog": "cat"}) is None, "the last word"
    trained = Trained(place.run, place)
    rate = trained.speaking.codec.sample_rate_hz
    wave = torch.sin(torch.arange(20 * HOP) / 5)
    batch = next(iter(trained.dataset.fixed(2, batch=2))).on("cpu")
    real = [
        Utterance(
            str(row),
            row,
            0,
            batch["codes"][row][batch["codes_mask"][row]],
            trained.speaking.spoken("Hello you."),
            "",
            wave,
            rate,
            {},
        )
        for row in range(2)
    ]
    settings = EditScoreSettings(clips="none", words={"a": "b"}, middle=(0.4, 0.8), steps=1)
    for row, middle in enumerate(spoken_anew(trained, real, settings)):
        own, frames = trained.speaking.wave(real[row].codes), len(real[row].codes)
        first = int(0.4 * frames) * HOP
        assert middle.shape == own.shape and torch.equal(middle[:first], own[:first]) and not torch.equal(middle, own)
    assert [len(one) > 0 for one in with_other_words(trained, real, ["Hello me.", "No."], settings)] == [True, True]
    noisy = with_noise(wave, (0.25, 0.5))
    assert torch.equal(noisy[: 5 * HOP], wave[: 5 * HOP]) and torch.equal(noisy[10 * HOP :], wave[10 * HOP :])
    assert not torch.isclose(noisy[5 * HOP : 10 * HOP], wave[5 * HOP : 10 * HOP]).any()


def drawn(place: Place, tmp_path: Path, text: str, **wishes: Any) -> np.ndarray:
    """The one sound of a call, (1, T)."""
    folder = draw_prompts(place, [text], output=tmp_path / "drawn", seed=1, **wishes)
    (file,) = folder.glob("*.wav")
    sound = decode_wav(file.read_bytes())
    assert sound.sample_rate_hz == SAMPLE_RATE_HZ and sound.wave.shape[1] % HOP == 0
    return sound.wave


def test_recordings_are_spoken_anew_in_part(place: Place, tmp_path: Path) -> None:
    clip = tmp_path / "clip.wav"
    clip.write_bytes(encode_wav(0.3 * np.sin(np.arange(20 * HOP, dtype=np.float32) / 5)[None], SAMPLE_RATE_HZ))
    edit: dict[str, Any] = {"edit": clip, "edit_text": "Hello you."}
    said = drawn(place, tmp_path, "Glue it.", voice=clip, voice_text="Hello you.", guidance=1.0, steps=1)
    assert said.shape[1] > 0
    anew = drawn(place, tmp_path, "Hello you.", span="0.05-0.12", **edit)
    assert anew.shape[1] == 20 * HOP, "its timing is the recording's"
    other = drawn(place, tmp_path, "Hello you.", span="0.05-0.12", guidance=1.0, **edit)
    kept, new = slice(0, 5 * HOP), slice(5 * HOP, 12 * HOP)
    assert np.array_equal(other[:, kept], anew[:, kept]) and not np.array_equal(other[:, new], anew[:, new])
    assert drawn(place, tmp_path, "Hello me.", **edit).shape[1] > 0
    assert drawn(place, tmp_path, "Hello you.", speaker="0", **edit).shape[1] > 0

    def refused(words: str, text: str, **wishes: Any) -> None:
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            drawn(place, tmp_path, text, **wishes)
        assert caught.value.code in (2, 3)

    refused("says what the recording says", "Hello you.", **edit)
    refused("keeps its words", "Glue it.", span="0-0.1", **edit)
    refused("the recording's own words", "Glue it.", speaker="0", **edit)
    refused("leave --voice and --speaker out", "Hello you.", speaker="0", span="0-0.1", **edit)
    refused("expected FROM-TO in seconds", "Hello you.", span="soon", **edit)
    refused("within the recording's 0.20 seconds", "Hello you.", span="3-4", **edit)
    refused("shorter than a frame", "Hello you.", span="0.001-0.002", **edit)
    refused("needs --edit-text", "Hello you.", edit=clip)
    refused("give --edit FILE", "Hello you.", span="0-1")
    refused("needs --voice-text", "Hello you.", voice=clip)
