"""Music with captions, rendered from scores: tunes in ABC notation, each played by an instrument, at a tempo and in a key of its own.

    python data_pipelines/render_scores.py --output music-tunes --clips 600 --seconds 8
    python data_pipelines/render_scores.py --output music-tunes --scores my_tunes --instruments flute violin

Needs fluidsynth and a sound font: `apt install fluidsynth timgm6mb-soundfont`. Downloads nothing. The scores are a folder of .abc files, or
those of fiddle tunes that the package music21 carries (`pip install music21`, of which nothing is imported; Ryan's Mammoth Collection,
1883). Each clip is a tune from its beginning, transposed, with chords of its key by a second instrument. The caption says key, meter, tempo
and instruments in words. Writes `<output>/wav/*.wav` and the table `<output>/music.csv` (path, caption, tune, key, meter, tempo,
instrument, chords), a source for `ingest_speech` with `language: null`. `<output>/music.json` says how many tunes were left out and why.
Clips that exist are not made again.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import logging
import shutil
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import xxhash

from data_pipelines.abc_notation import Note, NotRead, Tune, read_tune, tunes_of
from data_pipelines.accounts import Account
from data_pipelines.command import Progress
from data_pipelines.job import Job, Roots
from data_pipelines.options import JobOptions, option
from data_pipelines.signatures import read_record
from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_text import decode_text
from nexus_scale.metrics.music import NOTES
from nexus_scale.orchestration.mapped import map_rows

log = logging.getLogger(__name__)

TABLE, REPORT = "music.csv", "music.json"
COLUMNS = ("path", "caption", "tune", "key", "meter", "tempo", "instrument", "chords")
SCORES = "corpus/ryansMammoth"
"""Below the package music21."""
UNREAD = "a tune that is not read"
DEADLINE_S, CHUNK = 60.0, 20
INSTRUMENTS: Mapping[str, int] = {
    "piano": 0, "harpsichord": 6, "vibraphone": 11, "organ": 19, "accordion": 21, "guitar": 24, "violin": 40, "cello": 42, "trumpet": 56,
    "oboe": 68, "clarinet": 71, "flute": 73,
}  # fmt: skip
"""Programs of General MIDI, counted from 0."""
STANDARD = ("piano", "harpsichord", "organ", "guitar", "violin", "trumpet", "clarinet", "flute")
CHORDS = ("guitar", "piano", "harpsichord")
TEMPOS: Mapping[int, str] = {70: "slow", 90: "moderate", 120: "lively", 150: "fast"}
"""Beats a minute, of quarter notes or in 6/8 and its like of dotted ones, with the caption's word."""
TICKS = 480
"""Of a quarter note in a MIDI file."""


class Options(JobOptions):
    """Which tunes are played, by what, and for how long."""

    output: str = option("music-tunes", description="folder to make, below the data root")
    scores: str | None = option(
        None, description="folder of .abc files, below the data root (default: the tunes that music21 carries)"
    )
    clips: int = option(600, ge=1, le=10**6, description="how many clips are rendered; tunes take turns")
    seconds: float = option(8.0, gt=0, le=600, description="length of a clip")
    sample_rate_hz: int = option(16000, ge=8000, le=96000, description="of the clips")
    instruments: Sequence[str] = option(STANDARD, description=f"that play the tune, of {', '.join(INSTRUMENTS)}")
    soundfont: str = option("/usr/share/sounds/sf2/TimGM6mb.sf2", description="a General MIDI sound font")
    seed: int = option(0, description="of instruments, tempos and keys")
    workers: int | None = option(
        None, ge=0, description="processes of Ray Data; 0: in this process (default: one for each CPU)"
    )

    def check(self) -> None:
        for name in self.instruments:
            if name not in INSTRUMENTS:
                raise UserError(f"no instrument {name!r}; {nearest(name, list(INSTRUMENTS))}")
        if not self.instruments:
            raise UserError("instruments: got none; expected at least one")


@dataclass(frozen=True)
class Clip:
    """A tune as it is played: `text` in ABC, transposed by `shift` semitones, at `tempo` beats a minute by `instrument`, with `chords` by
    another one, or by none where that is empty."""

    text: str
    shift: int
    tempo: int
    instrument: str
    chords: str
    seconds: float
    sample_rate_hz: int

    @property
    def path(self) -> str:
        return f"wav/{xxhash.xxh3_128_hexdigest(json.dumps(asdict(self)).encode())}.wav"


# ------------------------------------------------------------------------------------------------- the job


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Renders the clips and their table.

    Raises:
        UserError: no scores, none that can be read, or no fluidsynth and sound font.
    """
    clips, account, identity = _planned(options, roots)
    folder = roots.data_root / options.output
    if _finished(folder, clips, identity):
        return
    account.check("render_scores")
    for reason, count in sorted(account.dropped.items()):
        log.warning("render_scores: left out %d of %d: %s", count, account.read, reason)
    missing = [clip for clip in clips if not (folder / clip.path).is_file()]
    if missing:
        _require(options.soundfont)
    rows = [
        {"folder": str(folder), "soundfont": options.soundfont, "clips": json.dumps([asdict(c) for c in missing[i : i + CHUNK]])}
        for i in range(0, len(missing), CHUNK)
    ]  # fmt: skip
    ready = len(clips) - len(missing)
    for made in (
        map(read_row, rows)
        if options.workers == 0
        else map_rows(read_row, rows, folder=folder, workers=options.workers)
    ):
        ready += made
        if progress is not None:
            progress(ready, len(clips))
    atomic_write(folder / TABLE, _table(clips))
    report = {"identity": identity, "clips": len(clips), **account.to_json()}
    atomic_write(folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode())


def is_made(options: Options, roots: Roots) -> bool:
    """Whether the table of these clips is there, and the clips that it lists."""
    try:
        clips, _, identity = _planned(options, roots)
    except UserError:
        return False
    return _finished(roots.data_root / options.output, clips, identity)


def _finished(folder: Path, clips: Sequence[Clip], identity: str) -> bool:
    there = (folder / TABLE).is_file() and all((folder / clip.path).is_file() for clip in clips)
    return there and read_record(folder / REPORT).get("identity") == identity


def _planned(options: Options, roots: Roots) -> tuple[list[Clip], Account, str]:
    """The clips in order, the account of all tunes, and a hash of what is to be made."""
    folder = _package_scores() if options.scores is None else roots.data_root / options.scores
    texts, account = [], Account()
    for file in sorted(folder.rglob("*.abc")) if folder.is_dir() else ():
        for number, text in enumerate(tunes_of(decode_text(file.read_bytes()))):
            account.read += 1
            try:
                read_tune(text)
            except NotRead as why:
                account.drop(f"{file.name}:{number}", UNREAD, harmless=True, detail=str(why))
                continue
            account.used += 1
            texts.append(text)
    if not texts:
        raise UserError(
            f"{folder}: no tune there that can be read; expected .abc files with X:, M: and K: in each tune", 3
        )
    order = sorted(range(len(texts)), key=lambda n: _drawn(options.seed, "order", texts[n]))
    clips = [_clip(texts[order[n % len(order)]], n // len(order), options) for n in range(options.clips)]
    return clips, account, xxhash.xxh3_128_hexdigest("\n".join(clip.path for clip in clips).encode())


def _package_scores() -> Path:
    found = importlib.util.find_spec("music21")
    if found is None or not found.submodule_search_locations:
        raise UserError(
            "render_scores: the package music21, whose tunes are played, is not installed; pip install music21, or give a folder of "
            ".abc files as `scores`",
            4,
        )
    return Path(next(iter(found.submodule_search_locations))) / SCORES


def _drawn(seed: int, *words: object) -> int:
    """A number that follows from the seed and the words alone."""
    return xxhash.xxh3_64_intdigest(json.dumps([seed, *map(str, words)]).encode())


def _clip(text: str, take: int, options: Options) -> Clip:
    def one(of: Sequence[Any], what: str) -> Any:
        return of[_drawn(options.seed, what, take, text) % len(of)]

    return Clip(
        text,
        one(range(-5, 7), "key"),
        one(list(TEMPOS), "tempo"),
        one(options.instruments, "instrument"),
        one((*CHORDS, ""), "chords"),
        options.seconds,
        options.sample_rate_hz,
    )


def _table(clips: Sequence[Clip]) -> bytes:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS)
    writer.writeheader()
    for clip in clips:
        tune = read_tune(clip.text)
        told = {"tune": tune.title, "key": key_of(tune, clip.shift), "meter": "/".join(map(str, tune.meter))}
        played = {"tempo": clip.tempo, "instrument": clip.instrument, "chords": clip.chords}
        writer.writerow({"path": clip.path, "caption": caption(tune, clip), **told, **played})
    return table.getvalue().encode()


def key_of(tune: Tune, shift: int) -> str:
    """`E flat minor`, of a tune that is transposed by so many semitones."""
    return f"{NOTES[(tune.tonic + shift) % 12]} {tune.mode}"


def caption(tune: Tune, clip: Clip) -> str:
    """`a lively reel in G major, 2/4, 120 beats a minute, played by a flute with guitar chords`."""
    kind = tune.rhythm.split(",")[0].strip() or "tune"
    player = f"{'an' if clip.instrument[0] in 'aeiou' else 'a'} {clip.instrument}"
    chords = f" with {clip.chords} chords" if clip.chords else ""
    meter = "/".join(map(str, tune.meter))
    return f"a {TEMPOS[clip.tempo]} {kind} in {key_of(tune, clip.shift)}, {meter}, {clip.tempo} beats a minute, played by {player}{chords}"


# ------------------------------------------------------------------------------------------------- what is played


def chords_of(tune: Tune) -> list[Note]:
    """Each bar's chord, three notes of the key held through it and its root below: the triad that most of its time is of."""
    found: list[Note] = []
    start = tune.upbeat
    while start < tune.length:
        end = min(start + tune.bar, tune.length)
        weight: Counter[int] = Counter()
        for note in tune.notes:
            shared = min(end, note.start + note.length) - max(start, note.start)
            if shared > 0:
                weight[note.pitch % 12] += float(shared)  # type: ignore[assignment]
        triads = [[tune.scale[(degree + step) % 7] for step in (0, 2, 4)] for degree in range(7)]
        perfect = [triad for triad in triads if (triad[2] - triad[0]) % 12 == 7]
        best = max(perfect, key=lambda triad: (sum(weight[pitch] for pitch in triad), -perfect.index(triad)))
        found += [Note(start, end - start, pitch) for pitch in (36 + best[0], *(48 + pitch for pitch in best))]
        start = end
    return found


def midi_of(clip: Clip) -> bytes:
    """A clip as a MIDI file: the tune over and over until its time is filled, and its chords more softly.

    Source: Standard MIDI Files 1.0, RP-001.
    """
    tune = read_tune(clip.text)
    beat = Fraction(3, 2) if tune.meter[1] == 8 and tune.meter[0] % 3 == 0 else Fraction(1)
    quarter_s = 60 / (clip.tempo * float(beat))
    voices = [(0, INSTRUMENTS[clip.instrument], 100, tune.notes)]
    if clip.chords:
        voices.append((1, INSTRUMENTS[clip.chords], 60, tuple(chords_of(tune))))
    events = [(0, 0, struct.pack(">BBB", 0xFF, 0x51, 3) + round(quarter_s * 1e6).to_bytes(3, "big"))]
    for channel, program, loudness, notes in voices:
        events.append((0, 0, bytes([0xC0 + channel, program])))
        begin = Fraction(0)
        while float(begin) * quarter_s < clip.seconds:
            for note in notes:
                first, last = (round(TICKS * time) for time in (begin + note.start, begin + note.start + note.length))
                pitch = note.pitch + clip.shift
                events.append((first, 2, bytes([0x90 + channel, pitch, loudness])))
                events.append((max(first + 1, last - TICKS // 24), 1, bytes([0x80 + channel, pitch, 0])))
            begin += tune.length
    track, now = b"", 0
    for time, _, event in sorted(events):
        track, now = track + _variable(time - now) + event, time
    track += b"\x00\xff\x2f\x00"
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, TICKS) + b"MTrk" + struct.pack(">I", len(track)) + track


def _variable(value: int) -> bytes:
    """A number in seven bits a byte, all but the last with the eighth bit set."""
    found = [value & 0x7F]
    while value := value >> 7:
        found.append(value & 0x7F | 0x80)
    return bytes(reversed(found))


# ------------------------------------------------------------------------------------------------- the player


def _require(soundfont: str) -> None:
    """Raises UserError where the player or its sounds are missing, before the first clip is rendered."""
    if shutil.which("fluidsynth") is None:
        raise UserError("render_scores: fluidsynth is not installed; apt install fluidsynth timgm6mb-soundfont", 4)
    if not Path(soundfont).is_file():
        raise UserError(
            f"render_scores: {soundfont}: no sound font there; apt install timgm6mb-soundfont, or name another as `soundfont`",
            4,
        )


def rendered(clip: Clip, soundfont: str) -> bytes:
    """The .wav of a clip, one channel of 16 bits, of exactly its length.

    Raises:
        UserError: fluidsynth fails, is too slow, or leaves no sound.
    """
    from nexus_scale.data.sounds import decode_wav, encode_wav

    with tempfile.TemporaryDirectory(prefix="music-") as temporary:
        score, sound = Path(temporary) / "score.mid", Path(temporary) / "sound.wav"
        score.write_bytes(midi_of(clip))
        rate = str(clip.sample_rate_hz)
        asked = ("-ni", "-q", "-g", "0.5", "-r", rate, "-T", "wav", "-F", str(sound))
        command = ("fluidsynth", *asked, soundfont, str(score))
        try:
            said = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=DEADLINE_S)
            stereo = decode_wav(sound.read_bytes()).wave
        except (OSError, ValueError, subprocess.TimeoutExpired) as error:
            raise UserError(f"render_scores: fluidsynth made no sound of {clip.text[:80]!r}: {error}", 3) from None
    count = round(clip.seconds * clip.sample_rate_hz)
    if said.returncode or stereo.shape[1] < count:
        raise UserError(
            f"render_scores: fluidsynth rendered {stereo.shape[1]} of {count} samples: {said.stderr[-200:]}", 3
        )
    return encode_wav(stereo[:, :count].mean(0, keepdims=True), clip.sample_rate_hz)


def read_row(row: Mapping[str, Any]) -> int:
    """Renders the clips of a task and returns their number. Each appears whole."""
    clips = [Clip(**one) for one in json.loads(row["clips"])]
    for clip in clips:
        atomic_write(Path(row["folder"]) / clip.path, rendered(clip, row["soundfont"]))
    return len(clips)


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
