"""Text to phonemes: espeak-ng's rules through the package phonemizer, and a fixed table of IPA symbols.

This is the one door to phonemizer. The espeak-ng that it drives comes with the package espeakng-loader, library and dictionaries,
so nothing is installed on the system and what it says does not depend on the machine. Both packages are GPL-3 and optional
(`nexus-scale[speech]`): nothing of them is part of this one.
"""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import xxhash

from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError
from nexus_scale.processes.phones import BEGIN, END, MARKS, PAD, TABLE, UNKNOWN

__all__ = ["BEGIN", "END", "PAD", "TABLE", "UNKNOWN", "Phonemizer"]

log = logging.getLogger(__name__)

_SAME = str.maketrans(
    {
        **dict.fromkeys("‘’ʼ`´", "'"),
        **dict.fromkeys("“”„«»‹›", '"'),
        **dict.fromkeys("–―‒", "—"),
        **dict.fromkeys("[{", "("),
        **dict.fromkeys("]}", ")"),
        "…": "...",
    }
)
"""Signs that are written in several ways, to the one of the table."""

_LATIN = (
    "af",
    "cs",
    "da",
    "de",
    "en",
    "es",
    "et",
    "fi",
    "fr",
    "hu",
    "id",
    "it",
    "nl",
    "nb",
    "pl",
    "pt",
    "ro",
    "sv",
    "tr",
)
_SCRIPTS = {**dict.fromkeys(_LATIN, "LATIN"), **dict.fromkeys(("bg", "ru", "uk"), "CYRILLIC"), "el": "GREEK"}
"""In which letters a language is written. A voice spells others out (`Chinese letter`), which nobody has said."""


class Phonemizer:
    """Text to ids of TABLE, with BEGIN before and END behind.

    Args:
        language: espeak-ng's name of it, such as `en-us`, `en-gb`, `de`.
    Attributes:
        table: symbols by id.
        num_symbols: how many, for the size of an embedding.
        fingerprint: hash of the table, the language and the version of espeak-ng, whose rules decide what is said.
    """

    def __init__(self, language: str = "en-us"):
        self.language = language
        self.table, self.num_symbols = TABLE, len(TABLE)
        self._ids = {symbol: number for number, symbol in enumerate(TABLE)}
        self._backend, self.version = _espeak(language)
        self._script = _SCRIPTS.get(language.split("-")[0])

    @cached_property
    def fingerprint(self) -> str:
        said = [self.table, self.language, "espeak-ng", self.version, "with stress and punctuation"]
        return xxhash.xxh3_128_hexdigest(json.dumps(said, ensure_ascii=False).encode())

    def __call__(self, text: str) -> list[int]:
        """Ids of a text's phonemes, between BEGIN and END.

        Raises:
            UserError: nothing in it can be said, or it has letters of another script; names the text.
        """
        return [BEGIN, *(self._ids.get(symbol, UNKNOWN) for symbol in self.ipa(text)), END]

    def ipa(self, text: str) -> str:
        """A text's phonemes with stress and punctuation, words apart: `ðə bˈɜːtʃ kənˈuː`.

        Raises:
            UserError: as `__call__`.
        """
        plain = " ".join(unicodedata.normalize("NFC", text).translate(_SAME).split())
        self._refuse(text, plain)
        spoken = self._backend.phonemize([plain], strip=True)
        ipa = " ".join(spoken[0].replace("-", "").split()) if spoken else ""  # espeak-ng joins some words by a hyphen
        if not any(unicodedata.category(symbol).startswith("L") for symbol in ipa):
            raise UserError(f"phonemes: nothing in {_shown(text)} can be said; expected words of {self.language}", 3)
        return ipa

    def symbols(self, ids: Iterable[int]) -> str:
        """The IPA of ids; padding, BEGIN and END leave nothing."""
        return "".join(
            self.table[number] if number > UNKNOWN else "?" for number in ids if number not in (PAD, BEGIN, END)
        )

    def _refuse(self, text: str, plain: str) -> None:
        if not plain:
            raise UserError("phonemes: got an empty text, expected words", 3)
        if control := sorted({c for c in plain if unicodedata.category(c) in ("Cc", "Cs", "Co", "Cn")}):
            raise UserError(f"phonemes: {_shown(text)} has characters {control} that no voice reads; remove them", 3)
        foreign = [c for c in plain if c.isalpha() and self._script and self._script not in unicodedata.name(c, "")]
        if foreign:
            raise UserError(
                f"phonemes: {_shown(text)} has letters {''.join(dict.fromkeys(foreign))!r}, and {self.language} is written in "
                f"{self._script.capitalize() if self._script else ''} ones; write it in those, or choose the language of the text",
                3,
            )


def _shown(text: str, longest: int = 80) -> str:
    return repr(text if len(text) <= longest else text[: longest - 3] + "...")


def _espeak(language: str) -> tuple[Any, str]:
    """phonemizer's backend for a language, on the espeak-ng of espeakng-loader, and that one's version."""
    try:
        import espeakng_loader
        from phonemizer.backend import EspeakBackend
        from phonemizer.backend.espeak.wrapper import EspeakWrapper
    except ImportError as error:
        raise UserError(f"phonemes need {error.name}; pip install 'nexus-scale[speech]'") from None
    EspeakWrapper.set_library(espeakng_loader.get_library_path())
    EspeakWrapper.set_data_path(espeakng_loader.get_data_path())
    known: list[str] = list(EspeakBackend.supported_languages())
    if language not in known:
        raise UserError(f"phonemes: espeak-ng has no language {language!r}; {nearest(language, known)}")
    quiet = logging.getLogger(f"{__name__}.phonemizer")
    quiet.setLevel(logging.ERROR)  # it warns of every foreign word that it reads by its own rules
    backend = EspeakBackend(
        language,
        punctuation_marks=MARKS.replace(" ", ""),
        preserve_punctuation=True,
        with_stress=True,
        language_switch="remove-flags",
        logger=quiet,
    )
    return backend, ".".join(str(part) for part in backend.version())
