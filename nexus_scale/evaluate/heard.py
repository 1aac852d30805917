"""The `speech:` and `music:` sections of a suite: as `nexus score` measures them, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from nexus_scale.data.manifest import Manifest, canonical_json
from nexus_scale.evaluate.findings import Findings, figure_of_rows
from nexus_scale.evaluate.music import (
    MusicScoreSettings,
    answers_of,
    check_said,
    known_timbres,
    others_of,
    own_of,
    played,
    recordings,
    share,
)
from nexus_scale.evaluate.sources import Waves, recordings_of, sounds_of
from nexus_scale.evaluate.speech import Speech, SpeechScoreSettings
from nexus_scale.generate.drawing import request_of
from nexus_scale.generate.trained import Trained
from nexus_scale.metrics.statistics import Resampling
from nexus_scale.metrics.wer import Errors, Recogniser, character_error_rate, word_error_rate

NO_VOICE = "a folder of sounds does not say whose voice each is in"


def ready_for_speech(
    settings: SpeechScoreSettings, target: Trained | Path, data_root: Path, resampling: Resampling
) -> Callable[[], Findings]:
    """Finds sentences and listeners, and returns what speaks and measures.

    The floor of each figure is that of the recordings; the ceiling of similarity that of other speakers' recordings. `speech/wer` and
    `speech/cer` are the error rates, in words and in characters, of all sentences together. Of a folder these alone are known, beside
    those of as many recordings.

    Raises:
        UserError: see `Speech.ready` and `sounds_of`.
    """
    if isinstance(target, Path):
        return _ready_to_listen(settings, target, data_root, resampling)
    trained = target
    speech = Speech.ready(trained.place, settings, trained)

    def measure() -> Findings:
        heard = speech.heard()
        found = _findings(settings.clips, data_root, speech.captions, settings.seed)
        _add_errors(
            found, speech.recogniser, {kind: (speech.captions, heard.texts[kind]) for kind in ("", "_real")}, resampling
        )
        alike = heard.similarities
        figure_of_rows(
            found, "speech/similarity", alike[""], resampling, floor=float(alike["_real"].mean()), ceiling=heard.others
        )
        return found

    return measure


def _ready_to_listen(
    settings: SpeechScoreSettings, folder: Path, data_root: Path, resampling: Resampling
) -> Callable[[], Findings]:
    recogniser, (captions, waves) = Recogniser(), sounds_of(folder)
    said, real = recordings_of(Manifest.load(data_root / settings.clips), len(waves), "speech.clips")

    def measure() -> Findings:
        found = _findings(settings.clips, data_root, captions, None)
        texts = [[recogniser(*wave) for wave in several] for several in (waves, real)]
        _add_errors(found, recogniser, {"": (captions, texts[0]), "_real": (said, texts[1])}, resampling)
        found.left_out["speech/similarity"] = NO_VOICE
        return found

    return measure


def _add_errors(
    found: Findings,
    recogniser: Recogniser,
    texts: Mapping[str, tuple[Sequence[str], Sequence[str]]],
    resampling: Resampling,
) -> None:
    """Adds error rates of words and characters; `texts`: captions and what was heard, of what is evaluated and of recordings (`_real`)."""
    for name, of in (("speech/wer", word_error_rate), ("speech/cer", character_error_rate)):
        rates = {kind: _rates(*pair, of) for kind, pair in texts.items()}
        figure_of_rows(found, name, rates[""], resampling, floor=float(rates["_real"].mean()), ceiling=1.0)
    found.features["recogniser"] = {"name": recogniser.name, "fingerprint": recogniser.name}


def _rates(captions: Sequence[str], texts: Sequence[str], of: Callable[..., Errors] = word_error_rate) -> Tensor:
    """Errors of each sentence over the mean length of all: their mean is the error rate of the set."""
    errors = [of([caption], [text]) for caption, text in zip(captions, texts, strict=True)]
    length = sum(one.length for one in errors) / len(errors)
    return torch.tensor([(one.substitutions + one.deletions + one.insertions) / length for one in errors])


def ready_for_music(
    settings: MusicScoreSettings, target: Trained | Path, data_root: Path, resampling: Resampling
) -> Callable[[], Findings]:
    """Finds captions, and returns what plays and measures: keys, tempos and instruments, beside those of the recordings and of other
    captions.

    Raises:
        UserError: no such recordings, or the run plays no captions; of a folder see `sounds_of`.
    """
    said, real = recordings(Manifest.load(data_root / settings.clips), settings.samples)
    if isinstance(target, Path):
        captions, waves = sounds_of(target)
        check_said(captions, str(target))
        rates = {rate for _, rate in waves}

        def play() -> Waves:
            return waves
    else:
        trained, captions = target, said
        trained.require_decoder()
        request_of(trained.recipe, trained.objective, guidance=settings.guidance)
        trained.conditions(captions[:1])
        rates = {trained.speaking.codec.sample_rate_hz}

        def play() -> Waves:
            return played(trained, captions, settings)

    timbres = known_timbres(data_root, settings, rates)

    def measure() -> Findings:
        found = _findings(settings.clips, data_root, captions, None if isinstance(target, Path) else settings.seed)
        of_real = answers_of(said, real, timbres)
        for name, table in answers_of(captions, play(), timbres).items():
            rows = _numbers(own_of(table))
            figure_of_rows(
                found,
                f"music/{name}",
                rows,
                resampling,
                floor=share(own_of(of_real[name])),
                ceiling=share(others_of(table)),
            )
        return found

    return measure


def _numbers(answers: Iterable[bool | None]) -> Tensor:
    return torch.tensor([math.nan if one is None else float(one) for one in answers])


def _findings(clips: str, data_root: Path, captions: Sequence[str], seed: int | None) -> Findings:
    """`seed`: of the noise; None: not known, so that nothing is paired."""
    prompts = xxhash.xxh3_128_hexdigest(canonical_json(list(captions)))
    found = Findings(prompts=prompts, paired=None if seed is None else f"{prompts} {seed}")
    manifest = Manifest.load(data_root / clips)
    found.references[clips] = {"fingerprint": manifest.hash, "samples": manifest.samples}
    return found
