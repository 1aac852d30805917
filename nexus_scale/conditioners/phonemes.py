"""Text as it is spoken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nexus_scale.contracts import CondField, Conditioner
from nexus_scale.interop.phonemes import Phonemizer

PHONEMES = "phonemes"


class PhonemeConditioner(Conditioner):
    """Texts -> `phonemes` (L,), ids of `interop.phonemes.TABLE` between its begin and end.

    Args:
        language: of the texts, by espeak-ng's name.
    """

    reads = "text"

    def __init__(self, language: str = "en-us"):
        self.phonemizer = Phonemizer(language)
        self.fingerprint = self.phonemizer.fingerprint
        self.fields = {PHONEMES: CondField((None,), "int16")}

    def encode(self, values: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        """The ids of each text; raises a UserError that names a text of which nothing can be said."""
        return [{PHONEMES: np.array(self.phonemizer(text), np.int16)} for text in values]
