"""What changed recordings are good for: a word of a sentence is said in another's place, or the middle of one is spoken anew.

A recogniser writes down what is then heard. Beside it stand the recordings as they are, and with noise in their middle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import Manifest
from nexus_scale.data.sounds import encode_wav
from nexus_scale.engine.hardware import Hardware
from nexus_scale.evaluate.speech import Utterance, utterances
from nexus_scale.generate.drawing import request_of
from nexus_scale.generate.speech import padded
from nexus_scale.generate.trained import Trained
from nexus_scale.io.durable import atomic_write
from nexus_scale.metrics.speaker import SpeakerEncoder, similarity
from nexus_scale.metrics.wer import Recogniser, normalise, word_error_rate
from nexus_scale.train import Place, open_data

LOUD = 0.2
"""Of the noise, where recordings reach 1."""


class EditScoreSettings(BaseModel):
    """The `edits:` section of a settings file.

    `clips`: folder of the recordings (`audio`, `caption`) that the run's validation data were made of. `words`: by a word, the one that is
    said in its place. `count`: sentences, spread over those that have such a word within them. `middle`: from which share of a
    recording to which it is spoken anew.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    clips: str
    words: dict[str, str] = Field(min_length=1)
    count: int = Field(20, ge=1, le=10**6)
    middle: tuple[float, float] = (0.3, 0.7)
    steps: int | None = Field(None, ge=1, le=10_000)
    seed: int = Field(0, ge=0, lt=2**63)


def changed(caption: str, words: Mapping[str, str]) -> tuple[str, str, str] | None:
    """The sentence with another word in the place of its first that has one, that word, and the new one; not its first or last word."""
    said = caption.split(" ")
    for place in range(1, len(said) - 1):
        if said[place] in words:
            new = words[said[place]]
            return " ".join([*said[:place], new, *said[place + 1 :]]), said[place], new
    return None


def score_edits(place: Place, settings: EditScoreSettings, hardware: Hardware | None = None) -> dict[str, Any]:
    """Changes held-out recordings, writes them to `scored/` and the scores to scores.json.

    Returns:
        `wer_edited`, of the changed sentences; `new_words_heard` and `old_words_heard`, the shares of sentences in which they are;
        `similarity_edited`, of the voice to the recording's. `wer_middle` and `similarity_middle`, of recordings whose middle is spoken
        anew; `wer_noise`, with noise there; `wer_real`, as they are. `samples`, `recogniser`.
    Raises:
        UserError: a run that changes no recordings, a package that is missing, too few sentences with one of the words.
    """
    recogniser, encoder = Recogniser(), SpeakerEncoder.open()
    trained = Trained(place.run, place, hardware=hardware)
    if "edit" not in trained.draws.takes:
        raise UserError(f"{place.run.path}: recipe {trained.recipe.name} changes no recordings (objective infilling)")
    data = open_data(trained.recipe, place.data_root, "validation", beside=trained.dataset)
    every = [
        (one, changed(one.caption, settings.words))
        for one in utterances(data, Manifest.load(place.data_root / settings.clips))
    ]
    having = [(one, to) for one, to in every if to is not None]
    if len(having) < settings.count:
        raise UserError(
            f"edits.words: {len(having)} of {len(every)} sentences have one of them within; expected count, {settings.count}"
        )
    some = [having[i * len(having) // settings.count] for i in range(settings.count)]
    real = [one for one, _ in some]
    edited = with_other_words(trained, real, [to[0] for _, to in some], settings)
    middle = spoken_anew(trained, real, settings)
    rate = trained.speaking.codec.sample_rate_hz
    waves = {"edited": edited, "middle": middle, "noise": [with_noise(one.wave, settings.middle) for one in real]}
    rates = {"edited": rate, "middle": rate, "noise": real[0].sample_rate_hz, "real": real[0].sample_rate_hz}
    waves["real"] = [one.wave for one in real]
    heard = {kind: [recogniser(wave, rates[kind]) for wave in several] for kind, several in waves.items()}
    captions = [one.caption for one in real]
    wanted = {kind: [to[0] for _, to in some] if kind == "edited" else captions for kind in heard}
    scores: dict[str, Any] = {f"wer_{kind}": word_error_rate(wanted[kind], heard[kind]).rate for kind in heard}
    voices = torch.stack([encoder.embed(one.wave, one.sample_rate_hz) for one in real])
    for kind in ("edited", "middle"):
        ours = torch.stack([encoder.embed(wave, rate) for wave in waves[kind]])
        scores[f"similarity_{kind}"] = float(similarity(ours, voices).mean())
    words = [normalise(text) for text in heard["edited"]]
    for which, name in ((2, "new"), (1, "old")):
        scores[f"{name}_words_heard"] = sum(to[which] in text for (_, to), text in zip(some, words, strict=True)) / len(
            some
        )
    scores |= {"samples": len(some), "recogniser": recogniser.name}
    folder = place.run.path / "scored"
    folder.mkdir(exist_ok=True)
    for kind in ("edited", "middle"):
        for number, wave in enumerate(waves[kind]):
            atomic_write(folder / f"{number:03d}_{kind}.wav", encode_wav(wave[None].numpy(), rate))
    lines = [
        {"caption": one.caption, "edited": to[0], **{f"heard_{kind}": texts[n] for kind, texts in heard.items()}}
        for n, (one, to) in enumerate(some)
    ]
    atomic_write(folder / "heard_edits.json", json.dumps(lines, indent=1, ensure_ascii=False).encode())
    atomic_write(place.run.path / "scores.json", json.dumps(scores, indent=1).encode())
    return scores


def with_other_words(
    trained: Trained, real: Sequence[Utterance], texts: Sequence[str], settings: EditScoreSettings
) -> list[Tensor]:
    """The recordings (T,) with other words."""
    was = padded([torch.tensor(one.phonemes) for one in real])
    return _drawn(
        trained,
        real,
        [torch.tensor(trained.speaking.spoken(text)) for text in texts],
        settings,
        said=was[0],
        said_mask=was[1],
    )


def spoken_anew(trained: Trained, real: Sequence[Utterance], settings: EditScoreSettings) -> list[Tensor]:
    """The recordings (T,) with their middle spoken anew."""
    frames = padded([one.codes for one in real])[1]
    share = torch.arange(frames.shape[1]) / frames.sum(1, keepdim=True)
    gap = (share >= settings.middle[0]) & (share < settings.middle[1]) & frames
    return _drawn(trained, real, [torch.tensor(one.phonemes) for one in real], settings, gap=gap)


def _drawn(
    trained: Trained, real: Sequence[Utterance], says: Sequence[Tensor], settings: EditScoreSettings, **given: Tensor
) -> list[Tensor]:
    text, codes = padded(list(says)), padded([one.codes for one in real])
    asked = request_of(trained.recipe, trained.objective, steps=settings.steps)
    asked = replace(asked, given={"codes": codes[0], "codes_mask": codes[1], **given})
    cond = {"phonemes": text[0], "phonemes_mask": text[1]}
    made = trained.generate(cond, asked, seed=settings.seed, positions=list(range(len(real))))
    return [wave[0].cpu() for wave in trained.shown(made)]


def with_noise(wave: Tensor, middle: tuple[float, float]) -> Tensor:
    """A recording (T,) with noise in its middle."""
    begin, end = (int(share * len(wave)) for share in middle)
    noise = LOUD * torch.randn(end - begin, generator=torch.Generator().manual_seed(0))
    return torch.cat([wave[:begin], noise.to(wave), wave[end:]])
