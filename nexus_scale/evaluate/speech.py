"""What speech is good for: sentences that training never saw, said in held-out voices; a recogniser writes them down, a speaker
encoder compares the voice.

Beside what the run says, the same is measured of its codec's resynthesis of the real recordings, which nothing that speaks in those codes
can be better than, and of the recordings themselves.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from nexus_scale.conditioners.audio import TIMBRE
from nexus_scale.contracts import Batch, RunFolder, UserError
from nexus_scale.data.fields import read_bytes
from nexus_scale.data.manifest import Manifest
from nexus_scale.data.reader import read_alone
from nexus_scale.data.sounds import decode_wav, encode_wav
from nexus_scale.engine.hardware import Hardware
from nexus_scale.generate.drawing import request_of
from nexus_scale.generate.speech import Voice, beside_codes, padded
from nexus_scale.generate.trained import Trained
from nexus_scale.io.durable import atomic_write
from nexus_scale.metrics.speaker import SpeakerEncoder, similarity
from nexus_scale.metrics.wer import Recogniser, word_error_rate
from nexus_scale.train import Place, open_data

log = logging.getLogger(__name__)


class Drawing(BaseModel):
    """How sentences are drawn. `steps`: of the run's sampler, where it has any. `levels`: so many levels of codes are the recordings' own,
    and the finer ones alone are drawn; of `prompt: own`, where the run draws levels of codes."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    steps: int | None = Field(None, ge=1, le=10_000)
    levels: int = Field(0, ge=0, le=1024)


class Beside(Drawing):
    """The same sentences otherwise: by another `run`, or by this one."""

    run: str | None = None


class SpeechScoreSettings(Drawing):
    """The `speech:` section of a settings file.

    `clips`: folder of the recordings (`audio`, `caption`) that the run's `split` was made of; its validation data, or its training data
    where it has no validation. `prompt`: `other` is the paper's main setting, the prompt another utterance of the speaker; `own` its
    continuation, the prompt the sentence's own beginning as `continued` of the objective gives it, which then counts as said.
    `per_speaker`: sentences of each speaker. `beside`: what else says them, by names of its own; of `prompt: own`, where drawing is timed
    apart. `times`: how often it is timed, of which the fastest counts.
    """

    clips: str
    split: Literal["train", "validation"] | None = None
    prompt: Literal["other", "own"] = "other"
    per_speaker: int = Field(4, ge=1, le=10**6)
    seed: int = Field(0, ge=0, lt=2**63)
    beside: dict[str, Beside] = {}
    times: int = Field(1, ge=1, le=1000)

    @model_validator(mode="after")
    def _of_own(self) -> SpeechScoreSettings:
        if self.prompt != "own" and (self.levels or self.beside or self.times > 1):
            raise ValueError(
                "levels, beside and times are of prompt: own, where codes are drawn for known sentences; set it"
            )
        return self


@dataclass(frozen=True)
class Utterance:
    """A held-out recording: its codes (T, K), phonemes, wave (T,) and text; `beside`: other sequences of it, and `timbre`, as a `Voice` has
    them."""

    key: str
    sample: int
    speaker: int
    codes: Tensor
    phonemes: list[int]
    caption: str
    wave: Tensor
    sample_rate_hz: int
    beside: Mapping[str, Tensor]
    timbre: Tensor | None = None

    @property
    def voice(self) -> Voice:
        """The recording as a prompt."""
        return Voice(self.key, self.phonemes, self.codes, self.beside, self.timbre)


def utterances(dataset: Any, clips: Manifest) -> list[Utterance]:
    """All utterances of a data set of codes and phonemes, with the recordings of the same keys.

    Raises:
        UserError: the recordings are of other samples, or have no captions.
    """
    for field in ("audio", "caption"):
        if field not in clips.fields:
            raise UserError(
                f"speech.clips: {clips.where} has no {field!r}; give the folder that the codes were made from", code=3
            )
    places = {clips.index.key(number): number for number in range(clips.samples)}
    found: list[Utterance] = []
    for batch in (given.on("cpu") for given in dataset.fixed(dataset.samples, batch=64)):
        keys = dataset.keys(batch.samples.tolist())
        if missing := [key for key in keys if key not in places]:
            raise UserError(
                f"speech.clips: {clips.where} has no recording {missing[0]!r}; give the folder that the codes were made from",
                code=3,
            )
        numbers = np.array([places[key] for key in keys], np.int64)
        sounds = [decode_wav(data) for data in read_bytes(read_alone(clips, "audio", numbers))]
        captions = [data.decode() for data in read_bytes(read_alone(clips, "caption", numbers))]
        for row, (key, said, sound) in enumerate(zip(keys, captions, sounds, strict=True)):
            found.append(
                Utterance(
                    key=key,
                    sample=int(batch.samples[row]),
                    speaker=int(batch["label"][row]) if "label" in batch else 0,
                    codes=batch["codes"][row][batch["codes_mask"][row]],
                    phonemes=batch["phonemes"][row][batch["phonemes_mask"][row]].tolist(),
                    caption=said,
                    wave=torch.from_numpy(sound.wave).mean(0),
                    sample_rate_hz=sound.sample_rate_hz,
                    beside=beside_codes(batch, row),
                    timbre=batch[TIMBRE][row] if TIMBRE in batch else None,
                )
            )
    return sorted(found, key=lambda one: one.key)


def chosen(all_of_them: Sequence[Utterance], per_speaker: int, frames: int) -> list[tuple[Utterance, Utterance]]:
    """Sentences to say, spread over each speaker's, and for each another utterance of the speaker, the one nearest in length to
    `frames`.

    Raises:
        UserError: a speaker with a single utterance.
    """
    pairs = []
    for speaker in sorted({one.speaker for one in all_of_them}):
        own = [one for one in all_of_them if one.speaker == speaker]
        if len(own) < 2:
            raise UserError(
                f"speech: speaker {speaker} has one utterance; expected two, a prompt and a sentence", code=3
            )
        count = min(per_speaker, len(own))
        for sentence in [own[i * len(own) // count] for i in range(count)]:
            others = [one for one in own if one is not sentence]
            pairs.append((sentence, min(others, key=lambda one: (abs(len(one.codes) - frames), one.key))))
    return pairs


@dataclass(frozen=True)
class Said:
    """Sentences as they were spoken, (T,) each; of drawing them alone, without decoding, the forward passes, or steps of a solver, that
    were reported, and the seconds: None where they were not measured apart."""

    waves: list[Tensor]
    passes: int | None = None
    seconds: float | None = None

    @property
    def figures(self) -> dict[str, Any]:
        """As scores.json has them."""
        return {} if self.seconds is None else {"passes": self.passes, "drawing_seconds": self.seconds}


@dataclass(frozen=True)
class Heard:
    """What the run says, and, with `_resynthesis` and `_real`, what its codec makes of the recordings and these themselves.

    Attributes:
        waves, texts, similarities: by kind, of each sentence: (T,) with its rate, what the recogniser writes down, and how alike the voice
            is to the prompt's, (N,).
        others: the mean similarity of real recordings of other speakers to the prompts; None: there is one speaker.
    """

    waves: Mapping[str, list[tuple[Tensor, int]]]
    texts: Mapping[str, list[str]]
    similarities: Mapping[str, Tensor]
    others: float | None
    speaking_seconds: float
    drawing: Mapping[str, Any]


@dataclass(frozen=True)
class Speech:
    """Sentences to say, with the prompts of their voices, and who listens."""

    settings: SpeechScoreSettings
    trained: Trained
    pairs: list[tuple[Utterance, Utterance]]
    recogniser: Recogniser
    encoder: SpeakerEncoder

    @classmethod
    def ready(cls, place: Place, settings: SpeechScoreSettings, trained: Trained) -> Speech:
        """Finds what scoring needs, before anything is spoken.

        Raises:
            UserError: a package or recordings are missing, the run does not speak, or draws no levels of codes.
        """
        recogniser, encoder = Recogniser(), SpeakerEncoder.open()
        return cls.of(place, settings, trained, recogniser, encoder)

    @classmethod
    def of(
        cls,
        place: Place,
        settings: SpeechScoreSettings,
        trained: Trained,
        recogniser: Recogniser,
        encoder: SpeakerEncoder,
    ) -> Speech:
        """The sentences of a run's own data, for those who listen."""
        if "voice" not in trained.draws.takes:
            raise UserError(f"{place.run.path}: recipe {trained.recipe.name} does not speak; score it by groups")
        _check_drawing(settings, trained)
        split = settings.split or ("train" if trained.recipe.data.validation is None else "validation")
        heldout = open_data(trained.recipe, place.data_root, split, beside=trained.dataset)
        said_of = utterances(heldout, Manifest.load(place.data_root / settings.clips))
        pairs = chosen(said_of, settings.per_speaker, trained.prompt_frames)
        return cls(settings, trained, pairs, recogniser, encoder)

    @property
    def captions(self) -> list[str]:
        return [sentence.caption for sentence, _ in self.pairs]

    def heard(self) -> Heard:
        """Speaks all sentences and listens to them."""
        rate, speaking, pairs = self.trained.speaking.codec.sample_rate_hz, self.trained.speaking, self.pairs
        started = time.monotonic()
        said = self.said()
        speaking_seconds = time.monotonic() - started
        waves: dict[str, list[tuple[Tensor, int]]] = {
            "": [(wave, rate) for wave in said.waves],
            "_resynthesis": [(speaking.wave(one.codes, timbre=one.timbre), rate) for one, _ in pairs],
            "_real": [(sentence.wave, sentence.sample_rate_hz) for sentence, _ in pairs],
        }
        texts = {kind: [self.recogniser(*wave) for wave in several] for kind, several in waves.items()}
        prompts = self._prompts()
        voices = {
            kind: torch.stack([embedded(self.encoder, *wave) for wave in several]) for kind, several in waves.items()
        }
        speakers = torch.tensor([sentence.speaker for sentence, _ in pairs])
        across = similarity(voices["_real"][:, None], prompts[None])  # (sentences, prompts)
        apart = speakers[:, None] != speakers[None]
        others = float(across[apart].mean()) if bool(apart.any()) else None
        alike = {kind: similarity(voice, prompts) for kind, voice in voices.items()}
        return Heard(waves, texts, alike, others, speaking_seconds, said.figures)

    def said(self) -> Said:
        """The sentences as the run speaks them."""
        return _said(self.trained, self.pairs, self.settings)

    def _prompts(self) -> Tensor:
        return torch.stack([self.encoder.embed(prompt.wave, prompt.sample_rate_hz) for _, prompt in self.pairs])

    def beside(self, hardware: Hardware | None) -> dict[str, Speech]:
        """What else is to say the same sentences.

        Raises:
            UserError: no such run, one of other sentences, or one that does not draw so.
        """
        place, found = self.trained.place, {}
        for name, other in self.settings.beside.items():
            settings = self.settings.model_copy(update={"steps": other.steps, "levels": other.levels, "beside": {}})
            if other.run is None:
                _check_drawing(settings, self.trained)
                found[name] = replace(self, settings=settings)
                continue
            there = replace(place, run=RunFolder(place.runs_root / other.run))
            trained = Trained(there.run, there, hardware=hardware)
            found[name] = Speech.of(there, settings, trained, self.recogniser, self.encoder)
            if found[name].captions != self.captions:
                raise UserError(f"speech.beside.{name}: run {other.run} was trained beside other sentences", code=3)
        return found

    def figures(self) -> dict[str, Any]:
        """Of what the run says alone: `wer`, `similarity`, and how long drawing took."""
        said, rate = self.said(), self.trained.speaking.codec.sample_rate_hz
        heard = [self.recogniser(wave, rate) for wave in said.waves]
        voices = torch.stack([embedded(self.encoder, wave, rate) for wave in said.waves])
        alike = float(similarity(voices, self._prompts()).mean())
        return {"wer": word_error_rate(self.captions, heard).rate, "similarity": alike, **said.figures}


def _check_drawing(settings: SpeechScoreSettings, trained: Trained) -> None:
    """Raises a UserError where the run draws no finer levels than those that are given."""
    most = trained.draws.levels - 1
    if settings.levels > max(0, most):
        can = f"expected at most {most}" if most > 0 else "it draws no levels of codes; leave levels out"
        raise UserError(f"speech.levels: got {settings.levels} of recipe {trained.recipe.name}; {can}")


def score_speech(place: Place, settings: SpeechScoreSettings, hardware: Hardware | None = None) -> dict[str, Any]:
    """Speaks held-out sentences, and writes them to `scored/` and the scores to scores.json.

    Returns:
        `wer`, `wer_resynthesis`, `wer_real`: word error rates of what the run says, of its codec's resynthesis, of the recordings.
        `similarity` and `similarity_resynthesis`, `similarity_real`: of the voice to another recording of the same speaker, the
        prompt's; `similarity_others`: of real recordings of other speakers to it. `wer_speakers`: of each speaker. `recogniser`, `prompt`,
        `samples`, `seconds`; `speaking_seconds`, what speaking took of them, for `spoken_seconds` of speech; `steps`, `levels`.
        Of `prompt: own` `passes` and `drawing_seconds`, see `Said`; and `beside`, by name, `wer`, `similarity`, `passes`,
        `drawing_seconds`, and `times_as_long`: these seconds over the run's own.
    """
    begun = time.monotonic()
    speech = Speech.ready(place, settings, Trained(place.run, place, hardware=hardware))
    others = speech.beside(hardware)
    heard = speech.heard()
    scores: dict[str, Any] = {}
    for kind, texts in heard.texts.items():
        scores[f"wer{kind}"] = word_error_rate(speech.captions, texts).rate
        scores[f"similarity{kind}"] = float(heard.similarities[kind].mean())
    speakers = torch.tensor([sentence.speaker for sentence, _ in speech.pairs])
    scores |= {
        "similarity_others": heard.others,
        "wer_speakers": {
            str(k): _rate(speech.captions, heard.texts[""], (speakers == k).tolist())
            for k in sorted(set(speakers.tolist()))
        },
        "recogniser": speech.recogniser.name,
        "prompt": settings.prompt,
        "samples": len(speech.pairs),
        "seconds": time.monotonic() - begun,
        "speaking_seconds": heard.speaking_seconds,
        "spoken_seconds": sum(len(wave) / rate for wave, rate in heard.waves[""]),
        "steps": settings.steps,
        "levels": settings.levels,
        **heard.drawing,
    }
    for name, other in others.items():
        found = other.figures()
        found["times_as_long"] = found["drawing_seconds"] / scores["drawing_seconds"]
        scores.setdefault("beside", {})[name] = found
    folder = place.run.path / "scored"
    folder.mkdir(exist_ok=True)
    lines: list[dict[str, Any]] = []
    for number, (sentence, prompt) in enumerate(speech.pairs):
        for kind, several in heard.waves.items():
            wave, own_rate = several[number]
            atomic_write(folder / f"{number:03d}{kind or '_said'}.wav", encode_wav(wave[None].numpy(), own_rate))
        found = {f"heard{kind}": texts[number] for kind, texts in heard.texts.items()}
        lines.append({"caption": sentence.caption, "speaker": sentence.speaker, "prompt": prompt.caption, **found})
    for path in folder.glob("*_*.wav"):
        begins = path.name.split("_")[0]
        if begins.isdecimal() and int(begins) >= len(speech.pairs):  # left by an earlier score with more sentences
            path.unlink()
    atomic_write(folder / "heard.json", json.dumps(lines, indent=1, ensure_ascii=False).encode())
    atomic_write(place.run.path / "scores.json", json.dumps(scores, indent=1).encode())
    return scores


def _said(trained: Trained, pairs: Sequence[tuple[Utterance, Utterance]], settings: SpeechScoreSettings) -> Said:
    """The sentences as the run speaks them."""
    if settings.prompt == "other":
        voices = [prompt.voice for _, prompt in pairs]
        texts = [sentence.caption for sentence, _ in pairs]
        waves = trained.speak(texts, voices, seed=settings.seed, steps=settings.steps)
        return Said([wave[0].cpu() for wave in waves])
    codes, codes_mask = padded([sentence.codes for sentence, _ in pairs])
    phonemes, phonemes_mask = padded([torch.tensor(sentence.phonemes) for sentence, _ in pairs])
    positions = torch.arange(len(pairs))
    fields = {"codes": codes, "codes_mask": codes_mask, "phonemes": phonemes, "phonemes_mask": phonemes_mask}
    for name in pairs[0][0].beside:
        fields[name], fields[f"{name}_mask"] = padded([sentence.beside[name] for sentence, _ in pairs])
    timbres = [sentence.timbre for sentence, _ in pairs if sentence.timbre is not None]
    if timbres:
        fields[TIMBRE] = torch.stack(timbres)
    batch = Batch(fields, positions, torch.tensor([sentence.sample for sentence, _ in pairs]))
    asked = request_of(trained.recipe, trained.objective, steps=settings.steps)
    cond, request = trained.objective.request_like(batch, asked)
    if settings.levels:
        request = replace(request, known=codes[..., : settings.levels], lengths=codes_mask.sum(1))
    passes: list[int] = []
    request = replace(request, progress=lambda done, steps: passes.append(done))
    seconds = []
    for _ in range(settings.times):
        begun = time.monotonic()
        spoken = trained.generate(cond, request, seed=settings.seed, positions=positions.tolist())
        seconds.append(time.monotonic() - begun)
    return Said([wave[0].cpu() for wave in trained.shown(spoken)], passes[-1] if passes else None, min(seconds))


def embedded(encoder: SpeakerEncoder, wave: Tensor, sample_rate_hz: int) -> Tensor:
    """The speaker embedding of a wave; zeros for silence, which resemble no speaker."""
    if not bool(wave.any()):
        return torch.zeros(encoder.linear.out_features)
    return encoder.embed(wave, sample_rate_hz)


def _rate(captions: Sequence[str], heard: Sequence[str], kept: Sequence[bool]) -> float:
    own = [(a, b) for a, b, keep in zip(captions, heard, kept, strict=True) if keep]
    return word_error_rate([a for a, _ in own], [b for _, b in own]).rate
