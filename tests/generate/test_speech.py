"""A run that speaks: drawn while it trains, heard in the report, told sentences in voices; and what of that is refused."""

from __future__ import annotations

import json
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nexus_scale.config import recipe as recipes
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.data.buckets import assign_length
from nexus_scale.data.manifest import Field
from nexus_scale.data.shards import ShardWriter, finish_folder
from nexus_scale.data.sounds import encode_wav
from nexus_scale.engine import distributed
from nexus_scale.evaluate import scores as evaluate
from nexus_scale.evaluate import speech as speech_scores
from nexus_scale.evaluate.evaluation import evaluate as by_a_suite
from nexus_scale.generate.speech import Speaking, after, padded
from nexus_scale.generate.trained import Trained, make_draw
from nexus_scale.interop import encoders
from nexus_scale.interop.phonemes import Phonemizer
from nexus_scale.interop.valle import from_original
from nexus_scale.media.pictures import spectrogram
from nexus_scale.report.page import write_report
from nexus_scale.run.runs import prepare_run
from nexus_scale.train import Place, train
from tests.distributed import run_ranks

K, V, HOP, RATE = 4, 16, 80, 8000
SENTENCES = ("The birch canoe slid on the planks.", "Glue the sheet.", "It is easy and well.", "A rod is used.")


class StepCodec:
    """Each frame one level of loudness: the first codebook; the others follow it."""

    sample_rate_hz, hop, num_codebooks, codebook_size, fingerprint = RATE, HOP, K, V, "step codec"

    def encode(self, wave: Tensor, lengths: Tensor | None = None) -> Tensor:
        level = wave[:, 0].unfold(1, HOP, HOP).mean(2)  # (B, T')
        first = ((level + 1) / 2 * V).long().clamp(0, V - 1)
        return torch.stack([(first + k) % V for k in range(K)], dim=2)

    def decode(self, codes: Tensor) -> Tensor:
        assert int(codes.min()) >= 0, "padding is not sound"
        return ((codes[..., 0] + 0.5) / V * 2 - 1).repeat_interleave(HOP, dim=1)[:, None]


@pytest.fixture(autouse=True)
def step_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "open_codec", lambda *_: StepCodec())


def codes_of(number: int) -> np.ndarray:
    """Of an utterance, (T, K)."""
    return np.random.default_rng(number).integers(0, V, (9 + number, K)).astype(np.int16)


def write_speech(root: Path) -> None:
    """Eight utterances of two speakers, as codes in length buckets, as phonemes, and as recordings that the codec makes of the codes."""
    phonemizer, caption = Phonemizer(), Field("caption", "txt", "text")
    made: dict[str, tuple[list[Field], str | None]] = {
        "codes": (
            [Field("codes", "codes.npy", "int16", (None, K)), Field("label", "cls", "int64", ())],
            StepCodec.fingerprint,
        ),
        "phonemes": ([Field("phonemes", "phonemes.npy", "int16", (None,)), caption], phonemizer.fingerprint),
        "clips": ([Field("audio", "wav", "int16", (1, None)), caption], None),
    }
    for name, (fields, encoder) in made.items():
        with ShardWriter(root / name / "00000.tar", fields) as writer:
            for number in range(8):
                text, codes = SENTENCES[number % 4], codes_of(number)
                wave = StepCodec().decode(torch.from_numpy(codes[None].astype(np.int64)))[0].numpy()
                bucket = assign_length("codes", len(codes), (12, 20)).name if name == "codes" else ""
                values: dict[str, Any] = {
                    "codes": codes,
                    "label": number % 2,
                    "phonemes": np.array(phonemizer(text), np.int16),
                    "audio": encode_wav(wave, RATE),
                    "caption": f"<b>{text}</b>" if name == "phonemes" else text,
                }
                writer.write(f"{number:03d}", {field.name: values[field.name] for field in fields}, bucket)
        finish_folder(root / name, encoder=None if encoder is None else {"kind": name, "fingerprint": encoder})


def a_run(root: Path, name: str, workers: int, count: int = 3) -> Place:
    """A run of two steps, with what its callback drew of the speech below `root`."""
    split = {"sources": [{"folders": ["speech/codes", "speech/phonemes"]}]}
    changes = {
        "steps": 2,
        "networks": {name: {"num_phonemes": Phonemizer().num_symbols} for name in ("ar", "nar")},
        "data": {
            "synthetic": None, "train": split, "validation": split, "tokens": {"codes": 20, "phonemes": 48},
            "encoders": {"codes": {"run": "codec"}, "phonemes": {"language": "en-us"}},
        },
        "sample": {"name": "autoregressive", "max_tokens": 30},
        "callbacks": {"checkpoint": {"every": 2}, "samples": {"every": 2, "count": count}, "metrics": {"every": 1}, "validate": None},
    }  # fmt: skip
    recipe = recipes.load_recipe("valle/paper", changes, tiny=True)
    cluster = recipes.cluster_from({"workers": workers, "threads_per_worker": 1}, "test")
    place = Place(RunFolder(root / "runs" / name), root / "data", root / "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders, "open_codec", lambda *_: StepCodec())
        if distributed.rank() == 0:
            prepare_run(place.run, recipe, cluster)
        distributed.barrier()
        train(recipe, cluster, place, make_draw)
    return place


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("speaks")
    write_speech(root / "data" / "speech")
    return a_run(root, "speaks", workers=0)


def on_a_rank(rank: int, world_size: int, root: str) -> None:
    a_run(Path(root), "together", world_size, count=4)


@pytest.mark.slow
def test_two_zero3_workers_speak_as_one_does(tmp_path: Path) -> None:
    """With a cache under sharded networks; utterances of one rank end before those of the other."""
    write_speech(tmp_path / "data" / "speech")
    alone = a_run(tmp_path, "alone", workers=0, count=4).run.samples
    run_ranks(2, on_a_rank, str(tmp_path), timeout=600)
    together = tmp_path / "runs" / "together" / "samples"
    sounds = [file.name for file in sorted(alone.glob("*.wav"))]
    assert len(sounds) == 4 and sounds == [file.name for file in sorted(together.glob("*.wav"))]
    assert [(alone / name).read_bytes() for name in sounds] == [(together / name).read_bytes() for name in sounds]
    assert len({len((alone / name).read_bytes()) for name in sounds}) > 1


def test_what_is_drawn_while_training_is_heard_and_seen(trained: Place) -> None:
    """A WAV and a spectrogram for each sample, both in the report, which needs nothing else and escapes what is said."""
    files = sorted(trained.run.samples.glob("step_00000002*"))
    assert [file.suffix for file in files] == [".json", ".png", ".wav", ".wav", ".wav"]
    with wave.open(str(files[-1])) as sound:
        assert (sound.getframerate(), sound.getsampwidth(), sound.getnchannels()) == (RATE, 2, 1)
        assert sound.getnframes() % HOP == 0 and sound.getnframes() > 3 * HOP
    page = write_report(trained.run).read_text()
    assert page.count("<audio") == 3 and page.count("data:audio/wav;base64,") == 3
    assert "<b>It" not in page and "<b>A" not in page and page.count("<p>&lt;b&gt;") == 3
    assert "data:image/png;base64," in page
    row = json.loads(trained.run.metrics.read_text().splitlines()[-1])
    assert row["loss"] == row["ar/loss"] > 1 and row["lr"] == row["ar/lr"] and row["nar/loss"] > 1
    assert not re.search(r"(?:src|href)=['\"]?(?!data:)[^'\" >]+", page), "it asks for something outside"


def test_sentences_are_said_in_a_held_out_voice(trained: Place, tmp_path: Path) -> None:
    folder = evaluate.draw_prompts(trained, ["Glue it.", "../../etc"], speaker="1", output=tmp_path / "said")
    assert sorted(file.name for file in folder.iterdir()) == ["000_glue-it.wav", "001_etc.wav", "grid.png"]
    first = (folder / "000_glue-it.wav").read_bytes()
    evaluate.draw_prompts(trained, ["Glue it."], speaker="1", output=tmp_path / "again")
    assert (tmp_path / "again" / "000_glue-it.wav").read_bytes() == first, (
        "a sentence depends on the seed and its place alone"
    )
    evaluate.draw_prompts(trained, ["Glue it."], speaker="1", seed=1, output=tmp_path / "other")
    assert (tmp_path / "other" / "000_glue-it.wav").read_bytes() != first


def test_a_recording_gives_its_voice(trained: Place, tmp_path: Path) -> None:
    tone = np.sin(np.arange(RATE // 2) / 9)[None].astype(np.float32)
    clip = tmp_path / "voice.wav"
    clip.write_bytes(encode_wav(tone, RATE))
    run = Trained(trained.run, trained)
    voice = run.speaking.voice(clip, "Hello there.")
    assert voice.codes.shape == (RATE // 2 // HOP, K) and voice.phonemes == Phonemizer()("Hello there.")
    folder = evaluate.draw_prompts(
        trained, ["Glue it."], voice=clip, voice_text="Hello there.", output=tmp_path / "said"
    )
    assert (folder / "000_glue-it.wav").exists()


def test_voices_are_of_every_speaker_and_of_the_length_asked_for(trained: Place) -> None:
    run = Trained(trained.run, trained)
    voices = Speaking.held_out(run.dataset, frames=10)
    assert [(voice.name, len(voice.codes)) for voice in voices] == [("0", 9), ("1", 10)]
    cond, given = run.speaking.condition(["A rod."] * 2, voices)
    table = run.speaking.phonemes.phonemizer.table
    said = [
        "".join(table[i] for i in row[mask].tolist())
        for row, mask in zip(cond["phonemes"], cond["phonemes_mask"], strict=True)
    ]
    assert all(text.startswith("<begin>") and text.endswith("<end>") and text.count("<") == 2 for text in said)
    assert given["codes"].shape == (2, 10, K) and given["codes_mask"].sum(1).tolist() == [9, 10]


def test_a_run_is_exported_and_read_back(trained: Place, tmp_path: Path) -> None:
    """Both networks in one file, as lifeiteng/vall-e has them."""
    folder = evaluate.export_run(trained, "original", tmp_path / "export")
    ar, nar = from_original(load_file(folder / "model.safetensors"), num_heads=2)
    nets = Trained(trained.run, trained).nets
    for ours, back in ((nets["ar"], ar), (nets["nar"], nar)):
        state = back.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    readme = (folder / "README.md").read_text()
    told: dict[str, Any] = {"folder": str(folder)}
    exec(re.findall(r"```python\n(.*?)```", readme, re.S)[0], told)
    assert told["weights"].keys() == load_file(folder / "model.safetensors").keys()
    assert "| valle_ar | `ar_` |" in readme and "| valle_nar | `nar_` |" in readme and "num_heads=2" in readme
    with pytest.raises(UserError, match="--format diffusers: valle_ar is exported as original"):
        evaluate.export_run(trained, "diffusers", tmp_path / "none")


def test_mistakes_are_refused_by_name(trained: Place, tmp_path: Path) -> None:
    def refused(words: str, **options: Any) -> None:
        with pytest.raises(UserError, match=words):
            evaluate.draw_prompts(trained, ["Glue it."], output=tmp_path / "none", **options)

    def clip(name: str, content: np.ndarray, rate: int = RATE) -> Path:
        (tmp_path / name).write_bytes(encode_wav(content, rate))
        return tmp_path / name

    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 4000)).astype(np.float32)
    refused("needs --voice-text", voice=clip("a.wav", noise))
    refused(f"got 16000 Hz, the run's codec takes {RATE} Hz", voice=clip("b.wav", noise, 16000), voice_text="Hello.")
    refused("is silent", voice=clip("c.wav", noise * 0), voice_text="Hello.")
    (tmp_path / "d.wav").write_bytes(b"RIFFnothing")
    refused("cannot be read as 16-bit PCM", voice=tmp_path / "d.wav", voice_text="Hello.")
    refused("--guidance: recipe .* draws token by token; leave it out", guidance=2.0)
    refused("no such held-out speaker; .*'?1", speaker="7")
    with pytest.raises(UserError, match="letters"):
        evaluate.draw_prompts(trained, ["Привет"], output=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_another_codec_and_another_phoneme_table_are_refused(trained: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trained(trained.run, trained)
    monkeypatch.setattr(StepCodec, "fingerprint", "another")
    with pytest.raises(
        UserError, match=r"data\.encoders\.codes: has fingerprint another, .* were made with step codec"
    ):
        _ = Speaking(run.recipe, trained, run.dataset).codec
    british = run.recipe.model_copy(
        update={"data": run.recipe.data.model_copy(update={"encoders": {"phonemes": {"language": "en-gb"}}})}
    )
    with pytest.raises(UserError, match=r"data\.encoders\.phonemes: has fingerprint"):
        _ = Speaking(british, trained, run.dataset).phonemes
    with pytest.raises(UserError, match=r"data\.encoders\.codes is left out"):
        _ = Speaking(british, trained, run.dataset).codec


class Listener:
    """Hears what was recorded as it was said, and anything else as rubbish."""

    name = "a listener"

    def __init__(self) -> None:
        self.known = {(9 + n, int(codes_of(n)[0, 0])): SENTENCES[n % 4] for n in range(8)}

    def __call__(self, wave: Tensor, sample_rate_hz: int) -> str:
        assert sample_rate_hz == RATE
        return self.known.get((len(wave) // HOP, int((float(wave[0]) + 1) / 2 * V)), "rubbish")


class Loudness:
    """Knows a voice by its mean."""

    linear = torch.nn.Linear(1, 2)

    @classmethod
    def open(cls) -> Loudness:
        return cls()

    def embed(self, wave: Tensor, sample_rate_hz: int) -> Tensor:
        return torch.stack([wave.mean().cos(), wave.mean().sin()])


@pytest.fixture
def judges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speech_scores, "Recogniser", Listener)
    monkeypatch.setattr(speech_scores, "SpeakerEncoder", Loudness)


@pytest.mark.usefixtures("judges")
@pytest.mark.parametrize("prompt", ["other", "own"])
def test_speech_is_scored_beside_its_resynthesis_and_the_real(trained: Place, prompt: str, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"speech: {{clips: speech/clips, prompt: {prompt}, per_speaker: 2}}")
    scores = evaluate.score(trained, str(settings))
    assert scores["wer_real"] == scores["wer_resynthesis"] == 0.0 < scores["wer"], "the untrained run says rubbish"
    assert scores["similarity_real"] == pytest.approx(scores["similarity_resynthesis"], abs=1e-4)
    assert scores["samples"] == 4 and set(scores["wer_speakers"]) == {"0", "1"}
    assert json.loads((trained.run.path / "scores.json").read_text()) == scores
    heard = json.loads((trained.run.path / "scored" / "heard.json").read_text())
    assert len(heard) == 4 and all(line["caption"] == line["heard_real"] for line in heard)
    assert len(list((trained.run.path / "scored").glob("*.wav"))) == 12
    assert "a listener" in write_report(trained.run).read_text()
    by_suite, _ = by_a_suite(trained.run.path, trained, str(settings), trained.data_root)
    figures = by_suite.figures
    assert figures["speech/wer"].value == pytest.approx(scores["wer"]) and figures["speech/wer"].floor == 0
    assert figures["speech/similarity"].value == pytest.approx(scores["similarity"], abs=1e-6)
    assert figures["speech/similarity"].ceiling == scores["similarity_others"] and figures["speech/wer"].samples == 4


@pytest.mark.usefixtures("judges")
def test_the_second_stage_is_scored_alone(trained: Place, tmp_path: Path) -> None:
    """With the recordings' first codes, which alone this codec hears, in as many passes as there are finer levels; a run beside itself."""
    settings = tmp_path / "settings.yaml"
    beside = "{fine: {levels: 1}, again: {run: speaks, levels: 1}}"
    settings.write_text(
        f"speech: {{clips: speech/clips, split: train, prompt: own, per_speaker: 2, times: 2, beside: {beside}}}"
    )
    scores = evaluate.score(trained, str(settings))
    assert scores["wer"] > 0 and scores["levels"] == 0 and scores["passes"] > K - 1
    assert list(scores["beside"]) == ["fine", "again"]
    for found in scores["beside"].values():
        assert found["wer"] == 0 and found["passes"] == K - 1
        assert found["times_as_long"] == pytest.approx(found["drawing_seconds"] / scores["drawing_seconds"])
        assert found["similarity"] == pytest.approx(scores["similarity_resynthesis"], abs=1e-4)


@pytest.mark.usefixtures("judges")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speech: {clips: speech/codes}", "has no 'audio'"),
        ("speech: {clips: speech/clips, prompt: nothing}", r"speech\.prompt"),
        ("speech: {clips: speech/clips, per_speakers: 2}", "per_speakers"),
        ("speech: {clips: speech/clips, levels: 1}", "are of prompt: own"),
        (
            f"speech: {{clips: speech/clips, prompt: own, levels: {K}}}",
            f"got {K} of recipe valle_paper; expected at most",
        ),
        ("speech: {clips: speech/clips, prompt: own, beside: {other: {run: none}}}", "none"),
    ],
)
def test_settings_that_do_not_fit_are_refused(trained: Place, text: str, words: str, tmp_path: Path) -> None:
    settings = tmp_path / "settings.yaml"
    settings.write_text(text)
    with pytest.raises(UserError, match=words):
        evaluate.score(trained, str(settings))


def test_the_parts() -> None:

    assert after([1, 7, 8, 2], [1, 9, 2], 4) == [1, 7, 8, 4, 9, 2]
    rows, real = padded([torch.tensor([1, 2]), torch.tensor([3])])
    assert rows.tolist() == [[1, 2], [3, 0]] and real.tolist() == [[True, True], [True, False]]
    times = torch.arange(RATE) / RATE
    low, high = (spectrogram(0.5 * torch.sin(2 * torch.pi * hz * times), RATE) for hz in (200, 3000))
    assert low.dtype == np.uint8 and low.shape[2] == 3
    darkest = [picture.astype(int).sum((1, 2)).argmin() / len(picture) for picture in (low, high)]
    assert darkest[0] > 0.7 and darkest[1] < 0.3, "low tones lie below"
    assert spectrogram(torch.zeros(5), RATE).min() == 0 or spectrogram(torch.zeros(5), RATE).max() <= 255
