"""Speech from raw to what trains: sentences, voices, a user's recordings by stated rules, segments, phonemes and codes; whole or not
at all, the same bits however often it was broken off."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

av = pytest.importorskip("av")
pytest.importorskip("phonemizer")

from data_pipelines import (
    cut_segments,
    ingest_speech,
    load_job,
    precompute_codes,
    precompute_phonemes,
    synthesise_speech,
)
from data_pipelines.decoding_process import MISSING
from data_pipelines.ingest_speech import NO_TIMES
from data_pipelines.sentences import GRAMMAR, MOST, make_sentences
from data_pipelines.sound_decoding import (
    BEYOND,
    CLIPPED,
    CUT,
    NO_SOUND,
    SILENT,
    TOO_LONG,
    TOO_SHORT,
    UNREADABLE,
    SoundRules,
    clip_of,
    recording_of,
)  # fmt: skip
from data_pipelines.synthesise_speech import VOICES
from nexus_scale.contracts import UserError
from nexus_scale.data.buckets import LengthBucket
from nexus_scale.data.loader import Dataset, Source
from nexus_scale.data.manifest import DataError, Manifest
from nexus_scale.data.shards import decode, read_samples
from nexus_scale.data.sounds import decode_wav, encode_wav
from nexus_scale.interop import encoders
from nexus_scale.interop.phonemes import Phonemizer

REPO = Path(__file__).parents[2]
RATE = 16000
RULES = SoundRules(RATE)


def tone(seconds: float, loudness: float = 0.3, rate: int = RATE, hz: float = 440.0) -> np.ndarray:
    """(T,) float32."""
    return (loudness * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def quiet(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


def encoded(wave: np.ndarray, extension: str, rate: int = RATE, layout: str = "mono") -> bytes:
    """A wave (T,), or (T, 2), by FFmpeg's encoders."""
    codec, form = {
        "wav": ("pcm_s16le", "s16"),
        "flac": ("flac", "s16"),
        "mp3": ("libmp3lame", "s16p"),
        "ogg": ("libopus", "s16"),
    }[extension]
    buffer = io.BytesIO()
    pcm = np.clip(np.rint(np.atleast_2d(wave.T) * 32767), -32768, 32767).astype(np.int16)
    with av.open(buffer, "w", format=extension) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm.T.reshape(1, -1)), format="s16", layout=layout)
        frame.sample_rate = rate
        for part in av.AudioResampler(form, layout, stream.rate).resample(frame):
            for packet in stream.encode(part):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ------------------------------------------------------------------------------------------------- sentences


def test_sentences_are_different_plain_and_the_same_everywhere() -> None:
    made = make_sentences(1500)
    assert len(set(made)) == 1500 and make_sentences(20) == made[:20] and make_sentences(20, seed=1) != made[:20]
    assert hashlib.sha256("\n".join(made).encode()).hexdigest()[:16] == SENTENCES
    assert all(re.fullmatch(r"[A-Z][A-Za-z ,]+[.?]", line) and 5 <= len(line.split()) <= 15 for line in made)
    assert not [line for line in made if re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]|\b(\w{4,}) \1\b", line)]
    starts = {pattern.split("{")[0] for pattern in GRAMMAR if not pattern.startswith("{")}
    assert all(any(line.startswith(start.rstrip(" a")) for line in made) for start in starts), "all patterns come"
    for count in (0, MOST + 1):
        with pytest.raises(UserError, match="expected 1 to 10000"):
            make_sentences(count)


SENTENCES = "b7835017895238eb"


# ------------------------------------------------------------------------------------------------- voices


def fake_engines(folder: Path, monkeypatch: pytest.MonkeyPatch, log: Path | None = None) -> None:
    """The engines of `write_engines` on a PATH of their own."""
    write_engines(folder, log)
    monkeypatch.setenv("PATH", str(folder))


def write_engines(folder: Path, log: Path | None = None) -> None:
    """flite and espeak-ng of ours: a tone whose pitch is that of the voice and whose length is that of the text."""
    folder.mkdir()
    script = f"""#!{sys.executable}
import sys, wave, struct, math
arguments = sys.argv[1:]
if arguments[0] in ("-lv", "--version"):
    print("Voices available: kal awb_time kal16 awb rms slt" if arguments[0] == "-lv" else "version: of a test"); sys.exit()
option = lambda name: arguments[arguments.index(name) + 1]
voice = option("-voice") if "-voice" in arguments else option("-v")
text, output = open(option("-f")).read().strip(), option("-o" if "-o" in arguments else "-w")
{f"open({str(log)!r}, 'a').write(voice + ' ' + text + chr(10))" if log else ""}
if "unreadable" in text:
    sys.exit("cannot")
count, hz = 200 * len(text), 100 + 40 * len(voice)
values = [int(9000 * math.sin(2 * math.pi * hz * i / 16000)) for i in range(count)]
with wave.open(output, "wb") as file:
    file.setparams((1, 2, 16000, 0, "NONE", "")); file.writeframes(struct.pack("<%dh" % count, *values))
"""
    for name in ("flite", "espeak-ng"):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)


def synthesise(root: Path, output: str = "voices", **changes: Any) -> list[dict[str, str]]:
    options = {
        "output": output,
        "sentences": 10,
        "readings": 2,
        "workers": 0,
        "data_root": root,
        "runs_root": root,
        **changes,
    }
    load_job("synthesise_speech").run(**options)
    assert load_job("synthesise_speech").done(**options)
    with (root / output / synthesise_speech.TABLE).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_each_sentence_is_read_by_different_voices_that_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_engines(tmp_path / "bin", monkeypatch)
    rows = synthesise(tmp_path)
    assert len(rows) == 20
    readers: dict[str, list[str]] = {}
    for row in rows:
        readers.setdefault(row["caption"], []).append(row["speaker"])
        sound = decode_wav((tmp_path / "voices" / row["path"]).read_bytes())
        assert sound.wave.shape == (1, 200 * len(row["caption"]))
    assert list(readers) == make_sentences(10) and all(len(set(two)) == 2 for two in readers.values())
    said = [row["speaker"] for row in rows]
    assert {name: said.count(name) for name in set(said)} == dict.fromkeys(["slt", "rms", "awb", "kal", "espeak"], 4)
    four = synthesise(tmp_path, "four", voices=["slt", "rms", "awb", "kal"], sentences=8)
    pairs = {(a["speaker"], b["speaker"]) for a, b in zip(four[::2], four[1::2], strict=True)}
    assert len(pairs) == 4, "and not always the same two, where the readings divide the voices"


def test_readings_that_are_there_are_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "said"
    fake_engines(tmp_path / "bin", monkeypatch, log)
    synthesise(tmp_path)
    first, whole = log.read_text().count("\n"), contents(tmp_path / "voices")
    synthesise(tmp_path)
    assert log.read_text().count("\n") == first, "no engine is asked"
    lost = next((tmp_path / "voices/wav/slt").iterdir())
    lost.unlink()
    synthesise(tmp_path)
    greetings = 5  # each voice says something before the work begins
    assert log.read_text().count("\n") == first + greetings + 1 and contents(tmp_path / "voices") == whole
    rows = synthesise(tmp_path, sentences=12)
    assert len(rows) == 24 and log.read_text().count("\n") == first + 2 * greetings + 1 + 4, (
        "the first of more are those of fewer"
    )


def test_a_text_of_ones_own_is_read_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_engines(tmp_path / "bin", monkeypatch)
    (tmp_path / "text.txt").write_text("One line.\n\n  Another   line. \nOne line.\n-v is no option\n")
    rows = synthesise(tmp_path, text="text.txt", readings=1, voices=["slt"], sentences=99)
    assert [row["caption"] for row in rows] == ["One line.", "Another line.", "-v is no option"]
    (tmp_path / "text.txt").write_text("good\nunreadable\n")
    with pytest.raises(UserError, match=r"flite \(slt\) could not read 'unreadable': cannot"):
        synthesise(tmp_path, text="text.txt", readings=1, voices=["slt"])
    lines = ["good", "unreadable", "x" * 401, "good", "also good", "too many"]
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    rows = synthesise(tmp_path, text="text.txt", readings=1, voices=["slt"], sentences=3, max_bad=0.5)
    assert [row["caption"] for row in rows] == ["good", "also good"]
    report = json.loads((tmp_path / "voices" / synthesise_speech.REPORT).read_text())
    assert (report["read"], report["used"]) == (6, 2)
    assert {item["place"]: item["reason"] for item in report["items"]} == {
        "text.txt:2": synthesise_speech.UNREAD, "text.txt:3": synthesise_speech.TOO_LONG,
        "text.txt:4": synthesise_speech.REPEATED, "text.txt:6": synthesise_speech.BEYOND,
    }  # fmt: skip
    for said, text in {"no line of text": "\n \n", "a line of 401": "x" * 401}.items():
        (tmp_path / "text.txt").write_text(text)
        with pytest.raises(UserError, match=said):
            synthesise(tmp_path, text="text.txt")


def test_engines_and_voices_that_are_not_there_are_named_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match=r"not installed: flite, espeak-ng; apt install flite espeak-ng") as caught:
        synthesise(tmp_path)
    assert caught.value.code == 4
    with pytest.raises(UserError, match="apt install festival festvox-us-slt-hts"):
        synthesise(tmp_path, voices=["slt_hts"], readings=1)
    fake_engines(tmp_path / "bin", monkeypatch)
    flite = tmp_path / "bin/flite"
    flite.write_text(flite.read_text().replace("awb rms slt", "awb rms"))
    with pytest.raises(UserError, match=r"voice slt does not speak; apt install flite: this flite has no slt"):
        synthesise(tmp_path)
    with pytest.raises(UserError, match=r"no voice 'stl'; did you mean 'slt'"):
        synthesise(tmp_path, voices=["stl"])
    for changes in ({"voices": ["slt", "slt"]}, {"voices": []}, {"readings": 6}, {"readings": 0}):
        with pytest.raises(UserError, match="expected different voices"):
            synthesise(tmp_path, **changes)
    assert not (tmp_path / "voices").exists()


@pytest.mark.skipif(not os.path.exists("/usr/bin/flite"), reason="flite is not installed: apt install flite")
def test_a_real_engine_reads_the_same_to_the_bit() -> None:
    first = synthesise_speech.read_aloud(VOICES["slt"], "It was a cloudy day in July.")
    assert first == synthesise_speech.read_aloud(VOICES["slt"], "It was a cloudy day in July.")
    sound = decode_wav(first)
    assert sound.sample_rate_hz == RATE and 1.5 < sound.wave.shape[1] / RATE < 3


# ------------------------------------------------------------------------------------------------- rules of clips


@pytest.mark.parametrize("extension", ["wav", "flac", "mp3", "ogg"])
@pytest.mark.parametrize(("rate", "layout"), [(48000, "stereo"), (48000, "mono")])
def test_files_of_all_kinds_are_mixed_and_resampled(extension: str, rate: int, layout: str) -> None:
    wave = tone(1.5, rate=rate)
    data = encoded(np.stack([wave, wave], 1) if layout == "stereo" else wave, extension, rate, layout)
    found, why = recording_of(data, RULES)
    assert found is not None and not why and found.dtype == np.float32
    assert abs(len(found) - 1.5 * RATE) < 0.1 * RATE
    middle = found[RATE // 4 : RATE]
    power = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    assert abs(float(power.argmax()) * RATE / len(middle) - 440) < 3
    assert abs(float(np.sqrt((middle**2).mean())) - 0.3 / np.sqrt(2)) < 0.02


@pytest.mark.parametrize("extension", ["wav", "flac", "mp3", "ogg"])
def test_broken_files_are_dropped_and_never_raise(extension: str) -> None:
    data = encoded(tone(1.0, rate=48000), extension, 48000)
    for broken in (b"", b"no sound", data[:20], bytes(len(data))):
        found, why = recording_of(broken, RULES)
        assert found is None and why in (CUT, UNREADABLE, NO_SOUND)


def test_silence_around_speech_is_cut_and_loudness_made_one() -> None:
    clip, why = clip_of(np.concatenate([quiet(0.7), tone(1.5, 0.01), quiet(0.2), tone(0.5, 0.01), quiet(2.0)]), RULES)
    assert clip is not None and not why
    assert clip.start_seconds == pytest.approx(0.6) and clip.wave.shape == (1, round(2.4 * RATE))
    speech = clip.wave[0, round(0.1 * RATE) : round(1.6 * RATE)]
    assert 20 * np.log10(np.sqrt((speech**2).mean())) == pytest.approx(-23.0, abs=0.1)
    spiky = np.concatenate([tone(1.5, 0.01), np.full(3, 0.5, np.float32), tone(1.5, 0.01)])
    held, _ = clip_of(spiky, RULES)
    assert held is not None and np.abs(held.wave).max() == pytest.approx(0.98, abs=1e-3), "as near as its peaks allow"


def test_each_rule_drops_what_it_names() -> None:
    square = np.sign(tone(1.5)).astype(np.float32)
    assert clip_of(square, RULES) == (None, CLIPPED)
    assert clip_of(tone(1.5, 1.1).clip(-0.99, 0.99), RULES) == (None, CLIPPED)
    assert clip_of(tone(1.5, 0.999), RULES)[1] == "", "loud, and not clipped: no three samples at its peak"
    assert clip_of(square * 0.5, RULES)[1] == "", "far from full scale it is a sound like others"
    assert clip_of(quiet(1.5), RULES) == (None, SILENT)
    assert clip_of(tone(1.5, 0.001), RULES) == (None, SILENT)
    assert clip_of(np.concatenate([quiet(1.0), tone(0.5), quiet(1.0)]), RULES) == (None, TOO_SHORT)
    assert clip_of(tone(21.0), RULES) == (None, TOO_LONG)
    assert clip_of(tone(0.004), RULES)[1] == SILENT, "shorter than a frame"
    for part in ((1.0, 3.0), (2.0, 1.0), (-1.0, 1.0), (5.0, 6.0)):
        assert clip_of(tone(2.0), RULES, *part) == (None, BEYOND)
    part, _ = clip_of(np.concatenate([tone(2.0, hz=300), tone(2.0, hz=600)]), RULES, 2.0, 4.0)
    assert part is not None and part.start_seconds == 2.0
    assert abs(np.abs(np.fft.rfft(part.wave[0])).argmax() * RATE / part.wave.shape[1] - 600) < 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sample_rate_hz", 100),
        ("min_seconds", 0.0),
        ("max_seconds", 0.5),
        ("silence_db", 3.0),
        ("loudness_db", 0.0),
        ("max_clipped", 2.0),
    ],
)
def test_rules_that_make_no_sense_are_refused(name: str, value: float) -> None:
    with pytest.raises(UserError, match="expected"):
        SoundRules(**{"sample_rate_hz": RATE, name: value})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- a user's recordings

TEXTS = [
    f"The {colour} {thing} was {there}."
    for colour in ("red", "blue", "old")
    for thing in ("door", "lamp", "book")
    for there in ("here", "gone")
]


def recordings(root: Path) -> Path:
    """18 texts, each read by two speakers, as wav and flac; and seven rows that are dropped."""
    folder = root / "takes"
    folder.mkdir(parents=True)
    rows = []
    for number, text in enumerate(TEXTS):
        for speaker, hz in (("ann", 300.0), ("bob", 150.0)):
            extension = ("wav", "flac")[number % 2]
            name = f"{speaker}-{number:02d}.{extension}"
            wave = np.concatenate([quiet(0.3), tone(1.2 + 0.05 * number, hz=hz)])
            (folder / name).write_bytes(encoded(wave, extension))
            rows.append({"path": f"takes/{name}", "caption": text, "speaker": speaker, "start": "", "end": ""})
    long = np.concatenate([tone(2.0, hz=300), quiet(0.5), tone(2.0, hz=600)])
    for name, data in {
        "broken.wav": b"no sound",
        "silent.wav": encoded(quiet(2.0), "wav"),
        "loud.wav": encoded(np.sign(tone(2.0)).astype(np.float32), "wav"),
        "long.flac": encoded(long, "flac"),
    }.items():
        (folder / name).write_bytes(data)
    for name, text, start, end in (
        ("broken.wav", "never heard", "", ""), ("missing.wav", "never found", "", ""), ("silent.wav", "nothing said", "", ""),
        ("loud.wav", "too loud", "", ""), ("long.flac", "its second half", "2.5", "4.5"), ("long.flac", "beyond", "4", "9"),
        ("long.flac", "at no time", "later", ""), ("long.flac", "日本語", "0", "2"),
    ):  # fmt: skip
        rows.append({"path": f"takes/{name}", "caption": text, "speaker": "ann", "start": start, "end": end})
    with (root / "takes.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root / "takes.csv"


OPTIONS: dict[str, Any] = {
    "source": "takes.csv",
    "sample_rate_hz": RATE,
    "heldout": 0.3,
    "shard_clips": 8,
    "max_bad": 0.2,
}
DROPPED = {
    UNREADABLE: 1, MISSING: 1, SILENT: 1, CLIPPED: 1, BEYOND: 1, ingest_speech.NO_TIMES: 1, ingest_speech.UNSPEAKABLE: 1,
}  # fmt: skip


def ingest(root: Path, output: str = "speech", workers: int | None = 0, **changes: Any) -> dict[str, Any]:
    options = {**OPTIONS, "output": output, "workers": workers, "data_root": root, "runs_root": root, **changes}
    load_job("ingest_speech").run(**options)
    assert load_job("ingest_speech").done(**options)
    report: dict[str, Any] = json.loads((root / output / ingest_speech.REPORT).read_text())
    return report


def samples(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    manifest = Manifest.load(folder)
    heard = {name for name in manifest.fields if name in ("audio", "codes")}
    assert set(manifest.rates) == heard, "sound and codes say how fast they are"
    manifest.verify(deep=True)
    return [
        (key, {name: decode(name, data) for name, data in members.items()})
        for shard in manifest.shards
        for key, members in read_samples(folder / shard.file)
    ]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings, and their clips."""
    root = tmp_path_factory.mktemp("spoken")
    recordings(root)
    ingest(root)
    return root


def test_recordings_become_clips_and_what_is_dropped_is_counted(spoken: Path) -> None:
    report = json.loads((spoken / "speech" / ingest_speech.REPORT).read_text())
    assert (
        (report["read"], report["used"]) == (44, 37)
        and report["dropped"] == DROPPED
        and report["speakers"] == {"ann": 0, "bob": 1}
    )
    texts: dict[str, set[str]] = {}
    for split in ("train", "heldout"):
        manifest = Manifest.load(spoken / "speech" / split / "clips")
        assert manifest.samples == report["clips"][split] > 4
        assert {name: field.extension for name, field in manifest.fields.items()} == {
            "audio": "wav", "caption": "txt", "json": "json", "label": "cls",
        }  # fmt: skip
        for _, members in samples(spoken / "speech" / split / "clips"):
            wave, said = members["wav"], members["json"]
            assert wave.shape[0] == 1 and wave.dtype == np.float32 and said["seconds"] == wave.shape[1] / RATE
            assert said["group"] == ("ann", "bob")[members["cls"]]
            pitch = np.abs(np.fft.rfft(wave[0])).argmax() * RATE / wave.shape[1]
            expected = {"its second half": 600.0}.get(members["txt"], (300.0, 150.0)[members["cls"]])
            assert abs(pitch - expected) < 3, members["txt"]
            texts.setdefault(split, set()).add(members["txt"])
    assert not texts["train"] & texts["heldout"], "a text is in one split, whoever reads it"
    assert texts["train"] | texts["heldout"] == {*TEXTS, "its second half"}


def test_a_folder_of_recordings_with_texts_beside_them(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / "mine" / f"{number}.flac").parent.mkdir(exist_ok=True)
        (tmp_path / "mine" / f"{number}.flac").write_bytes(encoded(tone(1.5 + number / 10), "flac"))
        if number:
            (tmp_path / "mine" / f"{number}.txt").write_text(f"text of number {'abcdef'[number]}\n")
    report = ingest(tmp_path, source="mine", heldout=0.4, max_bad=0.5)
    assert sum(report["clips"].values()) == 5 and sum(report["dropped"].values()) == 1
    manifest = Manifest.load(tmp_path / "speech/train/clips")
    assert "label" not in manifest.fields, "nobody said who speaks"
    for kind in ("jsonl", "parquet"):
        rows = [{"path": f"mine/{n}.flac", "caption": f"text of {n}", "speaker": f"s{n % 2}"} for n in range(1, 6)]
        if kind == "jsonl":
            (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
        report = ingest(tmp_path, kind, source=f"t.{kind}", heldout=0.0)
        assert report["clips"]["train"] == 5 and report["speakers"] == {"s0": 0, "s1": 1}


def test_rows_whose_numbers_are_none_are_dropped_and_counted_with_their_places(tmp_path: Path) -> None:
    import decimal

    import pyarrow
    import pyarrow.parquet

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/a.wav").write_bytes(encoded(np.concatenate([tone(2.0, hz=300), tone(2.0, hz=600)]), "wav"))
    nan, inf = float("nan"), float("inf")
    times = [
        (nan, None),
        (inf, 4.0),
        (0.0, nan),
        ("-inf", None),
        ("1e999", None),
        (10**400, None),
        (True, None),
        ([1], None),
        (0, 0),
    ]
    rows = [{"path": "mine/a.wav", "caption": f"row {n}", "start": a, "end": b} for n, (a, b) in enumerate(times)]
    rows += [{"path": "mine/a.wav", "caption": "odd", "loudness": nan}]
    rows += [
        {"path": "mine/a.wav", "caption": "the second half", "start": "2.0"},
        {"path": "mine/a.wav", "caption": "whole", "end": ""},
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = ingest(tmp_path, source="t.jsonl", heldout=0.0, max_bad=1.0, language=None)
    assert report["dropped"] == {BEYOND: 1, NO_TIMES: 8}
    assert (report["read"], report["used"], len(report["items"])) == (12, 3, 9)
    assert {item["place"] for item in report["items"]} == {f"t.jsonl:{line}" for line in range(1, 10)}
    assert report["speakers"] == {}, "a table without speakers is one of nobody's"
    said = {members["txt"]: members["json"]["start_seconds"] for _, members in samples(tmp_path / "speech/train/clips")}
    assert said == {"the second half": pytest.approx(2.0), "whole": 0.0, "odd": 0.0}
    columns = {"path": ["mine/a.wav"], "caption": ["the second half"], "start": [decimal.Decimal("2.0")]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "t.parquet")
    ingest(tmp_path, "decimals", source="t.parquet", heldout=0.0)
    ((_, members),) = samples(tmp_path / "decimals/train/clips")
    assert members["json"]["start_seconds"] == pytest.approx(2.0), "a time of another type is a time"
    with pytest.raises(UserError, match="no column 'who'"):
        ingest(tmp_path, "x", source={"path": "t.parquet", "label_column": "who"})


def test_a_rerun_redoes_nothing_and_a_broken_off_run_ends_in_the_same_bits(
    spoken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings(tmp_path)
    made: list[str] = []
    real = ingest_speech.make_row

    def failing(row: dict[str, Any]) -> int:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(row["output"])
        return real(row)

    monkeypatch.setattr(ingest_speech, "make_row", failing)
    with pytest.raises(KeyboardInterrupt):
        ingest(tmp_path)
    assert not (tmp_path / "speech" / ingest_speech.REPORT).exists()
    again: list[str] = []
    monkeypatch.setattr(ingest_speech, "make_row", lambda row: (again.append(row["output"]), real(row))[1])
    ingest(tmp_path)
    assert again and not set(again) & set(made), "what was finished is not redone"
    shards = {name: h for name, h in contents(spoken / "speech").items() if name.endswith(".tar")}
    assert shards == {name: h for name, h in contents(tmp_path / "speech").items() if name.endswith(".tar")}
    again.clear()
    ingest(tmp_path)
    assert not again
    (tmp_path / "takes/ann-00.wav").write_bytes(encoded(tone(1.4), "wav"))
    ingest(tmp_path)
    assert len(again) == 1, "one recording changed: its shard is made again"


@pytest.mark.slow
@pytest.mark.ray
def test_ray_data_gives_the_same_bits(spoken: Path) -> None:
    there = ingest(spoken, "there", workers=2)
    here = json.loads((spoken / "speech" / ingest_speech.REPORT).read_text())
    assert here["manifests"] == there["manifests"] and here["dropped"] == there["dropped"]


def test_too_many_broken_recordings_and_rules_that_leave_nothing_end_the_job(spoken: Path) -> None:
    with pytest.raises(UserError, match=r"4 of 44 recordings are broken.*transcripts are read as en-us.*max_bad"):
        ingest(spoken, "x", max_bad=0.05)
    with pytest.raises(UserError, match=r"no clip for training.*too short"):
        ingest(spoken, "x", min_seconds=9.0)
    with pytest.raises(UserError, match=r"no language 'en-uk'"):
        ingest(spoken, "x", language="en-uk")
    report = ingest(spoken, "all", language=None)
    assert ingest_speech.UNSPEAKABLE not in report["dropped"] and sum(report["clips"].values()) == 38
    (spoken / "empty").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=r"no such files .*wav"):
        ingest(spoken, "x", source="empty")
    (spoken / "bare.csv").write_text("path,text\na.wav,hello\n")
    with pytest.raises(UserError, match=r"no column 'caption'"):
        ingest(spoken, "x", source="bare.csv")


# ------------------------------------------------------------------------------------------------- segments and phonemes


def segments(root: Path, output: str = "segments", seconds: float = 0.5, **changes: Any) -> Manifest:
    given = {"input": "speech/train/clips", "segment_seconds": seconds, "workers": 0, "batch": 3, **changes}
    return cut_segments.run(output=output, data_root=root, runs_root=root, **given)


def test_segments_are_cut_from_clips_and_nothing_is_lost(spoken: Path) -> None:
    made = segments(spoken)
    assert made.fields["audio"].shape == (1, RATE // 2) and made.fields["audio"].dtype == "float16"
    parts: dict[str, list[np.ndarray]] = {}
    for key, members in samples(made.folder):
        parts.setdefault(key[:-4], []).append(members["audio.npy"])
    clips = samples(spoken / "speech/train/clips")
    assert set(parts) == {key for key, _ in clips}
    for key, members in clips:
        wave, length = members["wav"].astype(np.float16), RATE // 2
        whole = wave.shape[1] // length
        for number in range(whole):
            assert np.array_equal(parts[key][number], wave[:, number * length : (number + 1) * length])
        assert len(parts[key]) == whole + (wave.shape[1] % length > 0)
        assert np.array_equal(parts[key][-1], wave[:, -length:]), "the last one ends where the clip ends"
    (batch,) = Dataset.open([Source([made.folder])]).fixed(4, batch=4)
    assert batch["audio"].shape == (4, 1, RATE // 2) and batch["audio"].dtype == torch.float16


def test_clips_shorter_than_a_segment_are_left_out_and_counted(spoken: Path, caplog: pytest.LogCaptureFixture) -> None:
    lengths = {key: members["wav"].shape[1] / RATE for key, members in samples(spoken / "speech/train/clips")}
    segments(spoken, "long", 1.7)
    short = sum(length < 1.7 for length in lengths.values())
    assert 0 < short < len(lengths) and f"{short} clips are shorter than 1.7 s" in caplog.text
    report = json.loads((spoken / "long" / cut_segments.REPORT).read_text())
    assert report["read"] == len(lengths) == report["used"] + short
    assert {item["place"] for item in report["items"]} == {key for key, length in lengths.items() if length < 1.7}
    with pytest.raises(DataError, match="got 0 samples"):
        segments(spoken, "longer", 30.0)
    with pytest.raises(UserError, match="segment_seconds: input should be greater than 0"):
        segments(spoken, "x", 0.0)
    with pytest.raises(DataError, match=r"expected a sound \(\.wav\)"):
        segments(spoken, "x", input="segments")
    options = {"input": "speech/train/clips", "output": "long", "data_root": spoken, "runs_root": spoken}
    assert load_job("cut_segments").done(segment_seconds=1.7, **options)
    assert not load_job("cut_segments").done(segment_seconds=1.6, **options)


def phonemes(root: Path, output: str = "phonemes", **changes: Any) -> Manifest:
    given = {"input": "speech/train/clips", "workers": 0, "batch": 5, **changes}
    return precompute_phonemes.run(output=output, data_root=root, runs_root=root, **given)


def test_phonemes_are_those_of_the_captions_and_the_manifest_has_their_table(spoken: Path) -> None:
    made, phonemizer = phonemes(spoken), Phonemizer()
    made.check_encoder(phonemizer.fingerprint)
    assert (
        made.encoder is not None
        and made.encoder["table"] == list(phonemizer.table)
        and made.encoder["language"] == "en-us"
    )
    for _, members in samples(made.folder):
        assert members["phonemes.npy"].dtype == np.int16
        assert members["phonemes.npy"].tolist() == phonemizer(members["txt"])
    british = phonemes(spoken, "british", language="en-gb")
    assert british.fingerprint != made.fingerprint
    dataset = Dataset.open([Source([spoken / "speech/train/clips", made.folder])], tokens={"phonemes": 40})
    dataset.check_encoders({"phonemes": phonemizer.fingerprint})
    with pytest.raises(DataError, match="got data of encoder"):
        Dataset.open([Source([british.folder])], text_tokens=40).check_encoders({"phonemes": phonemizer.fingerprint})
    segments(spoken)
    with pytest.raises(DataError, match=r"expected a caption \(\.txt\)"):
        phonemes(spoken, "x", input="segments")
    ingest(spoken, "kept", language=None, heldout=0.0)
    with pytest.raises(DataError, match=r"has letters '日本語'.*as ingest_speech does"):
        phonemes(spoken, "x", input="kept/train/clips")


# ------------------------------------------------------------------------------------------------- codes


class StandIn:
    """A codec whose codes are known: of each frame, how loud each of its three thirds is."""

    sample_rate_hz, hop, num_codebooks, codebook_size, fingerprint = RATE, 320, 3, 100, "stand-in"

    def encode(self, wave: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        assert wave.shape[1] == 1 and (lengths == wave.shape[2]).all() and wave.shape[2] % self.hop == 0
        frames = wave[:, 0].unflatten(1, (-1, self.hop))[..., :318].unflatten(2, (3, 106))  # (B, T, 3, 106)
        return (frames.abs().mean(-1) * 99).long()


def open_stand_in(spec: Any, runs_root: Path, data_root: Path, device: str = "cpu") -> StandIn:
    if spec == {"run": "nothing"}:
        raise UserError("train the codec first", 3)
    codec = StandIn()
    codec.fingerprint = f"stand-in {spec['run']}"
    return codec


def codes(root: Path, output: str = "codes", bounds: list[int] | None = None, **changes: Any) -> Manifest:
    given = {"input": "speech/train/clips", "codec": {"run": "one"}, "workers": 0, "batch": 4, **changes}
    return precompute_codes.run(output=output, bounds=bounds or [70, 85, 110], data_root=root, runs_root=root, **given)


@pytest.fixture
def codec(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    monkeypatch.setattr(encoders, "open_codec", open_stand_in, raising=False)
    return open_stand_in


def test_codes_are_the_codecs_in_length_buckets_beside_phonemes(spoken: Path, codec: Callable[..., Any]) -> None:
    made = codes(spoken)
    assert made.fields["codes"].shape == (None, 3) and made.fields["codes"].dtype == "int16"
    assert made.encoder is not None and {k: made.encoder[k] for k in ("sample_rate_hz", "hop", "num_codebooks", "codebook_size")} == {
        "sample_rate_hz": RATE, "hop": 320, "num_codebooks": 3, "codebook_size": 100,
    }  # fmt: skip
    clips = dict(samples(spoken / "speech/train/clips"))
    for key, members in samples(made.folder):
        wave = clips[key]["wav"]
        padded = np.pad(wave, ((0, 0), (0, -wave.shape[1] % 320)))
        expected = StandIn().encode(torch.from_numpy(padded)[None], torch.tensor([padded.shape[1]]))[0]
        assert np.array_equal(members["codes.npy"], expected.numpy()), "whatever clips were encoded together"
        assert members["cls"] == clips[key]["cls"]
    assert made.buckets == ("codes<=110", "codes<=70", "codes<=85")
    phonemes(spoken)
    dataset = Dataset.open([Source([made.folder, spoken / "phonemes"])], tokens={"phonemes": 40})
    assert dataset.fields["codes"] == (None, 3) and dataset.buckets == made.buckets
    seen = 0
    for batch in dataset.fixed(99, batch=4):
        bucket = LengthBucket.of(batch.bucket)
        assert bucket is not None and batch["codes"].shape[1:] == (bucket.bound, 3)
        assert (batch["codes_mask"].sum(1) <= bucket.bound).all()
        assert batch["phonemes"].shape[1] == 40 and batch["label"].shape == (len(batch),)
        seen += len(batch)
    assert seen == made.samples
    assert codes(spoken, "plain", bounds=None, batch=1).fingerprint == made.fingerprint


def test_mistakes_with_codes_are_named(
    spoken: Path, codec: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        DataError, match=r"clip '.*': buckets: got codes of length \d+, the largest bound is 70; add a larger one"
    ):
        codes(spoken, "x", bounds=[60, 70])
    with pytest.raises(UserError, match="ascending whole numbers"):
        codes(spoken, "x", bounds=[70, 60])
    with pytest.raises(UserError, match="train the codec first"):
        codes(spoken, "x", codec={"run": "nothing"})
    options = {"input": "speech/train/clips", "output": "x", "data_root": spoken, "runs_root": spoken}
    assert not load_job("precompute_codes").done(codec={"run": "nothing"}, **options)
    monkeypatch.setattr(StandIn, "sample_rate_hz", 24000)
    with pytest.raises(
        DataError, match=r"got 1 channels at 16000 Hz, the codec takes one at 24000; make the clips again"
    ):
        codes(spoken, "x")
    monkeypatch.setattr(StandIn, "codebook_size", 1 << 16)
    with pytest.raises(DataError, match="int16 holds them"):
        codes(spoken, "x")


def test_another_codec_makes_all_again_and_the_old_is_refused(spoken: Path, codec: Callable[..., Any]) -> None:
    first = codes(spoken, "changed")
    options = {
        "input": "speech/train/clips",
        "output": "changed",
        "bounds": [70, 85, 110],
        "data_root": spoken,
        "runs_root": spoken,
    }
    assert load_job("precompute_codes").done(codec={"run": "one"}, **options)
    assert not load_job("precompute_codes").done(codec={"run": "two"}, **options)
    second = codes(spoken, "changed", codec={"run": "two"})
    assert second.fingerprint != first.fingerprint
    with pytest.raises(DataError, match="got data of encoder"):
        second.check_encoder(str(first.fingerprint))


KILLED = """
import sys, time
from pathlib import Path
from data_pipelines import precompute_codes
from nexus_scale.interop import encoders
from tests.data_pipelines import test_speech_data as tests

class Slow(tests.StandIn):
    def encode(self, wave, lengths):
        time.sleep(0.05)
        print("encoding", flush=True)
        return super().encode(wave, lengths)

tests.StandIn = Slow
encoders.open_codec = tests.open_stand_in
tests.codes(Path(sys.argv[1]), "killed")
"""


def test_killed_in_the_middle_and_run_again_equals_an_unbroken_run(spoken: Path, codec: Callable[..., Any]) -> None:
    codes(spoken, "unbroken")
    shards = len(list((spoken / "unbroken").glob("*.tar")))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(spoken)], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(REPO)}
    )
    folder = spoken / "killed"
    try:
        assert process.stdout is not None
        deadline = time.monotonic() + 120
        while not list(folder.glob("*.tar.json")) and time.monotonic() < deadline:
            if not process.stdout.readline():
                break
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    finished = {p: p.stat().st_mtime_ns for p in folder.glob("shard-*.tar") if p.with_name(f"{p.name}.json").exists()}
    assert 1 <= len(finished) < shards
    with pytest.raises(DataError, match="did not finish"):
        Manifest.load(folder)
    codes(spoken, "killed")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert contents(folder) == contents(spoken / "unbroken")


def test_a_wave_of_ours_is_read_by_others_as_it_is() -> None:
    wave = tone(1.0)[None]
    found, _ = recording_of(encode_wav(wave, RATE), RULES)
    assert found is not None and np.abs(found - wave[0]).max() <= 0.5 / 32768 + 1e-7
