"""Checkpoints in a folder that all ranks see.

A folder commits by a rename: parts are written and fsynced into `step_00000100.tmp-<attempt>-<n>/`, the manifest last, and the
folder takes its name `step_00000100`. Nothing else ever has that name, so whatever has it is whole, or was damaged later, which
the hashes tell.
"""

from __future__ import annotations

import errno
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from nexus_scale.engine.checkpoint.manifest import MANIFEST, STEP_FOLDER, folder_name
from nexus_scale.engine.checkpoint.places import ATTEMPT, Claim, Commit, claim_from, fenced
from nexus_scale.engine.tensor_file import hash_file, write_file
from nexus_scale.io.durable import atomic_write, fsync_folder

logger = logging.getLogger(__name__)

LATEST = "LATEST"


class Folder:
    """See `places.Place`."""

    remote = False

    def __init__(self, root: Path):
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    # ------------------------------------------------------------------------------------------ who may write

    def _holder(self) -> Claim | None:
        path = self.root / ATTEMPT
        if not path.exists():
            return None
        try:
            return claim_from(path.read_bytes() if path.is_file() else b"", str(path))
        except FileNotFoundError:
            return None

    def claim(self, attempt: str) -> None:
        before = self._holder()
        claim = Claim(attempt, 1 + (before.number if before else 0))
        atomic_write(self.root / ATTEMPT, json.dumps(claim._asdict()))
        self._finish_replacements()
        self.sweep(None)  # this attempt has no drafts yet: any with its name would be taken for its own

    def check(self, attempt: str) -> Claim | None:
        holder = self._holder()
        if holder is not None and holder.attempt != attempt:
            raise fenced(self, attempt, holder)
        return holder

    # ------------------------------------------------------------------------------------------ writing

    def draft(self, step: int, attempt: str, number: int) -> FolderDraft:
        return FolderDraft(self, self.root / folder_name(step), attempt, number)

    def withdraw(self, commit: Commit) -> None:
        path = self.root / commit.name
        path.rename(_unused(f"{path}.pruned"))  # so that a half-deleted folder never looks like a damaged checkpoint

    def sweep(self, attempt: str | None) -> None:
        for path in sorted(self.root.glob("step_*.tmp-*")):
            if attempt is None or not path.name.partition(".tmp-")[2].startswith(f"{attempt}-"):
                logger.info("removing %s, which an earlier attempt left unfinished", path)
                # Renamed first: if its writer wakes up, it has committed everything before this, or commits nothing.
                _rename_if_there(path, _unused(f"{path}.pruned"))
        for path in sorted(self.root.glob("step_*.pruned-*")):
            shutil.rmtree(path, ignore_errors=True)

    def room(self) -> int:
        there = next(folder for folder in (self.root, *self.root.absolute().parents) if folder.is_dir())
        return shutil.disk_usage(there).free

    # ------------------------------------------------------------------------------------------ reading

    def commits(self) -> list[Commit]:
        if not self.root.is_dir():
            return []
        return sorted(
            Commit(int(match[1]), entry.name)
            for entry in self.root.iterdir()
            if (match := STEP_FOLDER.fullmatch(entry.name))
        )

    def where(self, commit: Commit) -> str:
        return str(self.root / commit.name)

    def manifest(self, commit: Commit) -> bytes:
        path = self.root / commit.name / MANIFEST
        if path.exists() and not path.is_file():
            raise ValueError(f"{MANIFEST} is not a regular file")  # reading a pipe would block
        return path.read_bytes()

    def sizes(self, commit: Commit) -> dict[str, int]:
        folder = self.root / commit.name
        return {entry.name: entry.lstat().st_size for entry in folder.iterdir() if entry.name != MANIFEST}

    def verify(self, commit: Commit, file: str, expected: str) -> None:
        _, digest = hash_file(self.root / commit.name / file)
        if digest != expected:
            raise ValueError(f"{file} has XXH3-128 {digest}, the manifest says {expected}")

    def path_of(self, commit: Commit, file: str, expected: str) -> Path:
        return self.root / commit.name / file

    def set_aside(self, commit: Commit) -> str:
        path = self.root / commit.name
        aside = _unused(f"{path}.corrupt")
        path.rename(aside)
        fsync_folder(self.root)
        return aside.name

    def damaged(self) -> bool:
        return self.root.is_dir() and any(self.root.glob("step_*.corrupt-*"))

    def _finish_replacements(self) -> None:
        """Restores a checkpoint that a crash left between the two renames of a replacement."""
        for old in sorted(self.root.glob("step_*.replaced-*")):
            final = self.root / old.name.partition(".")[0]
            if final.exists():
                _rename_if_there(old, _unused(f"{final}.pruned"))
            else:
                old.rename(final)


class FolderDraft:
    """See `places.Draft`."""

    def __init__(self, place: Folder, final: Path, attempt: str, number: int):
        self.place, self.final, self.attempt = place, final, attempt
        self.path = final.with_name(f"{final.name}.tmp-{attempt}-{number}")

    def __str__(self) -> str:
        return str(self.path)

    def write(self, file: str, header: bytes, data: memoryview, halfway: Callable[[], None]) -> tuple[int, str]:
        self.path.mkdir(parents=True, exist_ok=True)  # the whole folder may have been deleted during the run
        return write_file(self.path / file, header, data, halfway)

    def drop(self, file: str) -> None:
        (self.path / file).unlink(missing_ok=True)

    def _note(self, rank: int) -> Path:
        return self.path / f"rank{rank:05d}.json"

    def say(self, rank: int, text: str) -> None:
        if (
            not self.path.is_dir()
        ):  # nothing was written, or rank 0 has discarded it: a lone note would never be removed
            raise FileNotFoundError(errno.ENOENT, "the draft is gone", str(self.path))
        atomic_write(self._note(rank), text, synced=False)  # not needed after a crash of this machine

    def said(self, rank: int) -> str | None:
        try:
            return self._note(rank).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def commit(self, manifest: str, before: Callable[[], None]) -> None:
        for note in self.path.glob("rank*.json"):
            note.unlink()
        atomic_write(self.path / MANIFEST, manifest)
        before()
        old = self.final.with_name(f"{self.final.name}.replaced-{self.attempt}")
        replaces = self.final.exists()  # a run that rolled back reaches this step again
        if replaces:
            self.final.rename(old)
        try:
            self.path.rename(self.final)
        except OSError:
            if replaces:
                old.rename(self.final)
            raise
        fsync_folder(self.place.root)
        for failed in self.place.root.glob(
            f"step_*.tmp-{self.attempt}-*"
        ):  # earlier tries; the next begins after this one
            shutil.rmtree(failed, ignore_errors=True)
        atomic_write(self.place.root / LATEST, self.final.name + "\n")
        if replaces:
            shutil.rmtree(old, ignore_errors=True)

    def discard(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _unused(stem: str) -> Path:
    number = 0
    while (path := Path(f"{stem}-{number}")).exists():
        number += 1
    return path


def _rename_if_there(path: Path, to: Path) -> None:
    try:
        path.rename(to)
    except FileNotFoundError:
        logger.info("%s was removed by another process", path)
