"""Samples of WebDataset tars, whoever wrote them, with an account of every member. Hidden files, links and foreign members are left out.

The members of a sample are neighbours and share a key, the name up to its first dot. Where several archives were written into one
file, their keys may repeat. Of a damaged file, everything before the damage is used; the damage is counted and reported.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipelines.accounts import Account
from data_pipelines.folders import DESCRIPTIONS, FOREIGN, HIDDEN, IGNORED, UNREAD, is_hidden, is_ignored, split_key
from nexus_scale.data.manifest import DataError
from nexus_scale.data.tar_members import Limits, read_members

DAMAGED = "a damaged tar: what follows in it is lost"
NO_FILE = "a member that is no regular file, or whose name is none"
MAX_MEMBER = 1 << 30
"""Bytes."""
REPEATED = "a key that came before (members of a sample must be neighbours)"


class TarSample(NamedTuple):
    """A sample of a tar: its key (with the number of the archive before it, except in the first), members and their names by extension,
    and its place."""

    key: str
    members: dict[str, bytes]
    names: dict[str, str]
    place: str


def read_tar(
    path: Path, kinds: Collection[str], ignore: Collection[str], account: Account, unread: Collection[str] = ()
) -> Iterator[TarSample]:
    """The samples of a tar, in order: those with members of `kinds` or descriptions (txt, json, cls).

    Args:
        account: counts members outside of samples as read and dropped; the caller counts samples.
        unread: extensions that count as bad; other kinds are harmless.
    """

    def left_out(name: str, reason: str, detail: str = "", harmless: bool = True) -> None:
        account.read += 1
        account.drop(f"{path.name}:{name}", reason, detail=detail, harmless=harmless)

    def wanted(name: str) -> bool:
        return _kind(name) in kinds or _kind(name) in DESCRIPTIONS

    seen: set[str] = set()
    current: TarSample | None = None
    last = ""
    try:
        for archive, name, data, problem in read_members(path, Limits(kept_bytes=MAX_MEMBER), wanted):
            last = name
            parts = name.split("/")
            key, extension = split_key(name)
            if problem:
                left_out(name, NO_FILE, problem, harmless=False)
                continue
            if any(is_hidden(part) for part in parts if part not in (".", "")):
                left_out(name, HIDDEN)
                continue
            if ignore and is_ignored(name, ignore):
                left_out(name, IGNORED)
                continue
            if data is None or not parts[-1].partition(".")[0]:
                reason = UNREAD if _kind(name) in unread else FOREIGN
                left_out(name, reason, harmless=reason == FOREIGN)
                continue
            key = f"{archive}:{key}" if archive else key
            if current is None or key != current.key:
                if current is not None:
                    yield current
                    current = None
                if key in seen:
                    left_out(name, REPEATED, harmless=False)
                    continue
                seen.add(key)
                current = TarSample(key, {}, {}, f"{path.name}:{name}")
            if extension in current.members:
                left_out(name, REPEATED, harmless=False)
                continue
            current.members[extension], current.names[extension] = data, name
        if current is not None:
            yield current
    except (DataError, OSError) as error:
        if current is not None:
            yield current
        left_out(last or "(its beginning)", DAMAGED, str(error), harmless=False)


def _kind(name: str) -> str:
    return split_key(name)[1].rpartition(".")[2]
