"""Tunes in ABC notation as notes in time: what of the standard folk collections use.

Read: title, rhythm, meter, unit length and key; notes with accidentals and octaves, lengths, rests, broken rhythm, tuplets, ties, chords
(their last note). Passed over: repeats and endings (all is played once, as it stands), grace notes, slurs, decorations, chord names.

Source: the ABC music standard 2.1, sections 3 and 4.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

SHARPS = "FCGDAEB"
NATURAL: Mapping[str, int] = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
FIFTHS: Mapping[str, int] = {"F": -1, "C": 0, "G": 1, "D": 2, "A": 3, "E": 4, "B": 5}
MODES: Mapping[str, tuple[str, int]] = {
    "": ("major", 0), "maj": ("major", 0), "ion": ("major", 0), "m": ("minor", -3), "min": ("minor", -3), "aeo": ("minor", -3),
    "mix": ("mixolydian", -1), "dor": ("dorian", -2), "phr": ("phrygian", -4), "lyd": ("lydian", 1), "loc": ("locrian", -5),
}  # fmt: skip
"""By the letters that ABC has for a mode: its name, and how many sharps it has more than the major of its tonic."""

_TOKEN = re.compile(
    r"""(?P<skip>"[^"]*"|![^!]*!|\{[^}]*\}|[\s\\`.~uvkHLMOPSTJUy)$*])
    |(?P<field>\[[A-Za-z]:[^\]]*\])
    |\((?P<tuplet>\d)(?::(?P<into>\d)?)?(?::(?P<many>\d)?)?
    |(?P<slur>\()
    |(?P<chord>\[(?=[\^_=]*[A-Ga-g]))(?P<inside>[^\]]*)\](?P<chord_length>\d*/*\d*)
    |(?P<bar>[|:\[\]]+(?:\d(?:[,-]\d)*)?)
    |(?P<accidental>[\^_=]*)(?P<letter>[A-Ga-gzx])(?P<octave>[,']*)(?P<length>\d*/*\d*)
    |(?P<broken><+|>+)
    |(?P<tie>-)""",
    re.VERBOSE,
)
_TUPLETS = {2: 3, 3: 2, 4: 3, 6: 2, 8: 3}
"""Notes of a tuplet, and in the time of how many they are played; others in that of two."""


class NotRead(ValueError):
    """A tune with something that is not read here; says what."""


class Note(NamedTuple):
    """`start` and `length` in quarter notes; `pitch` by MIDI's number."""

    start: Fraction
    length: Fraction
    pitch: int


@dataclass(frozen=True)
class Tune:
    """A tune in one voice. `meter`: beats and their unit, (6, 8); `tonic`: pitch class, 0 is C; `scale`: pitch classes of its key, from the
    tonic up; `upbeat`: quarter notes before the first whole bar; `notes` in order."""

    title: str
    rhythm: str
    meter: tuple[int, int]
    tonic: int
    mode: str
    scale: tuple[int, ...]
    upbeat: Fraction
    notes: tuple[Note, ...]

    @property
    def bar(self) -> Fraction:
        """Length of a bar in quarter notes."""
        return Fraction(4 * self.meter[0], self.meter[1])

    @property
    def length(self) -> Fraction:
        """In quarter notes, to the end of the last note."""
        return max(note.start + note.length for note in self.notes)


def tunes_of(text: str) -> Iterator[str]:
    """The tunes of a file, each with its header."""
    for part in re.split(r"(?m)^(?=X:)", text):
        if part.startswith("X:"):
            yield part


def read_tune(text: str) -> Tune:
    """A tune.

    Raises:
        NotRead: several voices, a key or a meter within, no notes, or signs that are not known here.
    """
    head: dict[str, str] = {}
    lines: list[str] = []
    for line in text.splitlines():
        line = line.split("%")[0].rstrip()
        if re.match(r"[A-Za-z]:", line):
            if lines and line[0] in "KMLV":
                raise NotRead(f"a change within: {line}")
            head.setdefault(line[0], line[2:].strip())
        elif line.strip():
            lines.append(line)
    if missing := {"K", "M"} - head.keys():
        raise NotRead(f"no {' or '.join(sorted(missing))}: in its header")
    meter = _meter(head["M"])
    tonic, mode, signature = _key(head["K"])
    unit = _unit(head.get("L", ""), meter)
    notes, first = _notes("\n".join(lines), 4 * unit, meter, signature)
    upbeat = first if first < Fraction(4 * meter[0], meter[1]) else Fraction(0)
    if not notes:
        raise NotRead("no notes")
    scale = sorted((NATURAL[letter] + signature.get(letter, 0)) % 12 for letter in NATURAL)
    ordered = tuple(sorted(scale, key=lambda pitch: (pitch - tonic) % 12))
    return Tune(head.get("T", ""), head.get("R", "").lower(), meter, tonic, mode, ordered, upbeat, tuple(notes))


def _meter(text: str) -> tuple[int, int]:
    named = {"C": (4, 4), "C|": (2, 2)}
    if text in named:
        return named[text]
    if (match := re.fullmatch(r"(\d+)/(\d+)", text.replace(" ", ""))) is None or "0" in match.groups():
        raise NotRead(f"meter {text!r}")
    return int(match[1]), int(match[2])


def _unit(text: str, meter: tuple[int, int]) -> Fraction:
    """The length of a note without a number, in whole notes."""
    if match := re.fullmatch(r"1/(\d+)", text.replace(" ", "")):
        return Fraction(1, int(match[1]))
    return Fraction(1, 16 if Fraction(*meter) < Fraction(3, 4) else 8)


def _key(text: str) -> tuple[int, str, dict[str, int]]:
    """Tonic, mode, and the accidental of each letter."""
    match = re.match(r"([A-G])([#b]?)\s*([A-Za-z]*)", text)
    mode = MODES.get(match[3].lower()[:3]) if match else None
    if match is None or mode is None:
        raise NotRead(f"key {text!r}")
    shift = {"#": 1, "b": -1, "": 0}[match[2]]
    fifths = FIFTHS[match[1]] + 7 * shift + mode[1]
    if not -7 <= fifths <= 7:
        raise NotRead(f"key {text!r}")
    sharps = dict.fromkeys(SHARPS[:fifths], 1) if fifths > 0 else dict.fromkeys(SHARPS[fifths:] if fifths else "", -1)
    return (NATURAL[match[1]] + shift) % 12, mode[0], sharps


def _length(text: str) -> Fraction:
    """`3/2`, `/`, `//`, `2`, or nothing, in units."""
    number, slashes, below = re.fullmatch(r"(\d*)(/*)(\d*)", text).groups()  # type: ignore[union-attr]
    over = int(below) if below else 2 ** len(slashes)
    if over == 0 or number == "0":
        raise NotRead(f"a length {text!r}")
    return Fraction(int(number or 1), over)


def _notes(
    text: str, unit: Fraction, meter: tuple[int, int], signature: Mapping[str, int]
) -> tuple[list[Note], Fraction]:
    """The notes of a tune's body, and where its first bar ends; `unit` in quarter notes."""
    place, time, bent, first_bar = 0, Fraction(0), dict[tuple[str, int], int](), Fraction(0)
    tuplet, left = Fraction(1), 0
    found: list[list[Fraction | int]] = []  # start, length, pitch; -1 of a rest
    owed, tied = Fraction(1), False  # what broken rhythm gives to the note behind it; whether the next one goes on
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            raise NotRead(f"{text[place : place + 8]!r}")
        place, part = match.end(), match.groupdict()
        if part["field"]:
            raise NotRead(f"a change within: {part['field']}")
        if part["bar"]:
            bent.clear()
            first_bar = first_bar or time
        elif part["tuplet"]:
            count = int(part["tuplet"])
            into = int(part["into"] or _TUPLETS.get(count, 3 if meter[1] == 8 and meter[0] % 3 == 0 else 2))
            tuplet, left = Fraction(into, count), int(part["many"] or count)
        elif part["tie"]:
            tied = True
        elif part["broken"] and found:
            short = Fraction(1, 2 ** len(part["broken"]))
            first, owed = (2 - short, short) if part["broken"][0] == ">" else (short, 2 - short)
            time += found[-1][1] * (first - 1)
            found[-1][1] *= first
        elif part["letter"] or part["chord"]:
            one = re.findall(r"([\^_=]*)([A-Ga-g])([,']*)(\d*/*\d*)", part["inside"] or "")[-1:]
            accidental, letter, octave, own = (
                one[0] if one else (part["accidental"], part["letter"], part["octave"], part["length"])
            )
            length = _length(own) * unit * owed * (tuplet if left else 1)
            if part["chord"]:
                length *= _length(part["chord_length"])
            pitch = _pitch(accidental, letter, octave, signature, bent)
            if tied and found and found[-1][2] == pitch and pitch >= 0:
                found[-1][1] += length
            else:
                found.append([time, length, pitch])
            time, owed, tied, left = time + length, Fraction(1), False, max(0, left - 1)
    return [
        Note(Fraction(start), Fraction(length), int(pitch)) for start, length, pitch in found if pitch >= 0
    ], first_bar


def _pitch(
    accidental: str, letter: str, octave: str, signature: Mapping[str, int], bent: dict[tuple[str, int], int]
) -> int:
    """MIDI's number of a note, -1 of a rest; an accidental lasts to the end of its bar, in `bent`."""
    if letter in "zx":
        return -1
    name, height = letter.upper(), (5 if letter.isupper() else 6) + octave.count("'") - octave.count(",")
    if accidental:
        bent[name, height] = accidental.count("^") - accidental.count("_")
    pitch = 12 * height + NATURAL[name] + bent.get((name, height), signature.get(name, 0))
    if not 21 <= pitch <= 108:
        raise NotRead(f"a note beyond a piano's: {accidental}{letter}{octave}")
    return pitch
