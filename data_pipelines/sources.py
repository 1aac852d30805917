"""Where images with captions come from: OpenMoji's tar, folders, tables, WebDataset tars.

A source lists its samples without decoding a pixel (`entries`), so that splits and mixes are decided on all of them,
and reads the chosen ones afterwards (`read`), in the order in which they were chosen. Tars above `IN_MEMORY` are
streams: they keep their own order, which WebDataset's makers shuffle when they write.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import IMAGE_EXTENSIONS
from nexus_scale.data.shards import read_samples
from nexus_scale.registry import nearest

log = logging.getLogger(__name__)

OPENMOJI = Path(__file__).parent / "openmoji" / "openmoji-32.tar"
OPENMOJI_LICENCE = "CC-BY-SA-4.0"
OPENMOJI_ATTRIBUTION = (
    "All emojis designed by OpenMoji (https://openmoji.org/) - the open-source emoji and icon project. "
    "License: CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/)"
)
IN_MEMORY = 256 << 20
"""Bytes of tars up to which their images are held in memory, so that they can be shuffled."""

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class SourceSpec:
    """How a recipe names a source.

    Attributes:
        path: `openmoji`; a folder of images with captions beside them (a.png and a.txt or a.json); a folder of tars; a
            CSV, TSV, JSONL or Parquet table; a WebDataset tar, or a pattern of them (`laion/*.tar`).
        weight: its share in a mix of sources. Without weights everything is taken.
        path_column, caption_column, label_column: columns of a table, keys of a JSON. A label may be missing.
        group_key: key of the JSON (column of the table) by which samples stay together when they are split.
        root: folder that a table's paths start from; the table's own folder without it.
    """

    path: str
    weight: float | None = None
    path_column: str = "path"
    caption_column: str = "caption"
    label_column: str = "label"
    group_key: str | None = None
    root: str | None = None
    licence: str = ""
    attribution: str = ""

    @classmethod
    def of(cls, value: str | Mapping[str, Any]) -> SourceSpec:
        """From a recipe's text or mapping.

        Raises:
            UserError: an unknown key, or none that says where it is.
        """
        values = {"path": value} if isinstance(value, str) else dict(value)
        known = [each.name for each in fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f"ingest_images: source: unknown key {key!r}; {nearest(str(key), known)}")
        if not isinstance(values.get("path"), str) or not values["path"]:
            raise UserError(f"ingest_images: source {value!r}: expected `path`: openmoji, a folder, a table or a tar.")
        weight = values.get("weight")
        if weight is not None and not (isinstance(weight, int | float) and 0 < weight < float("inf")):
            raise UserError(
                f"ingest_images: source {values['path']}: weight is {weight!r}, expected a positive number."
            )
        return cls(**values)


@dataclass(frozen=True)
class Entry:
    """A sample before its pixels are read.

    Attributes:
        key: unique within its source.
        group: what keeps it together with others when data are split.
        label: a number, a name, or nothing.
        image: the file, its bytes, or None where it lies in a stream.
        extra: what else its source says about it.
    """

    key: str
    group: str
    caption: str
    label: int | str | None
    image: Path | bytes | None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """An opened source. `bad` counts what was left out while listing, by reason; `files` are all whose contents decide what it gives."""

    spec: SourceSpec
    entries: Sequence[Entry]
    bad: Counter[str]
    files: Sequence[Path]
    streams: bool = False

    def read(self, chosen: Sequence[Entry]) -> Iterator[tuple[Entry, bytes | None]]:
        """Each chosen entry with its image's bytes, or None where its file cannot be read. Streams keep their order."""
        if not self.streams:
            for entry in chosen:
                yield entry, entry.image if isinstance(entry.image, bytes) else _read_file(entry.image)
            return
        wanted = {entry.key: entry for entry in chosen}
        for number, path in enumerate(self.files):
            for key, members in read_samples(path):
                found = wanted.get(_stream_key(number, key, len(self.files)))
                if found is not None:
                    yield found, members[_image_member(members)]


def open_source(spec: SourceSpec, data_root: Path, extensions: frozenset[str] = IMAGE_EXTENSIONS) -> Source:
    """Lists a source.

    Args:
        extensions: of the files that count in a folder.

    Raises:
        UserError: nothing there, no image in it, a missing column.
    """
    if spec.path == "openmoji":
        values = {**vars(spec), "group_key": "base", "licence": OPENMOJI_LICENCE, "attribution": OPENMOJI_ATTRIBUTION}
        return _tars([OPENMOJI], SourceSpec(**values))
    path = data_root / spec.path
    if any(sign in spec.path for sign in "*?["):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not files or not all(name.name.endswith(TAR_SUFFIXES) for name in files):
            raise UserError(f"{path}: got {len(files)} files by this pattern, expected tars; correct the pattern.", 3)
        return _tars(files, spec)
    if path.is_dir():
        tars = sorted(name for name in path.iterdir() if name.name.endswith(TAR_SUFFIXES))
        return _tars(tars, spec) if tars else _folder(path, spec, extensions)
    if not path.is_file():
        near = [name.name for name in sorted(path.parent.iterdir())] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file or folder; {nearest(path.name, near)}.", 3)
    if path.name.endswith(TAR_SUFFIXES):
        return _tars([path], spec)
    if path.suffix.lower() in TABLE_SUFFIXES:
        return _table(path, spec)
    kinds = ", ".join(TABLE_SUFFIXES + TAR_SUFFIXES)
    raise UserError(f"{path}: got a {path.suffix or 'file'}, expected a folder, {kinds}.", 3)


# ---------------------------------------------------------------------------------------- files beside captions


def _folder(path: Path, spec: SourceSpec, extensions: frozenset[str]) -> Source:
    """a.png with a.txt or a.json beside it, in this folder and below it."""
    images = sorted(
        name for name in path.rglob("*") if name.suffix.lower().lstrip(".") in extensions and name.is_file()
    )
    if not images:
        raise UserError(f"{path}: no such files ({', '.join(sorted(extensions))}) in it or below; correct the path.", 3)
    bad: Counter[str] = Counter()
    entries = []
    seen: set[str] = set()
    for image in images:
        key = image.relative_to(path).with_suffix("").as_posix()
        described = _beside(image, spec)
        if described is None:
            bad["no readable .txt or .json beside the image"] += 1
        elif key in seen:
            bad["two images of one name"] += 1
        else:
            seen.add(key)
            entries.append(_entry(key, described, image, spec))
    beside = [image.with_suffix(suffix) for image in images for suffix in (".txt", ".json")]
    return _checked(spec, entries, bad, [*images, *(file for file in dict.fromkeys(beside) if file.is_file())])


def _beside(image: Path, spec: SourceSpec) -> dict[str, Any] | None:
    try:
        if (text := image.with_suffix(".txt")).is_file():
            caption = text.read_text(encoding="utf-8")
            beside = image.with_suffix(".json")
            return {**(_mapping(beside.read_bytes()) if beside.is_file() else {}), spec.caption_column: caption}
        return _mapping(image.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None  # counted by the caller


def _mapping(data: bytes) -> dict[str, Any]:
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    return value


# ----------------------------------------------------------------------------------------------------- tables


def _table(path: Path, spec: SourceSpec) -> Source:
    """A row an image. The same image may come twice, with two captions; both stay in one split."""
    root = path.parent if spec.root is None else path.parent / spec.root
    entries, times = [], Counter[str]()
    rows, bad = _rows(path)
    if rows:
        _require_columns(path, spec, list(rows[0]))
    for row in rows:
        place = row.get(spec.path_column)
        if not isinstance(place, str) or not place:
            bad["a row without a path"] += 1
            continue
        times[place] += 1
        key = str(Path(place).with_suffix("")) + (f"-{times[place]}" if times[place] > 1 else "")
        described = {name: value for name, value in row.items() if name != spec.path_column}
        entries.append(_entry(key, described, root / place, spec, group=place))
    keys = Counter(entry.key for entry in entries)
    # a.png and a.jpg of one table are two images; each gets its suffix into its key
    entries = [e if keys[e.key] == 1 else replace(e, key=f"{e.key}{Path(str(e.image)).suffix}") for e in entries]
    return _checked(spec, entries, bad, [path, *dict.fromkeys(e.image for e in entries if isinstance(e.image, Path))])


def _rows(path: Path) -> tuple[list[dict[str, Any]], Counter[str]]:
    bad: Counter[str] = Counter()
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist(), bad
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{path}: cannot be read as {kind.lstrip('.')}: {error}", 3) from error
    if kind == ".jsonl":
        rows = []
        for line in text.splitlines():
            if line.strip():
                try:
                    rows.append(_mapping(line.encode()))
                except ValueError:
                    bad["a line that is no JSON object"] += 1
        return rows, bad
    return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if kind == ".tsv" else ",")), bad


def _require_columns(path: Path, spec: SourceSpec, columns: list[str]) -> None:
    for option, column in (("path_column", spec.path_column), ("caption_column", spec.caption_column)):
        if column not in columns:
            raise UserError(f"{path}: no column {column!r} ({option}); {nearest(column, columns)}", 3)
    label = None if spec.label_column == "label" else spec.label_column  # only a label that was asked for must be there
    for option, named in (("label_column", label), ("group_key", spec.group_key)):
        if named is not None and named not in columns:
            raise UserError(f"{path}: no column {named!r} ({option}); {nearest(named, columns)}", 3)


# ------------------------------------------------------------------------------------------------- WebDataset


def _tars(files: Sequence[Path], spec: SourceSpec) -> Source:
    """Samples with an image, and a caption in `.txt` or in the JSON."""
    bad: Counter[str] = Counter()
    entries = []
    streams = sum(path.stat().st_size for path in files) > IN_MEMORY
    for number, path in enumerate(files):
        for key, members in read_samples(path):
            image = _image_member(members)
            try:
                described = _mapping(members["json"]) if "json" in members else {}
                if "txt" in members:
                    described[spec.caption_column] = members["txt"].decode()
                if "cls" in members:
                    described[spec.label_column] = int(members["cls"])
            except ValueError:
                bad["a caption, label or JSON that cannot be read"] += 1
                continue
            if not image:
                bad["a sample without an image"] += 1
                continue
            entries.append(
                _entry(_stream_key(number, key, len(files)), described, None if streams else members[image], spec)
            )
    return _checked(spec, entries, bad, files, streams)


def _stream_key(number: int, key: str, files: int) -> str:
    """Keys of different tars may be equal."""
    return key if files == 1 else f"{number:05d}-{key}"


def _image_member(members: Mapping[str, bytes]) -> str:
    """The extension of a sample's image: `png` before `depth.png`; empty where there is none."""
    found = [name for name in members if name.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS]
    return min(found, key=lambda name: (name.count("."), name), default="")


# ----------------------------------------------------------------------------------------------------- shared


def _entry(
    key: str, described: Mapping[str, Any], image: Path | bytes | None, spec: SourceSpec, group: str | None = None
) -> Entry:
    caption, label = described.get(spec.caption_column), described.get(spec.label_column)
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, str) and label.strip().lstrip("-").isdigit():
        label = int(label)
    together = described.get(spec.group_key) if spec.group_key else None
    extra = {name: value for name, value in described.items() if isinstance(value, str | int | float | bool)}
    return Entry(
        key=key,
        group=str(together) if together not in (None, "") else (group or key),
        caption=" ".join(caption.split()) if isinstance(caption, str) else "",
        label=label if isinstance(label, int | str) and label != "" else None,
        image=image,
        extra=extra,
    )


def _checked(
    spec: SourceSpec, entries: list[Entry], bad: Counter[str], files: Sequence[Path], streams: bool = False
) -> Source:
    kept = [entry for entry in entries if entry.caption]
    if len(kept) < len(entries):
        bad["an empty or missing caption"] += len(entries) - len(kept)
    if not kept:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in bad.items()) or "it is empty"
        raise UserError(f"{spec.path}: no image with a caption: {reasons}.", 3)
    return Source(spec, kept, bad, files, streams)


def _read_file(path: Path | None) -> bytes | None:
    assert path is not None
    try:
        return path.read_bytes() if os.path.isfile(path) else None
    except OSError:
        return None  # counted by the caller as a file that cannot be read


def label_numbers(entries: Sequence[Entry]) -> dict[Any, int] | None:
    """Number of each label: numbers stay, names are numbered by the alphabet. None where a sample has no label."""
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
