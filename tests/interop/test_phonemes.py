"""Phonemes: what espeak-ng says, one id a symbol, the same on every machine; and what it is not asked to say."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("phonemizer")
pytest.importorskip("espeakng_loader")

from nexus_scale.contracts import UserError
from nexus_scale.interop import phonemes
from nexus_scale.interop.phonemes import BEGIN, END, PAD, TABLE, UNKNOWN, Phonemizer


@pytest.fixture(scope="module")
def english() -> Phonemizer:
    return Phonemizer()


def test_words_stress_and_pauses(english: Phonemizer) -> None:
    assert english.ipa("The birch canoe, slid!") == "ðə bˈɜːtʃ kənˈuː, slˈɪd!"
    assert english.ipa("  “Isn’t\n it…” ") == english.ipa('"Isn\'t it..."'), "signs that are written in several ways"
    assert english.ipa("It costs 21 p.") == english.ipa("it costs twenty one p.")


def test_ids_are_those_of_the_table_between_begin_and_end(english: Phonemizer) -> None:
    text = "Glue the sheet to the dark blue background."
    ids = english(text)
    assert ids[0] == BEGIN and ids[-1] == END and not {PAD, BEGIN, END, UNKNOWN} & set(ids[1:-1])
    assert english.symbols([*ids, PAD, PAD]) == english.ipa(text)
    assert english.num_symbols == len(TABLE) == len(set(TABLE)) and max(ids) < english.num_symbols
    assert all(len(symbol) == 1 for symbol in TABLE[4:])


def test_the_table_has_all_that_the_voices_say() -> None:
    """Languages with sounds, stress and length of their own; none needs UNKNOWN."""
    for language, text in {
        "en-gb": "The quick brown fox jumps over the lazy dog, measure the azure chair.",
        "de": "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
        "fr-fr": "Portez ce vieux whisky au juge blond qui fume, un bon vin blanc.",
        "es": "El veloz murciélago hindú comía feliz cardillo y kiwi.",
        "ru": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
        "it": "Ma la volpe col suo balzo ha raggiunto il quieto Fido.",
    }.items():
        assert UNKNOWN not in Phonemizer(language)(text), language


def test_the_table_is_fixed(english: Phonemizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data name it by its hash: whoever changes it makes all data again, and changes this line."""
    assert english.version == "1.52.0", "espeak-ng's rules changed: so does the hash below"
    assert english.fingerprint == FINGERPRINT
    assert Phonemizer("en-gb").fingerprint != FINGERPRINT
    again = Phonemizer()
    again.table = (*TABLE, "new")
    assert again.fingerprint != FINGERPRINT


FINGERPRINT = "b6819960fa46579ff0879cae2a1d3821"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "got an empty text"),
        (" \n ", "got an empty text"),
        ("?!", r"nothing in '\?!' can be said"),
        ("say 日本 twice", r"'say 日本 twice' has letters '日本', and en-us is written in Latin ones"),
        ("a\0b", r"'a\\x00b' has characters \['\\x00'\] that no voice reads"),
        ("привет " * 40, r"\.\.\.' has letters"),
    ],
)
def test_text_that_cannot_be_read_is_named(english: Phonemizer, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        english(text)


def test_a_language_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match=r"no language 'en-uk'; did you mean 'en-us' or 'en-gb'"):
        Phonemizer("en-uk")


def test_without_its_packages_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"espeakng_loader; pip install 'nexus-scale\[speech\]'"):
        Phonemizer()


def test_nothing_of_the_system_is_used(english: Phonemizer, tmp_path: Any) -> None:
    """Another process, without a PATH, a home and a voice of its own, says the same."""
    script = "from nexus_scale.interop.phonemes import Phonemizer; import sys; sys.stdout.write(Phonemizer().ipa('The birch canoe.'))"
    root = str(phonemes.__file__).rsplit("/nexus_scale/", 1)[0]
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={"PYTHONPATH": root, "PYTHONUTF8": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == english.ipa("The birch canoe."), done.stderr
