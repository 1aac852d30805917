"""Where images with captions come from: OpenMoji's tar, folders, tables, WebDataset tars.

A source lists its samples without decoding a pixel (`entries`), so that splits and mixes can be decided over all of them. It reads the
chosen ones afterwards (`read`), in the order in which they were chosen. Tars larger than `IN_MEMORY` are streamed and keep their own
order; whoever writes WebDataset shards shuffles them then.

Keys: in folders and tars a sample is all files of one key, the name up to its first dot, as in WebDataset. Its image is the member with the
fewest dots (`png` before `depth.png`), its caption, JSON and class are the `.txt` (or `.caption`), `.json` and `.cls` with the image's own
name, else with the key's. In a table a row is a sample, whatever its names.

Everything found is in the source's account: as a sample, or dropped with its place and the reason.
"""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_pipelines.accounts import Account, printable
from data_pipelines.folders import FURTHER, IGNORED, SEVERAL, beside, image_of, is_ignored, list_folder
from data_pipelines.image_decoding import READ_EXTENSIONS, UNREAD_EXTENSIONS
from data_pipelines.shard_lists import is_list, shards_of
from data_pipelines.source_spec import SourceSpec
from data_pipelines.tables import TABLE_SUFFIXES, Place, read_table, scalars
from data_pipelines.tars import read_tar
from data_pipelines.text_decoding import (
    NO_CAPTION,
    caption_of,
    json_object,
    label_of,
    plain,
)
from nexus_scale.config.registry import nearest
from nexus_scale.contracts import UserError
from nexus_scale.data.tar_members import TAR_SUFFIXES
from nexus_scale.io.plain_text import TextError, clean_text, decode_text

log = logging.getLogger(__name__)

OPENMOJI = Path(__file__).parent / "openmoji" / "openmoji-32.tar"
OPENMOJI_LICENCE = "CC-BY-SA-4.0"
OPENMOJI_ATTRIBUTION = (
    "All emojis designed by OpenMoji (https://openmoji.org/) - the open-source emoji and icon project. "
    "License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
)
IN_MEMORY = 256 << 20
"""Bytes. The images of tars up to this size are held in memory, so that they can be shuffled."""
MAX_FILE = 1 << 30
MAX_TEXT = 1 << 24
"""Bytes: the largest image file and the largest caption file that are read."""
UNPACKED = 4
"""How many times IN_MEMORY the unpacked images of such tars may take."""

DESCRIBED_BY = ("json", "caption", "txt", "cls")
"""Extensions of the files that describe an image; later ones override earlier ones."""
NO_DESCRIPTION = "no readable .txt or .json beside the image"
OTHER_NAME = "a caption of another name than its image (keys end at the first dot of the name)"
BAD_DESCRIPTION = "a caption, label or JSON that cannot be read"
NO_IMAGE = "a sample without an image"
NO_IMAGE_BESIDE = "a text or JSON without an image beside it"
NO_PATH = "a row without a path"
TIMES = ("start", "end")
"""Columns of seconds, which make a row a part of a recording."""
ODD_LABEL = "a label that is no whole number, where most are"


@dataclass(frozen=True)
class Entry:
    """A sample before its pixels are read.

    Attributes:
        key: unique within its source.
        group: samples of one group stay together when the data are split.
        caption: one line; empty where there is none, and `lacking` says why.
        label: a number, a name, or nothing.
        image: the file, or its bytes; None in a stream.
        extra: whatever else the source says about it.
        place: where to find it in the source, for people: `t.csv:17`, `a.tar:0001.png`, `folder/a.png`.
    """

    key: str
    group: str
    caption: str
    label: int | str | None
    image: Path | bytes | None
    extra: Mapping[str, Any] = field(default_factory=dict)
    place: str = ""
    lacking: str = NO_CAPTION


@dataclass(frozen=True)
class Source:
    """An opened source.

    Attributes:
        entries: its samples; the account counts them as neither used nor dropped yet.
        account: what was read and dropped while the source was listed.
        files: all files whose contents decide what the source gives.
        tars: those of them that are streamed, in order, each with the prefix of its keys.
    """

    spec: SourceSpec
    entries: Sequence[Entry]
    account: Account
    files: Sequence[Path]
    tars: Sequence[tuple[Path, str]] = ()
    streams: bool = False

    @property
    def bad(self) -> Counter[str]:
        """How many samples were dropped as bad while the source was listed, by reason."""
        dropped = self.account.dropped
        return Counter({why: count for why, count in dropped.items() if why not in self.account.harmless})

    def read(self, chosen: Sequence[Entry]) -> Iterator[tuple[Entry, bytes | None]]:
        """Each chosen entry with the bytes of its image, None where its file cannot be read. Streams come first, in their own order."""
        wanted = {entry.key: entry for entry in chosen if entry.image is None}
        for path, start in self.tars if wanted else ():
            for sample in read_tar(path, READ_EXTENSIONS, self.spec.ignore, Account(), UNREAD_EXTENSIONS):
                found = wanted.get(_key(start, sample.key))
                if found is not None:
                    yield found, sample.members[image_of(sample.members, READ_EXTENSIONS)[0]]
        for entry in chosen:
            if entry.image is not None:
                yield entry, entry.image if isinstance(entry.image, bytes) else _read_file(entry.image)


def open_source(
    spec: SourceSpec,
    data_root: Path,
    extensions: frozenset[str] = READ_EXTENSIONS,
    *,
    captions: str = "required",
    label_default: str = "label",
) -> Source:
    """The source that a spec names, listed.

    Args:
        extensions: of the files that count as samples in a folder.
        captions: `required` drops samples without a caption. `auto` keeps them with an empty one, for `require_captions` to decide on
            later; a table without the column then needs labels, or nothing but paths. `none` never needs captions.
        label_default: the label column that may be missing; any other was asked for by name.

    Raises:
        UserError: nothing there, no image in it, or a missing column.
    """
    source = _told(_open(spec, data_root, extensions, captions, label_default))
    return require_captions(source) if captions == "required" else source


def _told(source: Source) -> Source:
    """The source with its spec's `prefix` in all captions, and its `label`. A sample whose caption cannot be read, or has another name,
    stays without one."""
    prefix, label = source.spec.prefix, source.spec.label

    def told(entry: Entry) -> Entry:
        wrong = not entry.caption and entry.lacking not in (NO_CAPTION, NO_DESCRIPTION)
        caption = entry.caption if wrong or prefix in entry.caption else clean_text(f"{prefix} {entry.caption}")
        said = {**entry.extra, "group": label} if label else entry.extra  # what scores call it
        return replace(entry, caption=caption, label=label or entry.label, extra=said)

    return replace(source, entries=[told(entry) for entry in source.entries]) if prefix or label else source


def require_captions(source: Source) -> Source:
    """The source without its samples that lack a caption; its account counts them as dropped.

    Raises:
        UserError: none is left.
    """
    kept = [entry for entry in source.entries if entry.caption]
    for entry in source.entries:
        if not entry.caption:
            source.account.drop(entry.place, entry.lacking)
    if not kept:
        raise UserError(
            f"{source.spec.path}: no image with a caption: {source.account.found()}. If none needs one, set captions to none.",
            3,
        )
    return replace(source, entries=kept)


def _open(spec: SourceSpec, data_root: Path, extensions: frozenset[str], captions: str, label_default: str) -> Source:
    if spec.path == "openmoji":
        values = {**vars(spec), "group_key": "base", "licence": OPENMOJI_LICENCE, "attribution": OPENMOJI_ATTRIBUTION}
        return _tars([OPENMOJI], SourceSpec(**values))
    path = data_root / os.path.expanduser(spec.path)
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError as error:  # the name is too long, or a folder may not be entered
        raise UserError(f"{path}: {error.strerror}; correct the path.", 3) from error
    if not path.exists() and is_list(spec.path):
        files = [name for name in _shards(spec, data_root) if not is_ignored(name.name, spec.ignore)]
        return _tars(files, spec)
    if is_folder and os.path.samefile(path, "/"):
        raise UserError(f"{spec.path}: the root of the file system; name a folder in it.", 3)
    if is_folder:
        return _folder(path, spec, extensions)
    if not is_file:
        near = [name.name for name in sorted(path.parent.iterdir())] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file or folder; {nearest(path.name, near)}.{_here(spec.path)}", 3)
    if path.name.lower().endswith(TAR_SUFFIXES):
        return _tars([path], spec)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return _table(path, spec, extensions, captions, label_default)
    kinds = ", ".join(TABLE_SUFFIXES + TAR_SUFFIXES)
    raise UserError(f"{path}: got a {path.suffix or 'file'}, expected a folder, {kinds}.", 3)


def _here(path: str) -> str:
    """A hint where a source is missing below the data root but exists below the current folder."""
    here = Path(os.path.expanduser(path))
    if here.is_absolute() or not here.exists():
        return ""
    return f" Sources are relative to the data root (--data-root); {here.resolve()} is there: give this path."


def _shards(spec: SourceSpec, data_root: Path) -> list[Path]:
    try:
        return shards_of(spec.path, data_root)
    except UserError as error:
        raise UserError(f"{error}{_here(spec.path)}", error.code) from None


# ---------------------------------------------------------------------------------------- files beside captions


def _folder(path: Path, spec: SourceSpec, extensions: frozenset[str]) -> Source:
    """Images with captions beside them (a.png and a.txt or a.json), in a folder and below it, and the samples of tars among them."""
    account = Account()

    def place_of(file: Path) -> str:
        return f"{path.name}/{file.relative_to(path).as_posix()}"

    images = "png" in extensions
    listing = list_folder(path, extensions, spec.ignore, account, UNREAD_EXTENSIONS if images else ())
    # Only images are read from tars. Where a folder holds nothing else, the job says so.
    if listing.tars and (images or not listing.samples):
        tars = _tars(listing.tars, spec, prefixed=bool(listing.samples), account=account, may_be_empty=True)
    else:
        for tar in listing.tars:
            account.read += 1
            account.drop(place_of(tar), "a tar among media", harmless=True)
        tars = None
    entries, files = (list(tars.entries), list(tars.files)) if tars else ([], [])
    for key, members in listing.samples.items():
        image, further = image_of(members, extensions)
        for other in further:
            account.read += 1
            account.drop(place_of(members[other]), SEVERAL)
        if not image:
            if not further:
                account.read += len(members)
                for member in members.values():
                    account.drop(place_of(member), NO_IMAGE_BESIDE, harmless=True)
            continue
        account.read += 1
        files += [members[image]]
        place = place_of(members[image])
        try:
            described: dict[str, Any] = {}
            for kind in DESCRIBED_BY:
                if name := beside(image, members, kind):
                    files.append(members[name])
                    described |= _described(kind, _read_text(members[name]), spec)
            entries.append(
                _entry(key, described, members[image], spec, place, _lacking(described, members, NO_DESCRIPTION))
            )
        except (OSError, ValueError) as error:
            account.drop(place, BAD_DESCRIPTION, detail=str(error))
    if not entries:
        found = account.found()
        if listing.tars or any(image_of(members, extensions) != ("", []) for members in listing.samples.values()):
            raise UserError(f"{path}: nothing in it can be used: {found}.", 3)
        kinds = ", ".join(sorted(extensions))
        raise UserError(f"{path}: no such files ({kinds}) in it or below; correct the path. Found: {found}.", 3)
    return Source(spec, entries, account, files, tars.tars if tars else (), bool(tars and tars.streams))


def _lacking(described: Mapping[str, Any], members: Collection[str], nothing: str) -> str:
    """Why a sample has no caption, in case it has none."""
    said = [name for name in members if name.rpartition(".")[2] in DESCRIBED_BY]
    return NO_CAPTION if described else OTHER_NAME if said else nothing


def _described(kind: str, data: bytes, spec: SourceSpec) -> dict[str, Any]:
    """The contents of a .txt, .json or .cls, by the names of columns.

    Raises:
        TextError: it cannot be read.
    """
    if kind == "json":
        return json_object(data, spec.encoding or "utf-8")
    text = decode_text(data, spec.encoding or "utf-8")
    if kind in ("txt", "caption"):
        return {spec.caption_column: text}
    number = label_of(text)
    if isinstance(number, str):
        raise TextError(f".cls of {text[:40]!r}, expected a whole number")
    return {spec.label_column: number}


# ----------------------------------------------------------------------------------------------------- tables


def _table(path: Path, spec: SourceSpec, extensions: frozenset[str], captions: str, label_default: str) -> Source:
    """One sample a row. An image may come twice, with two captions; both stay in one split."""
    root = path.parent if spec.root is None else path.parent / os.path.expanduser(spec.root)
    account = Account()

    def starts_row(row: dict[str, Any]) -> bool:
        return str(row.get(spec.path_column, "")).rpartition(".")[2].lower() in extensions

    named = {spec.path_column, spec.caption_column, spec.label_column, spec.group_key or "", *TIMES}
    rows = read_table(path, spec.encoding or "utf-8", account, starts_row, named)
    if rows:
        columns = dict.fromkeys(name for _, row in rows for name in row)
        _require_columns(path, spec, list(columns), captions, label_default)
    entries, times = [], Counter[str]()
    for where, row in rows:
        entry = _row(Place(where, row), root, spec, account, times)
        if entry is not None:
            entries.append(entry)
    keys = Counter(entry.key for entry in entries)
    # a.png and a.jpg in one table are two images: the suffix becomes part of their keys
    entries = [e if keys[e.key] == 1 else replace(e, key=f"{e.key}{Path(str(e.image)).suffix}") for e in entries]
    again = Counter(entry.key for entry in entries)
    entries = [e if again[e.key] == 1 else replace(e, key=f"{e.key}:{e.place}") for e in entries]
    if not entries:
        raise UserError(f"{path}: no row with an image: {account.found()}.", 3)
    images = dict.fromkeys(entry.image for entry in entries if isinstance(entry.image, Path))
    return Source(spec, entries, account, [path, *images])


def _row(place: Place, root: Path, spec: SourceSpec, account: Account, times: Counter[str]) -> Entry | None:
    """The sample of a row; None where the row is dropped."""
    named = place.row.get(spec.path_column)
    if not isinstance(named, str) or not (written := Path(named)).name:
        account.drop(place.where, NO_PATH, detail=repr(named)[:80])
        return None
    if is_ignored(named, spec.ignore):
        account.drop(place.where, IGNORED, harmless=True)
        return None
    times[named] += 1
    key = str(written.with_suffix("")) + (f"-{times[named]}" if times[named] > 1 else "")
    described = {name: value for name, value in place.row.items() if name != spec.path_column}
    try:
        image = root / (os.path.expanduser(named) if named.startswith("~") else written)
        return _entry(key, described, image, spec, place.where, group=named)
    except ValueError as error:
        account.drop(place.where, BAD_DESCRIPTION, detail=str(error))
        return None


def _require_columns(path: Path, spec: SourceSpec, columns: list[str], captions: str, label_default: str) -> None:
    asked = spec.label_column != label_default  # a label is required only where it was asked for
    uncaptioned = captions == "none" or (
        captions == "auto"
        and spec.caption_column == "caption"
        and (spec.label_column in columns or columns == [spec.path_column])
    )
    for option, column, needed in (
        ("path_column", spec.path_column, True),
        ("caption_column", spec.caption_column, not uncaptioned),
        ("label_column", spec.label_column, asked),
        ("group_key", spec.group_key, spec.group_key is not None),
    ):
        if needed and column not in columns:
            coded = any("\0" in name for name in columns)
            what = (
                "its columns contain NUL characters: if it is UTF-16 without a byte-order mark, name its `encoding`"
                if coded
                else nearest(str(column), columns)
            )
            raise UserError(f"{path}: no column {column!r} ({option}); {what}", 3)


# ------------------------------------------------------------------------------------------------- WebDataset


def _tars(
    files: Sequence[Path],
    spec: SourceSpec,
    *,
    prefixed: bool = False,
    account: Account | None = None,
    may_be_empty: bool = False,
) -> Source:
    """Samples with an image, and a caption in `.txt` or in the JSON.

    Args:
        prefixed: whether keys begin with the tar's number even if there is only one tar.
    """
    account = Account() if account is None else account
    entries: list[Entry] = []
    streams = sum(path.stat().st_size for path in files) > IN_MEMORY
    held = 0
    named = [(path, "" if len(files) == 1 and not prefixed else f"{number:05d}-") for number, path in enumerate(files)]
    for path, start in named:
        for key, members, names, place in read_tar(path, READ_EXTENSIONS, spec.ignore, account, UNREAD_EXTENSIONS):
            account.read += 1
            image, further = image_of(members, READ_EXTENSIONS)
            for other in further if image else ():
                account.read += 1
                account.drop(f"{path.name}:{names[other]}", FURTHER, harmless=True)
            try:
                described: dict[str, Any] = {}
                for kind in DESCRIBED_BY:
                    if name := beside(image, members, kind):
                        described |= _described(kind, members[name], spec)
                if not image:
                    reason = SEVERAL if further else NO_IMAGE
                    account.drop(place, reason, detail=", ".join(sorted(members)))
                    continue
                data = None if streams else members[image]
                lacking = _lacking(described, members, NO_CAPTION)
                entries.append(_entry(_key(start, key), described, data, spec, f"{path.name}:{names[image]}", lacking))
            except ValueError as error:
                account.drop(place, BAD_DESCRIPTION, detail=str(error))
                continue
            held += 0 if data is None else len(data)
            if held > UNPACKED * IN_MEMORY:  # compressed far more than images can be
                streams, held = True, 0
                entries = [replace(entry, image=None) for entry in entries]
    if not entries and not may_be_empty:
        raise UserError(f"{spec.path}: no sample with an image: {account.found()}.", 3)
    return Source(spec, entries, account, list(files), named, streams)


def _key(start: str, key: str) -> str:
    """The key with its prefix: two tars may hold the same key."""
    return f"{start}{_writable(key)}"


# ----------------------------------------------------------------------------------------------------- shared


def _entry(
    key: str,
    described: Mapping[str, Any],
    image: Path | bytes | None,
    spec: SourceSpec,
    place: str,
    lacking: str = NO_CAPTION,
    group: str | None = None,
) -> Entry:
    """Raises ValueError for a label that is none."""
    key = _writable(key)
    caption = ""
    try:
        caption = caption_of(described.get(spec.caption_column), spec.encoding or "utf-8")
    except TextError:
        lacking = BAD_DESCRIPTION
    together = described.get(spec.group_key) if spec.group_key else None
    together = None if together is None else plain(together)
    return Entry(
        key=key,
        group=_writable(str(together)) if together not in (None, "") else _writable(group or key),
        caption=caption,
        label=label_of(described.get(spec.label_column)),
        image=image,
        extra={**scalars(dict(described)), **_times(described)},
        place=printable(place),
        lacking=lacking,
    )


def _times(described: Mapping[str, Any]) -> dict[str, str]:
    """The times of a part of a recording that JSON cannot hold (not finite, decimals) as text. If they were left out, the part would
    pass for the whole recording."""
    found = {name: described.get(name) for name in TIMES}
    return {
        name: str(value)
        for name, value in found.items()
        if not isinstance(value, str | int | float | None) or (isinstance(value, float) and not math.isfinite(value))
    }


def _writable(name: str) -> str:
    """A file name as valid UTF-8: other bytes are escaped."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def _read_file(path: Path) -> bytes | None:
    try:
        return None if why_unread(path) else path.read_bytes()
    except OSError:
        return None  # the file has just gone or broken; the caller counts it


def why_unread(path: Path) -> str:
    """Why an image file cannot be read; empty where it can."""
    try:
        if not os.path.isfile(path):
            return "a folder or device" if os.path.exists(path) else "no such file"
        if (size := path.stat().st_size) > MAX_FILE:
            return f"{size} bytes, expected at most {MAX_FILE}"
        with path.open("rb"):
            return ""
    except (OSError, ValueError) as error:  # a name that no file can have
        return str(error)


def _read_text(path: Path) -> bytes:
    """Raises TextError where a file is far too large for a caption."""
    if (size := path.stat().st_size) > MAX_TEXT:
        raise TextError(f"{path.name}: {size} bytes, expected at most {MAX_TEXT}")
    return path.read_bytes()


def drop_odd_labels(sources: Sequence[Source]) -> list[Source]:
    """The sources without samples whose label is a name although more than half of all labels are numbers. Otherwise one damaged label
    would turn all numbers into names and renumber the classes. The accounts count what is dropped."""
    labels = Counter(type(entry.label) for source in sources for entry in source.entries if entry.label is not None)
    if not labels[str] or labels[int] <= labels[str]:
        return list(sources)
    kept = []
    for source in sources:
        for entry in source.entries:
            if isinstance(entry.label, str):
                source.account.drop(entry.place, ODD_LABEL, detail=repr(entry.label)[:80])
        kept.append(replace(source, entries=[one for one in source.entries if not isinstance(one.label, str)]))
    return kept


def label_numbers(entries: Sequence[Entry]) -> dict[Any, int] | None:
    """The class number of each label: numbers stay, names are numbered alphabetically. None where any sample lacks a label."""
    if any(entry.label is None for entry in entries):
        labelled = sum(entry.label is not None for entry in entries)
        if labelled:
            log.warning(
                "%d of %d samples have a label; the field is left out since the others have none",
                labelled,
                len(entries),
            )
        return None
    found = {entry.label for entry in entries}
    if all(isinstance(label, int) for label in found):
        return {label: int(label) for label in sorted(found, key=int)}  # type: ignore[arg-type]
    return {name: number for number, name in enumerate(sorted(found, key=str))}
