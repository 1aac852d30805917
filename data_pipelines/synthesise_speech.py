"""Synthesised speech with transcripts: sentences read by the voices of flite, espeak-ng and festival.

    python data_pipelines/synthesise_speech.py --output speech-voices --sentences 1000
    python data_pipelines/synthesise_speech.py --output speech-voices --text my_sentences.txt --voices slt awb ked

Needs the engines of the voices: `apt install flite espeak-ng` for the five standard ones, `apt install festival festvox-kallpc16k
festvox-kdlpc16k festvox-us-slt-hts` for festival's. Downloads nothing. The text is a file with one sentence a line, or is made by
data_pipelines.sentences. Writes `<output>/wav/<voice>/*.wav` as the engines do (about 80 KB each) and the table `<output>/speech.csv`
(path, caption, speaker, engine), a source for `ingest_speech`. `<output>/speech.json` says which lines were left out and why. Recordings
that exist are not made again. The licences of the voices allow free use of what they speak; the programs themselves are MIT-like (flite,
festival) and GPL-3 (espeak-ng).
"""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from data_pipelines.accounts import Account
from data_pipelines.command import Progress
from data_pipelines.job import Job, Roots
from data_pipelines.options import JobOptions, option
from data_pipelines.sentences import make_sentences
from data_pipelines.signatures import read_record
from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError
from nexus_scale.data.errors import DataError
from nexus_scale.data.sounds import decode_wav
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_text import clean_text, decode_text, lines_of
from nexus_scale.orchestration.mapped import map_rows

log = logging.getLogger(__name__)

TABLE, REPORT = "speech.csv", "speech.json"
LONGEST_TEXT = 400
TOO_LONG = f"a line of more than {LONGEST_TEXT} characters"
REPEATED = "a sentence that stands there before"
BEYOND = "a line beyond the number of sentences that is asked for"
UNREAD = "a sentence that a voice cannot read"
DEADLINE_S = 60.0
"""Seconds for one sentence; the engines need a fraction of one."""
CHUNK = 50
"""Sentences that one task reads."""
BYTES_EACH = 80_000


@dataclass(frozen=True)
class Voice:
    """A voice: who speaks, and by which program. The class in training is the `speaker`, who may have several voices."""

    speaker: str
    engine: str
    name: str


VOICES: Mapping[str, Voice] = {
    "slt": Voice("slt", "flite", "slt"),
    "rms": Voice("rms", "flite", "rms"),
    "awb": Voice("awb", "flite", "awb"),
    "kal": Voice("kal", "flite", "kal16"),
    "espeak": Voice("espeak", "espeak-ng", "en-us"),
    "espeak_f": Voice("espeak", "espeak-ng", "en-us+f3"),
    "slt_hts": Voice("slt", "festival", "cmu_us_slt_arctic_hts"),
    "kal_diphone": Voice("kal", "festival", "kal_diphone"),
    "ked": Voice("ked", "festival", "ked_diphone"),
}
"""slt and kal are each the same person in both engines, and a variant of espeak-ng's voice is not another speaker. Similarity by
resemblyzer on six sentences: within a voice 0.87 to 0.92, kal in flite and in festival 0.85, kal and ked 0.67 to 0.73, others 0.40 to
0.66."""
STANDARD = ("slt", "rms", "awb", "kal", "espeak")

PACKAGES: Mapping[str, str] = {"flite": "flite", "espeak-ng": "espeak-ng", "festival": "festival"}
FESTIVAL_PACKAGES: Mapping[str, str] = {
    "cmu_us_slt_arctic_hts": "festvox-us-slt-hts",
    "kal_diphone": "festvox-kallpc16k",
    "ked_diphone": "festvox-kdlpc16k",
}
PROGRAMS: Mapping[str, str] = {"flite": "flite", "espeak-ng": "espeak-ng", "festival": "text2wave"}


class Options(JobOptions):
    """What is read, and by whom."""

    output: str = option("speech-voices", description="folder to make, below the data root")
    text: str | None = option(
        None, description="file with a sentence a line, below the data root (default: sentences are made)"
    )
    sentences: int = option(1000, description="how many sentences are made, or at most taken of the file")
    readings: int = option(2, description="voices that read each sentence; they take turns")
    voices: Sequence[str] = option(STANDARD, description=f"of {', '.join(VOICES)}")
    seed: int = option(0, description="of the sentences that are made")
    max_bad: float = option(
        0.01, ge=0, le=1, description="share of sentences that may be too long or unreadable before the job gives up"
    )
    workers: int | None = option(
        None, ge=0, description="processes of Ray Data; 0: in this process (default: one for each CPU)"
    )

    def check(self) -> None:
        for name in self.voices:
            if name not in VOICES:
                raise UserError(f"no voice {name!r}; {nearest(name, list(VOICES))}")
        if len(set(self.voices)) < len(self.voices) or not 1 <= self.readings <= len(self.voices):
            raise UserError(
                f"got {self.readings} readings by the voices {list(self.voices)}; expected different voices, and 1 to as many readings"
            )


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Makes the recordings and their table.

    Raises:
        UserError: an engine or a voice that is not installed, an empty text, or too many sentences that cannot be read.
    """
    plan = _plan(options, roots)
    if plan.finished():
        return
    _check(plan.account, options.max_bad)
    _require(plan.voices)
    _record(plan, options.workers, progress)
    account, unread = _settle(plan, options.max_bad)
    kept = [one for one in plan.readings if one.text not in unread]
    atomic_write(plan.folder / TABLE, _table(kept))
    engines = {engine: _version(engine) for engine in sorted({VOICES[name].engine for name in plan.voices})}
    report = {"identity": plan.identity, "recordings": len(kept), "sentences": plan.sentences, "engines": engines}
    report |= {"unread": sorted(unread), **account.to_json()}
    atomic_write(plan.folder / REPORT, json.dumps(report, indent=1, ensure_ascii=False).encode())
    for reason, count in sorted(account.dropped.items()):
        log.warning("synthesise_speech: left out %d: %s", count, reason)


def is_made(options: Options, roots: Roots) -> bool:
    """Whether the table of these readings is there, and the recordings that it lists."""
    return _plan(options, roots).finished()


def _record(plan: Plan, workers: int | None, progress: Progress | None) -> None:
    """Makes the recordings that are not there yet."""
    total = len(plan.readings)
    log.info(
        "synthesise_speech: %d recordings of %d sentences by %s, about %d MB, are kept in %s",
        total, plan.sentences, ", ".join(plan.voices), total * BYTES_EACH // 1_000_000, plan.folder,
    )  # fmt: skip
    missing = [one for one in plan.readings if not (plan.folder / one.path).is_file()]
    ready = total - len(missing)
    if progress is not None:
        progress(ready, total)
    for made in (_in_process if workers == 0 else _on_ray)(plan.folder, missing, workers) if missing else ():
        ready += made
        if progress is not None:
            progress(ready, total)


def _settle(plan: Plan, max_bad: float) -> tuple[Account, dict[str, str]]:
    """The account of all sentences, and the engine's message for each sentence that a voice could not read."""
    unread = plan.unread()
    account = Account.merged([plan.account])
    account.used = plan.sentences - len(unread)
    for sentence, why in unread.items():
        account.drop(plan.places.get(sentence, repr(sentence)), UNREAD, detail=why)
    account.check("synthesise_speech")
    _check(account, max_bad)
    return account, unread


def _table(readings: Sequence[Reading]) -> bytes:
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ("path", "caption", "speaker", "engine"))
    writer.writeheader()
    for one in readings:
        voice = VOICES[one.voice]
        writer.writerow({"path": one.path, "caption": one.text, "speaker": voice.speaker, "engine": voice.engine})
    return table.getvalue().encode()


def _check(account: Account, max_bad: float) -> None:
    """Raises UserError where too many sentences are bad; names the first of them."""
    if account.bad > max_bad * account.candidates:
        first = next(item for item in account.items if item["reason"] not in account.harmless)
        raise UserError(
            f"synthesise_speech: {account.bad} of {account.candidates} sentences cannot be read, more than max_bad={max_bad:g} allows: "
            f"{account.said()}. {first.get('detail', '')} Correct them, or raise max_bad to leave them out.",
            3,
        )


# ------------------------------------------------------------------------------------------------- what is read by whom


@dataclass(frozen=True)
class Reading:
    """A sentence read by a voice. `path`, below the folder, is a hash of both, so that the name says what the file holds."""

    voice: str
    text: str

    @property
    def path(self) -> str:
        voice = VOICES[self.voice]
        digest = xxhash.xxh3_128_hexdigest("\0".join((voice.engine, voice.name, self.text)).encode())
        return f"wav/{self.voice}/{digest}.wav"

    @property
    def failure(self) -> str:
        """The file that says why the recording could not be made."""
        return f"{self.path}.failed.txt"


@dataclass(frozen=True)
class Plan:
    folder: Path
    voices: tuple[str, ...]
    readings: tuple[Reading, ...]
    sentences: int
    account: Account
    places: Mapping[str, str]

    @property
    def identity(self) -> str:
        return xxhash.xxh3_128_hexdigest("\n".join(f"{one.path} {one.text}" for one in self.readings).encode())

    def finished(self) -> bool:
        report = read_record(self.folder / REPORT)
        unread = set(map(str, kept)) if isinstance(kept := report.get("unread"), list) else set()
        there = all((self.folder / one.path).is_file() for one in self.readings if one.text not in unread)
        return report.get("identity") == self.identity and there and (self.folder / TABLE).is_file()

    def unread(self) -> dict[str, str]:
        """The sentences that a voice could not read, each with the message of the engine."""
        failed = [one for one in self.readings if not (self.folder / one.path).is_file()]
        return {one.text: (self.folder / one.failure).read_text(encoding="utf-8") for one in failed}


def _plan(options: Options, roots: Roots) -> Plan:
    account, where = Account(), dict[str, str]()
    if options.text is None:
        lines = make_sentences(options.sentences, options.seed)
        account.read = len(lines)
    else:
        lines = _lines(roots.data_root / options.text, options.sentences, account, where)
    voices, readings = tuple(options.voices), []
    for number, line in enumerate(lines):
        # In turn, shifted by one in each round: all voices read equally often, in changing company.
        first = number * options.readings + number // len(voices)
        readings += [Reading(voices[(first + k) % len(voices)], line) for k in range(options.readings)]
    return Plan(roots.data_root / options.output, voices, tuple(readings), len(lines), account, where)


def _lines(path: Path, sentences: int, account: Account, places: dict[str, str]) -> list[str]:
    """The sentences of a file. Fills in their places, and the account with all lines of text."""
    try:
        text = decode_text(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); expected a text with one sentence a line", 3) from None
    long = 0
    for number, raw in lines_of(text):
        line, place = clean_text(raw), f"{path.name}:{number}"
        if not line:
            continue
        account.read += 1
        if len(line) > LONGEST_TEXT:
            long = long or len(line)
            account.drop(place, TOO_LONG, detail=f"a line of {len(line)} characters")
        elif line in places:
            account.drop(place, REPEATED, harmless=True)
        elif len(places) >= sentences:
            account.drop(place, BEYOND, harmless=True)
        else:
            places[line] = place
    if not places:
        what = f"a line of {long} characters" if long else "no line of text"
        raise UserError(f"{path}: got {what}, expected sentences of at most {LONGEST_TEXT} characters, one a line", 3)
    return list(places)


# ------------------------------------------------------------------------------------------------- the engines


def _require(voices: Sequence[str]) -> None:
    """Raises UserError where an engine or voice is missing, before the first sentence is read; names the packages."""
    lacking: dict[str, None] = {}
    for name in voices:
        voice = VOICES[name]
        if shutil.which(PROGRAMS[voice.engine]) is None:
            lacking[PACKAGES[voice.engine]] = None
            if voice.engine == "festival":
                lacking[FESTIVAL_PACKAGES[voice.name]] = None
    if lacking:
        raise UserError(
            f"synthesise_speech: not installed: {', '.join(lacking)}; apt install {' '.join(lacking)}, or choose other voices among "
            f"{', '.join(VOICES)}",
            4,
        )
    for name in voices:
        try:
            _check_flite(VOICES[name])
            read_aloud(VOICES[name], "Hello.")
        except UserError as error:
            package = FESTIVAL_PACKAGES.get(VOICES[name].name, PACKAGES[VOICES[name].engine])
            raise UserError(
                f"synthesise_speech: voice {name} does not speak; apt install {package}: {error}", 4
            ) from None


def _check_flite(voice: Voice) -> None:
    """Raises UserError where flite lacks a voice: it would silently speak as kal."""
    if voice.engine == "flite":
        said = subprocess.run(
            ("flite", "-lv"), capture_output=True, text=True, errors="replace", timeout=DEADLINE_S
        ).stdout
        if voice.name not in said.split(":")[-1].split():
            raise UserError(f"this flite has no {voice.name}: {said.strip()}")


def read_aloud(voice: Voice, text: str) -> bytes:
    """The .wav that an engine makes of a sentence.

    Raises:
        UserError: the engine fails, is too slow, or leaves no sound.
    """
    with tempfile.TemporaryDirectory(prefix="speech-") as temporary:
        said, sound = Path(temporary) / "said.txt", Path(temporary) / "sound.wav"
        said.write_text(text + "\n", encoding="utf-8")
        command = {
            "flite": ("flite", "-voice", voice.name, "-f", str(said), "-o", str(sound)),
            "espeak-ng": ("espeak-ng", "-v", voice.name, "-s", "150", "-f", str(said), "-w", str(sound)),
            "festival": ("text2wave", "-eval", f"(voice_{voice.name})", "-o", str(sound), str(said)),
        }[voice.engine]
        try:
            # With an environment of its own: the machine's locale must not decide how a number is read.
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=DEADLINE_S,
                env={"PATH": os.environ.get("PATH", ""), "HOME": temporary, "LC_ALL": "C.UTF-8"},
            )  # fmt: skip
            if not done.returncode and sound.is_file():
                data = sound.read_bytes()
                decode_wav(data)
                return data
        except (OSError, subprocess.TimeoutExpired, DataError) as error:
            raise UserError(f"{voice.engine} ({voice.name}) could not read {text!r}: {error}") from None
    raise UserError(f"{voice.engine} ({voice.name}) could not read {text!r}: {done.stderr.strip()[-200:]}")


def _version(engine: str) -> str:
    """The version of an engine, on one line, for the report."""
    option = "-v" if engine == "festival" else "--version"
    said = subprocess.run((engine, option), capture_output=True, text=True, errors="replace", timeout=DEADLINE_S)
    lines = [line.strip() for line in (said.stdout or said.stderr).splitlines() if "ersion" in line or "peech" in line]
    return lines[0] if lines else ""


# ------------------------------------------------------------------------------------------------- who does it


def read_row(row: Mapping[str, Any]) -> int:
    """Makes the recordings of a task and returns their number. Each appears whole, or a file says why it does not."""
    chosen = [Reading(voice, text) for voice, text in json.loads(row["readings"])]
    for one in chosen:
        try:
            data = read_aloud(VOICES[one.voice], one.text)
        except UserError as error:
            atomic_write(Path(row["folder"]) / one.failure, str(error))
            continue
        atomic_write(Path(row["folder"]) / one.path, data)
    return len(chosen)


def _rows(folder: Path, readings: Sequence[Reading], chunk: int) -> list[dict[str, str]]:
    return [
        {"folder": str(folder), "readings": json.dumps([[one.voice, one.text] for one in readings[i : i + chunk]])}
        for i in range(0, len(readings), chunk)
    ]


def _in_process(folder: Path, readings: Sequence[Reading], workers: int | None) -> Iterator[int]:
    yield from map(read_row, _rows(folder, readings, 1))


def _on_ray(folder: Path, readings: Sequence[Reading], workers: int | None) -> Iterator[int]:
    yield from map_rows(read_row, _rows(folder, readings, CHUNK), folder=folder, workers=workers)


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
