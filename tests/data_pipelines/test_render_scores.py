"""Music from scores: ABC notation as notes, what is played of it and how the caption says so, and the clips that a player makes."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from dataclasses import replace
from fractions import Fraction as F
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import load_job
from data_pipelines.abc_notation import NotRead, read_tune, tunes_of
from data_pipelines.render_scores import Clip, caption, chords_of, key_of, midi_of
from nexus_scale.contracts import UserError
from nexus_scale.data.sounds import decode_wav, encode_wav

HEAD = "X:1\nT:One\nR:reel\nM:4/4\nL:1/8\nK:{key}\n"
SCALE = HEAD.format(key="G") + "G2AB cdef|g8|]\n"


def notes(body: str, key: str = "C") -> list[tuple[F, F, int]]:
    return [tuple(note) for note in read_tune(HEAD.format(key=key) + body).notes]  # type: ignore[misc]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("C D2 E/ F3/2", [(0, F(1, 2), 60), (F(1, 2), 1, 62), (F(3, 2), F(1, 4), 64), (F(7, 4), F(3, 4), 65)]),
        ("C,c c'z C", [(0, F(1, 2), 48), (F(1, 2), F(1, 2), 72), (1, F(1, 2), 84), (2, F(1, 2), 60)]),
        ("^C C|C _B", [(0, F(1, 2), 61), (F(1, 2), F(1, 2), 61), (1, F(1, 2), 60), (F(3, 2), F(1, 2), 70)]),
        ("C>D E<<F", [(0, F(3, 4), 60), (F(3, 4), F(1, 4), 62), (1, F(1, 8), 64), (F(9, 8), F(7, 8), 65)]),
        ("(3CDE F", [(0, F(1, 3), 60), (F(1, 3), F(1, 3), 62), (F(2, 3), F(1, 3), 64), (1, F(1, 2), 65)]),
        ("C2-|C2 (D{e}E)", [(0, 2, 60), (2, F(1, 2), 62), (F(5, 2), F(1, 2), 64)]),
        ('"Am"[CEG]2 !trill!.uC :|1 D', [(0, 1, 67), (1, F(1, 2), 60), (F(3, 2), F(1, 2), 62)]),
    ],
)
def test_notes_stand_where_abc_puts_them(body: str, expected: list[tuple[F, F, int]]) -> None:
    assert notes(body) == expected


@pytest.mark.parametrize(
    ("key", "tonic", "mode", "third"),
    [("G", 7, "major", 66), ("Em", 4, "minor", 66), ("Ador", 9, "dorian", 66), ("Eb", 3, "major", 65), ("D Mix", 2, "mixolydian", 66)],
)  # fmt: skip
def test_keys_bend_their_notes(key: str, tonic: int, mode: str, third: int) -> None:
    tune = read_tune(HEAD.format(key=key) + "F")
    assert (tune.tonic, tune.mode, tune.notes[0].pitch) == (tonic, mode, third)
    assert tune.scale[0] == tonic and len(set(tune.scale)) == 7


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (HEAD.format(key="C") + "CD\nK:D\nE", "a change within: K:D"),
        (HEAD.format(key="C") + "CD [M:3/4] E", "a change within"),
        (HEAD.format(key="H") + "C", "key 'H'"),
        (HEAD.format(key="C") + "|]", "no notes"),
        (HEAD.format(key="C") + "C & D", "'& D"),
        (HEAD.format(key="C") + "C/0", "a length"),
        ("X:1\nT:none\nC", "no K or M"),
    ],
)
def test_what_is_not_read_is_said(text: str, why: str) -> None:
    with pytest.raises(NotRead, match=why):
        read_tune(text)


def test_a_file_has_several_tunes() -> None:
    assert len(list(tunes_of("% a collection\n" + SCALE + "\n" + SCALE.replace("X:1", "X:2")))) == 2


def clip(**changes: object) -> Clip:
    return replace(Clip(SCALE, 2, 120, "flute", "guitar", 3.0, 16000), **changes)  # type: ignore[arg-type]


def test_captions_say_what_is_played() -> None:
    tune = read_tune(SCALE)
    assert key_of(tune, 0) == "G major" and key_of(tune, 2) == "A major"
    assert caption(tune, clip()) == (
        "a lively reel in A major, 4/4, 120 beats a minute, played by a flute with guitar chords"
    )
    assert caption(tune, clip(instrument="organ", chords="", tempo=70)).endswith(
        "70 beats a minute, played by an organ"
    )


def test_chords_are_of_the_key_and_of_most_of_each_bar() -> None:
    """A bar of G B D is G's, one of A C D F sharp is D's; an upbeat has none."""
    tune = read_tune(HEAD.format(key="G") + "D2|G2B2d2B2|A2F2D2c2|G8|]")
    assert tune.upbeat == 1
    chords = chords_of(tune)
    assert [note.start for note in chords[::4]] == [1, 5, 9]
    assert [{note.pitch % 12 for note in chords[i : i + 4]} for i in (0, 4, 8)] == [{7, 11, 2}, {2, 6, 9}, {7, 11, 2}]


def test_a_midi_file_plays_the_tune_over_and_over() -> None:
    """Eight quarter notes of half a second are 4 s: a clip of 3 s has them once, one of 5 s twice."""
    data = midi_of(clip(chords=""))
    assert data.startswith(b"MThd") and data.endswith(b"\xff\x2f\x00")
    assert len(data) == 14 + 8 + int.from_bytes(data[18:22], "big")
    assert data.count(bytes([0x90, 67 + 2])) == 1 and bytes([0xC0, 73]) in data
    assert midi_of(clip(chords="", seconds=5.0)).count(bytes([0x90, 67 + 2])) == 2
    assert bytes([0x51, 3]) + (500_000).to_bytes(3, "big") in data


PLAYER = """#!{python}
import sys
sys.path[:0] = {path!r}
import numpy as np
from nexus_scale.data.sounds import encode_wav
rate, out = int(sys.argv[sys.argv.index("-r") + 1]), sys.argv[sys.argv.index("-F") + 1]
open(out, "wb").write(encode_wav(np.full((2, 9 * rate), 0.25, np.float32), rate))
"""


def write_player(folder: Path) -> None:
    """A stand-in for fluidsynth: nine seconds of one value."""
    folder.mkdir(parents=True, exist_ok=True)
    player = folder / "fluidsynth"
    player.write_text(PLAYER.format(python=sys.executable, path=[str(Path(__file__).parents[2])]))
    player.chmod(0o755)


def test_clips_and_their_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_player(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    (tmp_path / "tunes").mkdir()
    (tmp_path / "tunes/a.abc").write_text(SCALE + "\n" + SCALE.replace("One", "Two") + "\nX:3\nK:C\nC\n")
    (tmp_path / "font.sf2").write_bytes(b"sounds")
    job = load_job("render_scores")
    options = {
        "output": "music",
        "scores": "tunes",
        "clips": 3,
        "seconds": 1.5,
        "soundfont": str(tmp_path / "font.sf2"),
        "workers": 0,
    }
    where = {"data_root": tmp_path, "runs_root": tmp_path}
    job.run(**options, **where)
    assert job.done(**options, **where) and not job.done(**{**options, "seed": 1}, **where)
    with (tmp_path / "music/music.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["tune"] for row in rows].count("One") + [row["tune"] for row in rows].count("Two") == 3
    for row in rows:
        assert row["key"] in row["caption"] and row["instrument"] in row["caption"] and row["tempo"] in row["caption"]
        sound = decode_wav((tmp_path / "music" / row["path"]).read_bytes())
        assert sound.wave.shape == (1, 24000) and sound.sample_rate_hz == 16000
    report = json.loads((tmp_path / "music/music.json").read_text())
    assert report["clips"] == 3 and [item["detail"] for item in report["items"]] == ["no M: in its header"]
    with pytest.raises(UserError, match="no sound font there") as refused:
        job.run(**{**options, "soundfont": "/nowhere.sf2", "seed": 2}, **where)
    assert refused.value.code == 4
    with pytest.raises(UserError, match="no instrument 'flut'; did you mean 'flute'"):
        job.run(**{**options, "instruments": ["flut"]}, **where)


@pytest.mark.skipif(shutil.which("fluidsynth") is None, reason="fluidsynth is not installed")
def test_fluidsynth_plays_the_notes(tmp_path: Path) -> None:
    """The loudest frequency of one long A is 440 Hz."""
    from data_pipelines.render_scores import Options, rendered

    font = Options.model_fields["soundfont"].default
    if not Path(font).is_file():
        pytest.skip(f"{font} is not installed")
    long = Clip(HEAD.format(key="C") + "A8|A8|", 0, 120, "flute", "", 2.0, 16000)
    wave = decode_wav(rendered(long, font)).wave[0]
    assert wave.shape == (32000,) and np.abs(wave).max() > 0.01
    spectrum = np.abs(np.fft.rfft(wave[8000:24000]))
    assert abs(float(spectrum.argmax()) - 440) < 6
    assert rendered(long, font) == encode_wav(wave[None], 16000)
