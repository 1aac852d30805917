"""What NaturalSpeech 3 minimises against formulas in float64, and speech whose attributes come from different voices."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import Batch, UserError
from nexus_scale.data.sounds import decode_wav
from nexus_scale.evaluate import speech_swaps
from nexus_scale.evaluate.speech import Speech, SpeechScoreSettings, Utterance
from nexus_scale.evaluate.speech_swaps import CASES, Cast, cast_of, said_apart, swapped
from nexus_scale.generate.prompts import draw_prompts
from nexus_scale.generate.speech import beside_codes
from nexus_scale.generate.trained import Trained
from nexus_scale.kernels.random import ProgressRng
from nexus_scale.objectives.naturalspeech3 import NaturalSpeech3
from tests.generate.test_prompts import trained_on_made_up_data


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Counting:
    """A network whose logits are of the codes that it is shown."""

    def __init__(self, size: int):
        self.size, self.seen = size, dict[int, Tensor]()

    def __call__(self, codes: Tensor, level: int, cond: dict[str, Tensor]) -> Tensor:
        self.seen[level], self.cond = codes, cond
        return torch.arange(self.size).float().expand(*codes.shape[:2], -1) / 7


def test_each_attribute_is_asked_given_those_before_it() -> None:
    objective = NaturalSpeech3(codebook_size=8, num_durations=6, prompt=0.5, prompt_drop=0.0)
    generator = torch.Generator().manual_seed(0)
    durations = torch.tensor([[1, 3, 2], [4, 9, 0]])
    fields: dict[str, Any] = {
        "codes": torch.randint(0, 8, (2, 6, 6), generator=generator),
        "codes_mask": torch.ones(2, 6, dtype=torch.bool),
        "phonemes": torch.tensor([[1, 5, 2], [1, 6, 0]]),
        "phonemes_mask": torch.tensor([[True] * 3, [True, True, False]]),
        "durations": durations,
    }
    batch = Batch(fields, torch.arange(2), torch.arange(2))
    nets = {"duration": Counting(6), **{name: Counting(8) for name in ("prosody", "content", "detail")}}
    for phase in objective.phases(0):
        rng = ProgressRng(0, 3, phase.name, torch.arange(2), "cpu")
        found = objective.loss(phase.name, nets, batch, rng, 3)
        net = nets[phase.trains]
        ((level, shown),) = net.seen.items()
        truth = durations.clamp(0, 5)[..., None] if phase.name == "duration" else fields["codes"]
        hidden, prompt = shown == net.size, net.cond["prompt"]
        assert not hidden[..., :level].any() and torch.equal(shown[~hidden], truth[~hidden])
        assert not (hidden[..., level + 1 :] ^ ~prompt[..., None]).any() and not hidden[prompt].any()
        assert level in objective.levels.get(phase.name, range(1))
        nats = -(torch.arange(net.size).double() / 7).log_softmax(0)
        asked = hidden[..., level] & net.cond["codes_mask"]
        each = [nats[truth[row][asked[row]][:, level]].mean() for row in range(2)]
        assert math.isclose(float(found.total), float(sum(each) / 2), rel_tol=1e-6)
    assert nets["content"].cond["phones"].tolist() == [[0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1]]


def test_prosody_and_timbre_come_from_voices_of_their_own(tmp_path: Path) -> None:
    place = trained_on_made_up_data(tmp_path, "naturalspeech3/tiny_speech")
    made: dict[str, np.ndarray] = {}
    asked: dict[str, dict[str, Any]] = {"plain": {}, "manner": {"prosody": "1"}, "voice": {"timbre": "2"}}
    for name, wishes in {**asked, "guided": {"guidance": 2.0, "steps": 3}}.items():
        folder = draw_prompts(place, ["a b"], output=tmp_path / name, speaker="0", **wishes)
        (wave,) = folder.glob("*.wav")
        made[name] = decode_wav(wave.read_bytes()).wave
    assert made["voice"].shape == made["plain"].shape, "the same durations, prosody, content and detail"
    assert not np.array_equal(made["voice"], made["plain"])
    assert not np.array_equal(made["manner"], made["plain"])
    trained = Trained(place.run, place)
    for prompt in ("other", "own"):
        assert len(to_be_scored(trained, 2, prompt).heard().waves[""]) == 2
    speech = to_be_scored(trained, 3)
    casts = cast_of(speech.pairs)
    assert [(one.own.speaker, one.prosody.speaker, one.timbre.speaker) for one in casts] == [
        (1, 2, 0),
        (2, 0, 1),
        (0, 1, 2),
    ]
    said = {case: swapped(speech, casts, case) for case in CASES}
    for name, other, alike in (("plain", "timbre", True), ("prosody", "both", True), ("plain", "prosody", False)):
        pairs = list(zip(said[name], said[other], strict=True))
        assert not all(torch.equal(one, two) for one, two in pairs), (name, other)
        assert not alike or all(one.shape == two.shape for one, two in pairs), (name, other)
    with pytest.raises(UserError, match="the held-out data have 2 speakers; expected at least 3"):
        cast_of(speech.pairs[:2])
    for wishes, message in (
        ({"timbre": "nobody"}, "--timbre 'nobody': no such held-out speaker"),
        ({"prosody": "nobody"}, "--prosody 'nobody': no such held-out speaker"),
        ({"length": 3.0}, "--length: recipe naturalspeech3_tiny_speech"),
    ):
        with pytest.raises(UserError, match=message):
            draw_prompts(place, ["a b"], output=tmp_path / "none", **wishes)


class Hears:
    """A recogniser and an encoder of voices that hear nothing."""

    linear = torch.nn.Linear(1, 3)

    def __call__(self, wave: Tensor, rate: int) -> str:
        return ""

    def embed(self, wave: Tensor, rate: int) -> Tensor:
        return torch.ones(3)


def to_be_scored(trained: Trained, count: int, prompt: str = "other") -> Speech:
    """What `nexus score` listens to: held-out sentences in the voice, and the timbre, of recordings, each of the next speaker."""
    batch = next(iter(trained.dataset.fixed(count, batch=count))).on("cpu")
    real = [
        Utterance(
            key=str(row), sample=row, speaker=row, codes=batch["codes"][row][batch["codes_mask"][row]],
            phonemes=batch["phonemes"][row][batch["phonemes_mask"][row]].tolist(), caption="a b",
            wave=torch.ones(400), sample_rate_hz=16000, beside=beside_codes(batch, row), timbre=batch["timbre"][row],
        )
        for row in range(count)
    ]  # fmt: skip
    settings = SpeechScoreSettings(clips="none", prompt=prompt)  # type: ignore[arg-type]
    hears: Any = Hears()
    return Speech(settings, trained, list(zip(real, real[1:] + real[:1], strict=True)), hears, hears)


def test_swaps_are_measured_from_the_recordings_they_are_taken_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """A voice that speaks as high as the timbre's, as lively and fast as the prosody's."""

    def pitch(wave: np.ndarray, rate: int, hop: int) -> np.ndarray:
        return np.concatenate([wave[:1], wave[1:2], np.zeros(1)]).astype(
            np.float64
        )  # of the two samples, and a silent step

    def recording(key: str, heard: tuple[float, float], samples: int) -> Utterance:
        wave = torch.tensor([*heard, *[1.0] * (samples - 2)])
        return Utterance(key, 0, 0, torch.zeros(1, 4), [0] * 10, "a b", wave, 100, {})

    monkeypatch.setattr(speech_swaps, "pitch_of", pitch)
    own, prosody, timbre = (
        recording("own", (100, 100), 100), recording("prosody", (100, 400), 50), recording("timbre", (200, 200), 200)
    )  # fmt: skip
    encoder: Any = Hears()
    cast = Cast(own, own, prosody, timbre)
    found = said_apart(encoder, [cast], [(torch.tensor([100.0, 400.0, *[1.0] * 48]), 100)])
    expected = {
        "seconds": 0.5, "semitones_from_own": 12, "semitones_from_timbre": 0, "spread_from_own": 12, "spread_from_prosody": 0,
        "pace_from_own": 10, "pace_from_prosody": 0, "similarity_own": 1, "similarity_timbre": 1,
    }  # fmt: skip
    assert found == pytest.approx(expected)
    silent = said_apart(encoder, [cast], [(torch.zeros(100), 100)])
    assert silent["semitones_from_own"] is None and silent["spread_from_prosody"] is None
    assert silent["similarity_own"] == 0 and silent["pace_from_own"] == pytest.approx(0)
