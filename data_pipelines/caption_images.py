"""Captions of pictures by a command of your own: a folder of pictures in, a table of paths and captions out.

    python data_pipelines/caption_images.py --input photos --command "python blip.py" --output photos-captions

The command is run once for each picture without a caption beside it (.txt), with the picture's path as its last argument and without a
shell; what it prints is the caption. Captions that are beside pictures stay as they are. The table, `<output>/captions.jsonl`, is a source
of ingest_images. A rerun asks only for pictures that are new or have changed.
"""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.command import Progress
from data_pipelines.job import Job, Roots
from data_pipelines.options import JobOptions, option
from data_pipelines.signatures import RECORD, Record, read_record, refuse_foreign
from data_pipelines.source_spec import SourceSpec
from data_pipelines.sources import open_source
from nexus_scale.contracts import UserError
from nexus_scale.io.durable import atomic_write
from nexus_scale.io.plain_text import TextError, clean_text, decode_text

TABLE = "captions.jsonl"


class Options(JobOptions):
    """Which pictures, and what says what they show."""

    input: str = option(description="folder of pictures, absolute or below the data root")
    command: str = option(description="program with its arguments; the path of a picture is added as the last one")
    output: str = option(description="folder to make, below the data root")
    seconds: float = option(600.0, gt=0, le=86_400, description="that the command may take for a picture")

    def check(self) -> None:
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise UserError(f"command {self.command!r}: {error}") from None
        if not words:
            raise UserError("command: is empty; expected a program that prints a picture's caption")


def make(options: Options, roots: Roots, progress: Progress | None) -> None:
    """Makes `<output>/captions.jsonl`.

    Raises:
        UserError: no pictures, a command that is not there or fails, or a picture for which it prints nothing.
    """
    folder, record = roots.data_root / options.output, _record(options, roots)
    refuse_foreign(folder, RECORD)
    if _is_made(folder, record):
        return
    known = _known(folder, record)
    entries = _opened(options, roots).entries
    rows = []
    for number, entry in enumerate(entries, start=1):
        assert isinstance(entry.image, Path), "of a folder"
        path = str(entry.image.resolve())
        rows.append({"path": path, "caption": entry.caption or known.get(path) or _asked(options, path)})
        if progress is not None:
            progress(number, len(entries))
    atomic_write(folder / TABLE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    record.write()


def is_made(options: Options, roots: Roots) -> bool:
    """Whether the table is there, of these pictures by this command."""
    return _is_made(roots.data_root / options.output, _record(options, roots))


def _is_made(folder: Path, record: Record) -> bool:
    there = (folder / TABLE).is_file() and record.file.is_file() and record.fits()
    return there and read_record(record.file).get("contents", {}).keys() == record.contents.keys()


def _opened(options: Options, roots: Roots) -> Any:
    source = open_source(SourceSpec(options.input), roots.data_root, captions="auto")
    if source.streams or any(not isinstance(entry.image, Path) for entry in source.entries):
        raise UserError(f"{options.input}: expected a folder of pictures, without tars", 3)
    return source


def _record(options: Options, roots: Roots) -> Record:
    files = list(_opened(options, roots).files)
    return Record(roots.data_root / options.output, roots.data_root, {"command": options.command}, files)


def _known(folder: Path, record: Record) -> Mapping[str, str]:
    """Captions by this command of pictures that are as they were."""
    try:
        before = json.loads(record.file.read_text(encoding="utf-8"))
        if before["options"] != record.options:
            return {}
        same = {name for name, digest in record.contents.items() if before["contents"].get(name) == digest}
        rows = [json.loads(line) for line in (folder / TABLE).read_text(encoding="utf-8").splitlines()]
        return {row["path"]: row["caption"] for row in rows if record.signatures.name(Path(row["path"])) in same}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # nothing is known: everything is asked again


def _asked(options: Options, path: str) -> str:
    """What the command prints of a picture."""
    words = [*shlex.split(options.command), path]
    try:
        found = subprocess.run(
            words, capture_output=True, timeout=options.seconds, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"command {options.command!r} with {path}: {error}", 3) from None
    said = found.stderr.decode("utf-8", "replace").strip()[-300:]
    if found.returncode:
        raise UserError(f"command {options.command!r} with {path}: ended with code {found.returncode}: {said}", 3)
    try:
        caption = clean_text(decode_text(found.stdout))
    except TextError as error:
        raise UserError(f"command {options.command!r} with {path}: {error}", 3) from None
    if not caption:
        raise UserError(
            f"command {options.command!r} with {path}: printed no caption; {said or 'nothing on stderr either'}", 3
        )
    return caption


JOB = Job(__name__, Options, make, is_made)
run, done, main = JOB.run, JOB.done, JOB.main

if __name__ == "__main__":
    raise SystemExit(main())
