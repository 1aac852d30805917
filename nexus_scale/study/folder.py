"""A study's folder: its settings, its samples, and the pairs that follow from them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nexus_scale.config.plain_yaml import read_yaml, write_yaml
from nexus_scale.contracts import UserError
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_json import read_json

SETTINGS, SAMPLES, MEDIA, ANSWERS = "study.yaml", "samples.json", "media", "answers.sqlite"

QUESTIONS = {
    "preference": "Which one do you prefer?",
    "following": "Which one follows the prompt better?",
    "aesthetics": "Which one is more beautiful?",
}
"""The questions that have words of their own; others bring theirs."""

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
Kind = Literal["image", "clip", "sound"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Question(_Model):
    name: Name
    text: Annotated[str, Field(min_length=1, max_length=300)]


class Checks(_Model):
    """Pairs whose right answer is known, shown among the others.

    Args:
        kinds: `degraded`: a sample beside a copy of it that is spoilt; `repeat`: a pair that the rater has answered, its sides swapped.
        every: one check among so many pairs.
        passed: raters count who pass at least this part of their checks; the others are left out of all figures.
    """

    kinds: list[Literal["degraded", "repeat"]] = ["degraded"]
    every: int = Field(10, ge=2, le=1000)
    passed: float = Field(0.75, ge=0, le=1)


class Settings(_Model):
    """study.yaml.

    Args:
        judgements: answers wanted of each pair.
        per_rater: pairs that one person is shown at most, checks among them not counted.
        drawn: how samples were drawn, or `files`.
        loudness: how sounds were levelled.
    """

    version: Literal[1] = 1
    kind: Kind
    systems: Annotated[list[str], Field(min_length=2, max_length=26)]
    questions: Annotated[list[Question], Field(min_length=1, max_length=8)]
    ties: bool = True
    judgements: int = Field(3, ge=1, le=10_000)
    per_rater: int | None = Field(None, ge=1, le=100_000)
    checks: Checks | None = Checks()
    seed: int = Field(0, ge=0, lt=1 << 63)
    drawn: str = "files"
    loudness: str | None = None

    @model_validator(mode="after")
    def _names_differ(self) -> Settings:
        for what, names in (("systems", self.systems), ("questions", [one.name for one in self.questions])):
            if len(set(names)) < len(names):
                raise ValueError(f"{what}: a name stands twice among {', '.join(names)}")
        return self


class Medium(_Model):
    """One sample as it is shown.

    Args:
        parts: files in media/: one, or sheets of a clip's frames, which lie row by row.
        size: (width, height) of the picture, or of a frame.
        frames, columns, rows, rate_hz: of a clip: how many, how many in a row and in a column of a full sheet, how many a second.
        gain_db: of a sound: by how much it was made louder.
    """

    parts: Annotated[list[Annotated[str, Field(pattern=r"^[0-9a-f]{16}\.(png|webp|wav)$")]], Field(min_length=1)]
    size: tuple[int, int] = (0, 0)
    frames: int = 1
    columns: int = 1
    rows: int = 1
    rate_hz: float = 0.0
    gain_db: float = 0.0


class Group(_Model):
    """What all systems made of one prompt (empty: of none) and seed."""

    name: str
    prompt: str = ""
    media: list[Medium]


class Check(_Model):
    """A sample and its spoilt copy."""

    prompt: str = ""
    good: Medium
    bad: Medium


class Samples(_Model):
    """samples.json; `media` of each group are in the order of `systems`."""

    systems: list[str]
    groups: Annotated[list[Group], Field(min_length=1)]
    checks: list[Check] = []


class Pair(NamedTuple):
    """Samples of two systems of one group, all by number."""

    group: int
    first: int
    second: int


class Study:
    """A study, read back.

    Raises:
        UserError: no study is there, or its files do not go together.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.settings = _settings(folder)
        self.samples = _samples(folder)
        if self.settings.systems != self.samples.systems:
            raise UserError(f"{folder}: {SETTINGS} and {SAMPLES} name other systems; make the study again", code=3)
        if any(len(group.media) != len(self.samples.systems) for group in self.samples.groups):
            raise UserError(f"{folder / SAMPLES}: a group has not one sample of each system; make the study again", 3)

    @cached_property
    def pairs(self) -> Sequence[Pair]:
        """Every two systems of every group."""
        two = list(combinations(range(len(self.samples.systems)), 2))
        return [Pair(group, *pair) for group in range(len(self.samples.groups)) for pair in two]

    @cached_property
    def fingerprint(self) -> str:
        """Of what answers refer to: the samples, and the questions by name."""
        asked = [*(one.name for one in self.settings.questions), str(self.settings.ties)]
        content = (self.folder / SAMPLES).read_bytes() + "\n".join(asked).encode()
        return hashlib.sha256(content).hexdigest()[:32]

    def file(self, part: str) -> Path:
        return self.folder / MEDIA / part


def write_study(folder: Path, settings: Settings, samples: Samples) -> None:
    """Writes both files; media are there already."""
    atomic_write(folder / SAMPLES, samples.model_dump_json(indent=0))
    write_yaml(folder / SETTINGS, settings.model_dump(mode="json"))


def _settings(folder: Path) -> Settings:
    file = folder / SETTINGS
    if not file.is_file():
        raise UserError(f"{folder}: has no {SETTINGS}: is no study; `nexus study new` makes one", code=3)
    try:
        return Settings.model_validate(read_yaml(file))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{file}: {where}: {first['msg']}", code=3) from None


def _samples(folder: Path) -> Samples:
    try:
        found = read_json(folder / SAMPLES, Samples)
    except ValueError as error:
        raise UserError(f"{error}; make the study again", code=3) from None
    if found is None:
        raise UserError(f"{folder}: has no {SAMPLES}; make the study again", code=3)
    return found
