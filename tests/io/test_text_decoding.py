"""Text of captions, labels and JSON is decoded in one place: marks go, lines stay whole, and nothing in it ends a job."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest

from data_pipelines.text_decoding import caption_of, check_encoding, json_object, json_of, label_of, plain
from nexus_scale.config.recipe import prompts_of
from nexus_scale.contracts import UserError
from nexus_scale.io.plain_text import TextError, clean_text, decode_text, lines_of


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-8"])
def test_marks_say_the_encoding_and_go(encoding: str) -> None:
    assert decode_text("ein Café\n".encode(encoding)) == "ein Café\n"
    assert clean_text(decode_text(codecs.BOM_UTF16_BE + "añ".encode("utf-16-be"))) == "añ"


def test_other_encodings_are_named_and_not_guessed() -> None:
    with pytest.raises(TextError, match="not utf-8"):
        decode_text("Café".encode("cp1252"))
    assert decode_text("Café".encode("cp1252"), "cp1252") == "Café"
    with pytest.raises(TextError, match="UTF-16 without a byte order mark"):
        decode_text("hi".encode("utf-16-le"))
    check_encoding("shift_jis", "x")
    for name in ("klingon", "base64", "a\0b", "idna\ud800"):
        with pytest.raises(UserError, match="expected one such as utf-8"):
            check_encoding(name, "x")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\ufeffa cat\n", "a cat"),
        ("a\u2028b\x85c\x0bd\x1ce", "a b c d e"),
        ("half \ud83d an emoji", "half \ufffd an emoji"),
        ("\x07bell\x1b[0m", "bell[0m"),
        ("\u200b\ufeff \u00a0", ""),
        ("family \N{MAN}\u200d\N{GIRL}", "family \N{MAN}\u200d\N{GIRL}"),
    ],
)
def test_captions_are_words_that_can_be_seen(text: str, words: str) -> None:
    assert clean_text(text) == words
    clean_text(text).encode()


def test_captions_that_are_no_text() -> None:
    assert caption_of(None) == caption_of(float("nan")) == caption_of(" \n") == ""
    assert caption_of(b"\xef\xbb\xbfbytes") == "bytes"
    assert caption_of(7) == "7"
    for value in (["a"], {"a": 1}, True, "a\0b", b"\xff"):
        with pytest.raises(TextError):
            caption_of(value)


def test_only_line_feeds_and_returns_end_a_line() -> None:
    assert [line for _, line in lines_of("a\u2028b\nc\x0bd\r\ne\x85f\rg")] == [
        "a\u2028b\n",
        "c\x0bd\r\n",
        "e\x85f\r",
        "g",
    ]


def test_prompts_of_a_file_are_read_as_captions_are(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffa  cat\u2028asleep\r\n\n\u200b\na dog\r".encode("utf-16"))
    assert prompts_of(file) == ["a cat asleep", "a dog"]
    file.write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match="save it as UTF-8"):
        prompts_of(file)


def test_json_that_cannot_be_written_again_is_made_plain() -> None:
    found = plain(json_object(b'{"a": NaN, "b": [Infinity, 1.5, 1e999], "c": "\\ud800", "d\\udfff": 1}'))
    assert found == {"a": None, "b": [None, 1.5, None], "c": "\ufffd", "d\ufffd": 1}
    json.dumps(found, allow_nan=False).encode()
    for damaged in (b"[" * 100_000, b'{"a":' * 5000 + b"1" + b"}" * 5000, b"{", b"9" * 5000, b"\xff"):
        with pytest.raises(TextError):
            json_of(damaged)
    with pytest.raises(TextError, match="expected a JSON object, got list"):
        json_object(b"[]")


def test_labels_are_whole_numbers_or_names() -> None:
    assert [label_of(value) for value in (3, "3", "-3", " 7 ", 3.0, "cat", "--5", "²", "٣", None, "", float("nan"), 3.5, [1])] == [
        3, 3, None, 7, 3, "cat", "--5", "²", "٣", None, None, None, None, None,
    ]  # fmt: skip
    for value in (2**64, "9" * 19, 1e30):
        with pytest.raises(TextError):
            label_of(value)
