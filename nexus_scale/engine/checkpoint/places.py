"""The interface of a place of checkpoints, and who may write to it; folder.py and objects.py implement it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from nexus_scale.engine.checkpoint.manifest import Fenced
from nexus_scale.io.plain_json import is_count, parse_object

logger = logging.getLogger(__name__)

ATTEMPT = "ATTEMPT"


class Commit(NamedTuple):
    """A committed checkpoint: its step and its folder's name in its place. The greatest is the newest."""

    step: int
    name: str


class Claim(NamedTuple):
    """Who may write: the name of a start of the run, and how many there were until then."""

    attempt: str
    number: int


def claim_from(data: bytes, where: str) -> Claim | None:
    """The claim in the bytes of an ATTEMPT file; None if they are damaged, with a warning: the checkpoints are intact without it."""
    found = parse_object(data) or {}
    attempt, number = found.get("attempt"), found.get("number")
    if isinstance(attempt, str) and is_count(number):
        return Claim(attempt, number)  # type: ignore[arg-type]
    logger.warning("%s: is damaged; the next start of the run rewrites it", where)
    return None


class Draft(Protocol):
    """A save under way."""

    def write(self, file: str, header: bytes, data: memoryview, halfway: Callable[[], None]) -> tuple[int, str]:
        """Writes a file durably; returns its bytes and XXH3-128. `halfway` is called when about half of it is written."""
        ...

    def drop(self, file: str) -> None:
        """Removes a file that was not written completely."""
        ...

    def say(self, rank: int, text: str) -> None:
        """Leaves a rank's note for rank 0."""
        ...

    def said(self, rank: int) -> str | None: ...

    def commit(self, manifest: str, before: Callable[[], None]) -> None:
        """Makes the draft a checkpoint. `before` is called just before; an error that it raises prevents the commit."""
        ...

    def discard(self) -> None: ...


class Place(Protocol):
    """Where checkpoints are written to and read from. `remote`: a read error says nothing about what exists."""

    remote: bool

    def claim(self, attempt: str) -> None:
        """From here on only this attempt commits; unfinished drafts of earlier attempts are removed."""
        ...

    def check(self, attempt: str) -> Claim | None:
        """The current claim, or None. Raises Fenced if it belongs to another attempt."""
        ...

    def draft(self, step: int, attempt: str, number: int) -> Draft: ...

    def commits(self) -> list[Commit]:
        """Committed checkpoints, oldest first, by name alone."""
        ...

    def where(self, commit: Commit) -> str: ...

    def manifest(self, commit: Commit) -> bytes: ...

    def sizes(self, commit: Commit) -> dict[str, int]:
        """Bytes of each file of a checkpoint beside its manifest."""
        ...

    def verify(self, commit: Commit, file: str, expected: str) -> None:
        """Reads a file whole. Raises ValueError: its hash is not the expected one."""
        ...

    def path_of(self, commit: Commit, file: str, expected: str) -> Path:
        """Where this process can read a file of a verified checkpoint."""
        ...

    def set_aside(self, commit: Commit) -> str:
        """Sets a damaged checkpoint aside, so that it no longer counts; returns its new name."""
        ...

    def damaged(self) -> bool:
        """Whether anything was ever set aside here."""
        ...

    def withdraw(self, commit: Commit) -> None:
        """Makes a checkpoint invalid at once; `sweep` removes the remains."""
        ...

    def sweep(self, attempt: str | None) -> None:
        """Removes everything but checkpoints and this attempt's drafts; with None, every draft."""
        ...

    def room(self) -> int | None:
        """Free bytes; None if unknown."""
        ...


def fenced(place: object, attempt: str, holder: Claim) -> Fenced:
    return Fenced(
        f"{place}: attempt {attempt} may not write here any more: attempt {holder.attempt} has taken the run over "
        f"(start number {holder.number}); this process is a leftover and ends"
    )
