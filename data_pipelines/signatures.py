"""Whether a job's input has changed: hashes of its files, remembered so that a check need not read them again.

A file is known by its XXH3-128. A job writes the hashes of everything it read into its report, by name. A rerun compares them and makes
the data again where one differs. `signatures.json` beside the report remembers each hash with the file's size, modification time and
inode; while these three stay, the file is not read again. So a rerun without changes costs one `stat` a file. A file that was only
touched or copied is read once and found equal, and an edit that keeps the size is found, too. Only an edit in place that keeps size and
time (`touch -r`) is missed: touch the file, or delete `signatures.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from nexus_scale.contracts import UserError
from nexus_scale.data.manifest import canonical_json, hash_file
from nexus_scale.io.durable import atomic_write

MEMORY = "signatures.json"
RECORD = "made_from.json"
"""The record of what a folder was made from and how, for jobs that write no report."""
REPORT = "ingest_report.json"
"""The report of the ingest jobs."""
MISSING = ""
"""The hash of a file that does not exist."""
THREADS = 8
OFF: tuple[Any, ...] = ([], None, False, "")
"""Values that switch an option off."""
SHIPPED = Path(__file__).parent

Contents = Mapping[str, str]
"""Hash by name."""


class Signatures:
    """Hashes of files, with those that the output folder remembers.

    Args:
        folder: the job's output, which need not exist yet.
        root: the data root; files below it are named relative to it, so that it can be moved.
    """

    def __init__(self, folder: Path, root: Path):
        self.memory, self.root = folder / MEMORY, root
        entries = read_record(self.memory).items()
        self._known = {name: mark for name, mark in entries if isinstance(mark, list) and len(mark) == 4}
        self._asked: set[str] = set()
        self._fresh = False

    def of(self, files: Iterable[Path]) -> dict[str, str]:
        """Hash of each file by its name; `MISSING` where there is none.

        Raises:
            UserError: a file that cannot be read.
        """
        paths = {self.name(path): path for path in files}
        marks = {name: _mark(path) for name, path in paths.items()}
        changed = [name for name, mark in marks.items() if mark is not None and self._known.get(name, [])[:3] != mark]
        with ThreadPoolExecutor(THREADS) as pool:
            for name, digest in zip(changed, pool.map(lambda name: _hash(paths[name]), changed), strict=True):
                mark = marks[name]
                assert mark is not None, name
                self._known[name] = [*mark, digest]
        self._fresh = self._fresh or bool(changed)
        self._asked |= set(marks)
        return {name: MISSING if mark is None else self._known[name][3] for name, mark in marks.items()}

    def name(self, path: Path) -> str:
        """A file's name in reports: relative to the data root, or to this package if it ships with it; otherwise the whole path."""
        for root in (self.root, SHIPPED):
            if path.is_relative_to(root):
                path = path.relative_to(root)
                break
        return path.as_posix().encode("utf-8", "backslashreplace").decode()  # names of files need not be UTF-8

    def save(self) -> None:
        """Remembers the hashes. If the disk refuses them, they are computed again next time."""
        if self._fresh and self.memory.parent.is_dir():
            with contextlib.suppress(OSError):
                known = {name: mark for name, mark in self._known.items() if name in self._asked}
                atomic_write(self.memory, json.dumps(known, separators=(",", ":")))
                self._fresh = False


def differences(before: Contents, now: Contents) -> str:
    """What changed, on one line: how many files were edited, added and removed, with an example of each."""
    kinds = {
        "edited": [name for name in now if name in before and before[name] != now[name]],
        "added": [name for name in now if name not in before],
        "removed": [name for name in before if name not in now],
    }
    return ", ".join(f"{len(names)} {kind} (such as {names[0]})" for kind, names in kinds.items() if names)


class Record:
    """The record of what a folder was made from and how, for jobs that write no report.

    Args:
        options: everything else that decides the bits of the output, as JSON.
        files: that the job reads.
        name: of the record, where several records share a folder.
    """

    def __init__(self, folder: Path, root: Path, options: Mapping[str, Any], files: Sequence[Path], name: str = RECORD):
        self.file = folder / name
        self.options = json.loads(canonical_json(dict(options)))
        self.signatures = Signatures(folder, root)
        self.contents = self.signatures.of(files)

    def fits(self) -> bool:
        """Whether the folder was made from these files with these options. A folder without a record, from an older version, passes."""
        if not self.file.is_file():
            return True
        before = read_record(self.file)
        kept, options = before.get("contents"), before.get("options")
        if not isinstance(kept, dict) or not isinstance(options, dict):
            return False
        same = not changed_options(options, self.options) and (
            all(kept.get(name) == digest for name, digest in self.contents.items())
        )
        if same:
            self.signatures.save()
        return same

    def refuse_others(self, finished: bool) -> None:
        """Raises UserError where finished data were made with other options, since the data of another recipe would be lost."""
        before = read_record(self.file).get("options")
        if finished and isinstance(before, dict):
            refuse_others(self.file.parent, before, self.options)

    def write(self) -> None:
        """Writes the record, last of all."""
        body = {"options": self.options, "contents": self.contents}
        atomic_write(self.file, json.dumps(body, indent=1))
        self.signatures.save()


def package_record(
    folder: Path,
    root: Path,
    packages: str | Sequence[str] | None,
    *,
    options: Mapping[str, Any] | None = None,
    inside: Sequence[str] = (),
    also: Sequence[Path] = (),
    name: str = RECORD,
) -> Record:
    """The record of a job that reads packages, which are files or folders with files of the patterns `inside`. A package that no longer
    exists is not compared: the data made from it stay."""
    packages = [packages] if isinstance(packages, str) else packages or ()
    sources = [root / each for each in packages]
    files = [
        path for source in sources if source.is_dir() for pattern in inside for path in sorted(source.glob(pattern))
    ]
    return Record(folder, root, options or {}, [*(each for each in sources if each.is_file()), *files, *also], name)


def changed_options(
    before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> list[str]:
    """Names of the options that differ. An option that an older version did not know only counts if it is neither off nor at its
    default."""
    before, now = (json.loads(json.dumps(dict(each))) for each in (before, now))  # tuples become lists
    defaults = json.loads(json.dumps(dict(defaults or {})))
    return sorted(
        key
        for key in {*before, *now}
        if (_differ(before[key], now.get(key)) if key in before else now[key] not in (*OFF, defaults.get(key)))
    )


def _differ(before: Any, now: Any) -> bool:
    """Whether two values of an option differ; mappings, and lists of them, are compared as in `changed_options`."""
    if isinstance(before, dict) and isinstance(now, dict):
        return bool(changed_options(before, now))
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        return any(_differ(old, new) for old, new in zip(before, now, strict=True))
    return bool(before != now)


def refuse_others(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
) -> None:
    """Raises UserError where a folder's data were made with other options: those of another recipe would be lost."""
    if changed := changed_options(before, now, defaults):
        raise UserError(
            f"{folder}: holds data made with other options ({', '.join(changed)} differ); choose another output or move it away.",
            3,
        )


def refuse_foreign(folder: Path, own: str) -> None:
    """Raises UserError where another kind of job made the folder: `own` is the name of this job's report."""
    for name in (REPORT, RECORD):
        if name != own and (folder / name).is_file():
            raise UserError(f"{folder}: holds data of another job ({name}); choose another output or move it away.", 3)


def read_record(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where the file is missing or damaged.

    A report lists millions of files, and names that are not UTF-8 as lone surrogates. `plain_json.read_json` refuses both.
    """
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _mark(path: Path) -> list[int] | None:
    try:
        stat = path.stat()
    except (OSError, ValueError):  # missing, below a file, or a name that no file can have
        return None
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino] if os.path.isfile(path) else None


def _hash(path: Path) -> str:
    try:
        return hash_file(path)
    except OSError as error:
        return f"unreadable: {error.strerror}"  # the job counts it as unreadable
