"""The samples in a folder and below it, by key, with an account of every file that belongs to none.

Links to files and folders are followed, and each folder is read once. Hidden files and folders, what a system leaves behind
(`.DS_Store`, `._a.png`, `Thumbs.db`, `__MACOSX`) and files of other kinds are left out and counted. A sample is all files of one key, the
name up to its first dot, as in WebDataset. `a.png`, `a.txt` and `a.json` are one sample, and so are `a.v1.png` and `a.v1.txt`, whose key
is `a`.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from data_pipelines.accounts import Account
from nexus_scale.data.tar_members import TAR_SUFFIXES

HIDDEN = "a hidden file or folder, or one that a system leaves behind"
FOREIGN = "a file of another kind"
TABLE = "a table beside images (name it as a source, and it is read)"
IGNORED = "left out by `ignore`"
BROKEN_LINK = "a link that leads nowhere"
AGAIN = "a folder that was read by another path"
UNREADABLE_FOLDER = "a folder that cannot be read"
UNREAD = "an image of a format that is not read"
SEVERAL = "one of several images under one key (keys end at the first dot of the name)"
FURTHER = "a further image of a sample"

DESCRIPTIONS = frozenset({"txt", "caption", "json", "cls"})
"""Extensions of the files beside an image that describe it."""
TABLES = frozenset({"csv", "tsv", "jsonl", "parquet"})
_SYSTEM = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"})


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or something that a system leaves behind."""
    return name.startswith(".") or name.casefold() in _SYSTEM


def is_ignored(name: str, patterns: Collection[str]) -> bool:
    """Whether a path (with `/`) or its last part, or a folder above it, matches one of the patterns of `ignore`."""
    if not patterns:
        return False
    parts = name.split("/")
    starts = ["/".join(parts[: end + 1]) for end in range(len(parts))]
    return any(fnmatchcase(one, pattern) for pattern in patterns for one in (*starts, *parts))


def split_key(name: str) -> tuple[str, str]:
    """A file's key and extension, split at the first dot of its base name: ("folder/a", "v1.png")."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def image_of(extensions: Collection[str], kinds: Collection[str]) -> tuple[str, list[str]]:
    """The member of a sample that is its image (empty where none is), and the sample's other images.

    `png` wins over `depth.png`. Neither `v1.png` nor `v2.png` wins: there is no image, and both are others.
    """
    found = sorted(
        (one for one in extensions if one.rpartition(".")[2] in kinds), key=lambda name: (name.count("."), name)
    )
    if not found or (len(found) > 1 and "." in found[0]):
        return "", found
    return found[0], found[1:]


def beside(image: str, extensions: Collection[str], kind: str) -> str:
    """The member of a kind that goes with an image: `v1.txt` with `v1.png`, else `png.txt`, else `txt`; empty where there is none."""
    prefix = image.rpartition(".")[0]
    own = f"{prefix}.{kind}" if prefix else kind
    return next((name for name in (own, f"{image}.{kind}", kind) if name in extensions), "")


@dataclass
class Listing:
    """The tars and samples of a folder.

    Attributes:
        tars: paths, in order.
        samples: by key (relative to the folder): paths by extension.
    """

    tars: list[Path] = field(default_factory=list)
    samples: dict[str, dict[str, Path]] = field(default_factory=dict)


def list_folder(
    folder: Path,
    kinds: Collection[str],
    ignore: Collection[str],
    account: Account,
    unread: Collection[str] = (),
) -> Listing:
    """The tars and samples below `folder`. All other files count as read and dropped in `account`; the caller accounts for the rest.

    Args:
        kinds: extensions of the media; `txt`, `json` and `cls` files beside them are kept, too.
        unread: extensions of media that cannot be read. They count as bad; files of other kinds are harmless.
    """
    listing = Listing()
    for name in sorted(_files(folder, ignore, account), key=lambda name: name.split("/")):
        if name.lower().endswith(TAR_SUFFIXES):
            listing.tars.append(folder / name)
            continue
        key, extension = split_key(name)
        kind = extension.rpartition(".")[2]
        if kind in kinds or kind in DESCRIPTIONS:
            members = listing.samples.setdefault(key, {})
            if extension not in members:
                members[extension] = folder / name
                continue
            reason = SEVERAL  # a.png and a.PNG
        else:
            reason = UNREAD if kind in unread else TABLE if kind in TABLES else FOREIGN
        account.read += 1
        account.drop(f"{folder.name}/{name}", reason, harmless=reason in (FOREIGN, TABLE))
    return listing


def _files(root: Path, ignore: Collection[str], account: Account) -> Iterator[str]:
    """The path of every file, relative to `root`. Linked folders come last, so that a folder is found under its own name."""

    def left_out(name: str, reason: str, *, detail: str = "", harmless: bool = True) -> None:
        account.read += 1
        account.drop(f"{root.name}/{name}", reason, detail=detail, harmless=harmless)

    seen: set[tuple[int, int]] = set()
    linked = [""]
    while linked:
        folders, linked = linked[::-1], []
        while folders:
            inside = folders.pop()
            place = os.path.join(root, inside)
            try:
                stat = os.stat(place)
                entries = sorted(os.scandir(place), key=lambda entry: entry.name)
            except OSError as error:
                left_out(inside, UNREADABLE_FOLDER, detail=error.strerror or str(error), harmless=False)
                continue
            if (stat.st_dev, stat.st_ino) in seen:
                left_out(inside, AGAIN)
                continue
            seen.add((stat.st_dev, stat.st_ino))
            for entry in entries:
                name = f"{inside}/{entry.name}" if inside else entry.name
                try:
                    if is_hidden(entry.name):
                        left_out(name, HIDDEN)
                    elif ignore and is_ignored(name, ignore):
                        left_out(name, IGNORED)
                    elif entry.is_dir():
                        (linked if entry.is_symlink() else folders).append(name)
                    elif entry.is_file():
                        yield name
                    elif entry.is_symlink():
                        left_out(name, BROKEN_LINK, harmless=False)
                    else:
                        left_out(name, FOREIGN, detail="a pipe, socket or device")
                except OSError as error:  # a loop of links
                    left_out(name, BROKEN_LINK, detail=error.strerror or str(error), harmless=False)
