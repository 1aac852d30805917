"""The `speech:` and `music:` sections of a suite: as `nexus score` measures them, with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import xxhash
from torch import Tensor

from nexus_scale.data.manifest import Manifest, canonical_json
from nexus_scale.evaluate.findings import Findings, figure_of_rows
from nexus_scale.evaluate.music import MusicScoreSettings, answers_of, others_of, own_of, played, recordings, share
from nexus_scale.evaluate.speech import Speech, SpeechScoreSettings
from nexus_scale.generate.drawing import request_of
from nexus_scale.generate.trained import Trained
from nexus_scale.metrics.statistics import Resampling
from nexus_scale.metrics.wer import Errors, character_error_rate, word_error_rate


def ready_for_speech(settings: SpeechScoreSettings, trained: Trained, resampling: Resampling) -> Callable[[], Findings]:
    """Finds sentences and listeners, and returns what speaks and measures.

    The floor of each figure is that of the recordings; the ceiling of similarity that of other speakers' recordings. `speech/wer` and
    `speech/cer` are the error rates, in words and in characters, of all sentences together.

    Raises:
        UserError: see `Speech.ready`.
    """
    speech = Speech.ready(trained.place, settings, trained)

    def measure() -> Findings:
        heard = speech.heard()
        found = _findings(settings.clips, trained, speech.captions, settings.seed)
        rates = {kind: _rates(speech.captions, texts) for kind, texts in heard.texts.items()}
        figure_of_rows(found, "speech/wer", rates[""], resampling, floor=float(rates["_real"].mean()), ceiling=1.0)
        characters = {kind: _rates(speech.captions, heard.texts[kind], character_error_rate) for kind in ("", "_real")}
        figure_of_rows(
            found, "speech/cer", characters[""], resampling, floor=float(characters["_real"].mean()), ceiling=1.0
        )
        alike = heard.similarities
        figure_of_rows(
            found, "speech/similarity", alike[""], resampling, floor=float(alike["_real"].mean()), ceiling=heard.others
        )
        found.features["recogniser"] = {"name": speech.recogniser.name, "fingerprint": speech.recogniser.name}
        return found

    return measure


def _rates(captions: Sequence[str], texts: Sequence[str], of: Callable[..., Errors] = word_error_rate) -> Tensor:
    """Errors of each sentence over the mean length of all: their mean is the error rate of the set."""
    errors = [of([caption], [text]) for caption, text in zip(captions, texts, strict=True)]
    length = sum(one.length for one in errors) / len(errors)
    return torch.tensor([(one.substitutions + one.deletions + one.insertions) / length for one in errors])


def ready_for_music(settings: MusicScoreSettings, trained: Trained, resampling: Resampling) -> Callable[[], Findings]:
    """Finds captions, and returns what plays and measures: keys and tempos, beside those of the recordings and of other captions.

    Raises:
        UserError: no such recordings, or the run plays no captions.
    """
    captions, real = recordings(Manifest.load(trained.place.data_root / settings.clips), settings.samples)
    trained.require_decoder()
    request_of(trained.recipe, trained.objective, guidance=settings.guidance)
    trained.conditions(captions[:1])

    def measure() -> Findings:
        found = _findings(settings.clips, trained, captions, settings.seed)
        of_real = answers_of(captions, real)
        for name, table in answers_of(captions, played(trained, captions, settings)).items():
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


def _findings(clips: str, trained: Trained, captions: Sequence[str], seed: int) -> Findings:
    prompts = xxhash.xxh3_128_hexdigest(canonical_json(list(captions)))
    found = Findings(prompts=prompts, paired=f"{prompts} {seed}")
    manifest = Manifest.load(trained.place.data_root / clips)
    found.references[clips] = {"fingerprint": manifest.hash, "samples": manifest.samples}
    return found
