"""Samples of WebDataset tars from anywhere, each member accounted for: what is hidden, foreign or a link is left out, the rest goes on.

Members of one key are neighbours. A key is the name up to its first dot; keys of archives that were written into one file one after the
other may be equal. Where a file is damaged, what came before is used, and the damage is counted and told.
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
    """A sample: `key` with the archive's number before it where it is not the first, members by extension, their names, where it lies."""

    key: str
    members: dict[str, bytes]
    names: dict[str, str]
    place: str


def read_tar(
    path: Path, kinds: Collection[str], ignore: Collection[str], account: Account, unread: Collection[str] = ()
) -> Iterator[TarSample]:
    """The samples of a tar that have members of `kinds`, or descriptions of them (txt, json, cls), in order.

    Args:
        account: members that are part of no sample are counted there as read and dropped; samples are the caller's to count.
        unread: extensions that count as bad, where other kinds are harmless.
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
