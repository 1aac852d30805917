"""Text as it is spoken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from nexus_scale.contracts import CondField, Conditioner
from nexus_scale.interop.phonemes import Phonemizer

PHONEMES = "phonemes"


class Speaks(Protocol):
    """What turns a text into ids of its table, between begin and end: `interop.phonemes.Phonemizer`, or a stand-in."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def table(self) -> tuple[str, ...]: ...

    def __call__(self, text: str) -> list[int]: ...


class PhonemeConditioner(Conditioner):
    """Texts -> `phonemes` (L,), ids of the phonemizer's table between its begin and end."""

    reads = "text"

    def __init__(self, phonemizer: Speaks):
        self.phonemizer, self.fingerprint = phonemizer, phonemizer.fingerprint
        self.fields = {PHONEMES: CondField((None,), "int16")}

    @classmethod
    def open(cls, language: str = "en-us") -> PhonemeConditioner:
        """Of texts in this language, by espeak-ng's name; raises a UserError where there is none of it."""
        return cls(Phonemizer(language))

    def encode(self, values: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        """The ids of each text; raises a UserError that names a text of which nothing can be said."""
        return [{PHONEMES: np.array(self.phonemizer(text), np.int16)} for text in values]
