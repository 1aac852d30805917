"""Whether the attributes of speech come from where they are taken: held-out sentences in one speaker's voice, with the prosody of another
and the timbre of a third.

A speaker encoder says whose voice it is, Praat how high it lies and how much it moves, the number of phones a second how fast it is, each
as a distance from the recordings that it was taken from; a recogniser writes down what is heard.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.data.sounds import encode_wav
from nexus_scale.engine.hardware import Hardware
from nexus_scale.evaluate.speech import Speech, SpeechScoreSettings, Utterance, embedded
from nexus_scale.generate.trained import Trained
from nexus_scale.interop.pitch import check_pitch, pitch_of
from nexus_scale.io.durable import atomic_write
from nexus_scale.metrics.speaker import SpeakerEncoder, similarity
from nexus_scale.metrics.wer import word_error_rate
from nexus_scale.train import Place

CASES: Mapping[str, tuple[bool, bool]] = {
    "plain": (False, False),
    "prosody": (True, False),
    "timbre": (False, True),
    "both": (True, True),
}
"""By name: whether the prosody and whether the timbre are other speakers'."""
HOPS_PER_SECOND = 100


class SwapScoreSettings(BaseModel):
    """The `swaps:` section of a settings file.

    `clips`: folder of the recordings (`audio`, `caption`) that the run's validation data were made of. `per_speaker`: sentences in each
    speaker's voice; the prosody is the next speaker's, the timbre that of the one after. `steps`: of the run's sampler.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    clips: str
    per_speaker: int = Field(4, ge=1, le=10**6)
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int | None = Field(None, ge=1, le=10_000)


class Cast(NamedTuple):
    """A sentence to say, and recordings of the speaker in whose voice it is said, of another's prosody and of a third's timbre."""

    sentence: Utterance
    own: Utterance
    prosody: Utterance
    timbre: Utterance


class Traits(NamedTuple):
    """voice: its embedding; `semitones` of the median pitch above 1 Hz and `spread`, the deviation of the pitch from its mean in semitones,
    None where nothing is voiced; `pace` in phones a second."""

    voice: Tensor
    semitones: float | None
    spread: float | None
    pace: float


def cast_of(pairs: Sequence[tuple[Utterance, Utterance]]) -> list[Cast]:
    """Of sentences with a recording of their speakers, whose prosody and whose timbre are taken.

    Raises:
        UserError: fewer than three speakers.
    """
    prompts = {prompt.speaker: prompt for _, prompt in reversed(pairs)}
    speakers = sorted(prompts)
    if len(speakers) < 3:
        raise UserError(f"swaps: the held-out data have {len(speakers)} speakers; expected at least 3", code=3)
    found = []
    for sentence, own in pairs:
        place = speakers.index(own.speaker)
        others = [prompts[speakers[(place + k) % len(speakers)]] for k in (1, 2)]
        found.append(Cast(sentence, own, *others))
    return found


def traits_of(encoder: SpeakerEncoder, wave: Tensor, sample_rate_hz: int, phones: int) -> Traits:
    """What is heard of a wave (T,) in which so many phones are said."""
    hz = pitch_of(wave.numpy(), sample_rate_hz, sample_rate_hz // HOPS_PER_SECOND)
    heights = 12 * np.log2(hz[hz > 0])
    semitones, spread = (float(np.median(heights)), float(heights.std())) if len(heights) else (None, None)
    pace = phones * sample_rate_hz / max(len(wave), 1)
    return Traits(embedded(encoder, wave, sample_rate_hz), semitones, spread, pace)


def distances(said: Traits, own: Traits, prosody: Traits, timbre: Traits) -> dict[str, float | None]:
    """How alike the voice is to its own speaker's and to that of the timbre; and how far the pitch is from theirs, its spread and the pace
    from its own speaker's and from those of the prosody."""
    return {
        "similarity_own": float(similarity(said.voice, own.voice)),
        "similarity_timbre": float(similarity(said.voice, timbre.voice)),
        "semitones_from_own": _apart(said.semitones, own.semitones),
        "semitones_from_timbre": _apart(said.semitones, timbre.semitones),
        "spread_from_own": _apart(said.spread, own.spread),
        "spread_from_prosody": _apart(said.spread, prosody.spread),
        "pace_from_own": _apart(said.pace, own.pace),
        "pace_from_prosody": _apart(said.pace, prosody.pace),
    }


def _apart(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else abs(one - other)


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None


def swapped(speech: Speech, casts: Sequence[Cast], case: str) -> list[Tensor]:
    """The sentences as the run says them in a case of `CASES`, (T,) each."""
    prosody, timbre = CASES[case]
    voices = [one.own.voice._replace(timbre=(one.timbre if timbre else one.own).timbre) for one in casts]
    manners = [one.prosody.voice for one in casts] if prosody else None
    texts = [one.sentence.caption for one in casts]
    made = speech.trained.speak(
        texts, voices, manners=manners, seed=speech.settings.seed, steps=speech.settings.steps
    )  # fmt: skip
    return [wave[0].cpu() for wave in made]


def score_swaps(place: Place, settings: SwapScoreSettings, hardware: Hardware | None = None) -> dict[str, Any]:
    """Says held-out sentences with swapped attributes, writes them to `scored/` and the scores to scores.json.

    Returns:
        By case, `plain`, `prosody`, `timbre` and `both`, and of the sentences' recordings, `real`: `wer`, `seconds`, and the means of
        `distances`; where a swap works, the figures of another are the smaller distance, or the higher similarity. `samples`,
        `recogniser`.
    Raises:
        UserError: a run that does not draw prosody and timbre apart, a package that is missing, fewer than three speakers.
    """
    check_pitch()
    trained = Trained(place.run, place, hardware=hardware)
    if not {"prosody", "timbre"} <= set(trained.draws.takes):
        raise UserError(
            f"{place.run.path}: recipe {trained.recipe.name} does not draw prosody and timbre apart (objective naturalspeech3)"
        )
    speech = Speech.ready(place, SpeechScoreSettings(**settings.model_dump()), trained)
    casts = cast_of(speech.pairs)
    rate = trained.speaking.codec.sample_rate_hz
    waves = {case: [(wave, rate) for wave in swapped(speech, casts, case)] for case in CASES}
    waves["real"] = [(one.sentence.wave, one.sentence.sample_rate_hz) for one in casts]
    heard = {case: [speech.recogniser(*wave) for wave in several] for case, several in waves.items()}
    scores: dict[str, Any] = {
        case: {"wer": word_error_rate(speech.captions, heard[case]).rate, **said_apart(speech.encoder, casts, several)}
        for case, several in waves.items()
    }
    scores |= {"samples": len(casts), "recogniser": speech.recogniser.name}
    folder = place.run.path / "scored"
    folder.mkdir(exist_ok=True)
    for case in CASES:
        for number, (wave, own_rate) in enumerate(waves[case]):
            atomic_write(folder / f"{number:03d}_{case}.wav", encode_wav(wave[None].numpy(), own_rate))
    lines = [
        {"caption": one.sentence.caption, "own": one.own.speaker, "prosody": one.prosody.speaker, "timbre": one.timbre.speaker,
         **{f"heard_{case}": texts[number] for case, texts in heard.items()}}
        for number, one in enumerate(casts)
    ]  # fmt: skip
    atomic_write(folder / "heard_swaps.json", json.dumps(lines, indent=1, ensure_ascii=False).encode())
    atomic_write(place.run.path / "scores.json", json.dumps(scores, indent=1).encode())
    return scores


def said_apart(
    encoder: SpeakerEncoder, casts: Sequence[Cast], waves: Sequence[tuple[Tensor, int]]
) -> dict[str, float | None]:
    """Means over sentences of their `seconds` and their `distances`."""
    known: dict[str, Traits] = {}

    def of(recording: Utterance) -> Traits:
        if recording.key not in known:
            wave, rate = recording.wave, recording.sample_rate_hz
            known[recording.key] = traits_of(encoder, wave, rate, len(recording.phonemes))
        return known[recording.key]

    rows: list[dict[str, float | None]] = []
    for cast, (wave, rate) in zip(casts, waves, strict=True):
        said = traits_of(encoder, wave, rate, len(cast.sentence.phonemes))
        row = distances(said, of(cast.own), of(cast.prosody), of(cast.timbre))
        rows.append({"seconds": len(wave) / rate, **row})
    return {name: _mean([row[name] for row in rows]) for name in rows[0]}
