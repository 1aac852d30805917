"""Makes a study: draws with runs and exports, or takes files that are ready, and blinds them."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nexus_scale.contracts import UserError
from nexus_scale.generate.exported import exported_at
from nexus_scale.generate.given import prompt_beside
from nexus_scale.generate.prompts import GRID, draw_prompts, record_of
from nexus_scale.io.plain_text import clean_text
from nexus_scale.run.files import is_run
from nexus_scale.study.folder import (
    MEDIA,
    QUESTIONS,
    Check,
    Checks,
    Group,
    Question,
    Samples,
    Settings,
    Study,
    write_study,
)
from nexus_scale.study.media import LEVELLED, SUFFIXES, Blinded, Read, read_sample, spoilt
from nexus_scale.train import Place

log = logging.getLogger(__name__)

MOST_FILES = 20_000
CHECKS = 8
"""Samples that have a spoilt copy."""
WITHOUT_PROMPT = ("preference",)
WITH_PROMPT = ("preference", "following")


@dataclass(frozen=True)
class System:
    """What is compared: a name, and a folder of samples or the place of a run or an export."""

    name: str
    files: Path | None = None
    place: Place | None = None


@dataclass(frozen=True)
class Wanted:
    """The options of `nexus study new`.

    `questions`: names of `QUESTIONS`, or NAME=WORDS. `wishes`: of drawing, see `generate.prompts.Wishes`.
    """

    prompts: Sequence[str] = ()
    questions: Sequence[str] = ()
    ties: bool = True
    judgements: int = 3
    per_rater: int | None = None
    checks: Sequence[str] = ("degraded",)
    every: int = 10
    passed: float = 0.75
    seed: int = 0
    hardware: Any = None
    wishes: Mapping[str, Any] | None = None


def systems_of(given: Sequence[str], place_of: Callable[[str], Place]) -> list[System]:
    """The systems that a command names: `A`, or `NAME=A` where the folder's own name does not do.

    Args:
        place_of: finds a run or an export.
    Raises:
        UserError: fewer than two, or two of one name.
    """
    found = []
    for one in given:
        name, is_named, where = one.partition("=")
        if not is_named or Path(one).exists():
            name, where = Path(one.rstrip("/")).name or one, one
        folder = Path(where)
        ready = folder.is_dir() and not is_run(folder) and exported_at(folder) is None
        found.append(System(name, files=folder) if ready else System(name, place=place_of(where)))
    names = [one.name for one in found]
    if len(found) < 2:
        raise UserError("expected two systems or more: runs, exports or folders of samples")
    if len(set(names)) < len(names):
        raise UserError(f"two systems are named {max(names, key=names.count)!r}; name them: NAME=FOLDER")
    return found


def new_study(systems: Sequence[System], output: Path, wanted: Wanted) -> Study:
    """Makes a study in a folder that is not there yet. It is whole or not there.

    Raises:
        UserError: samples that do not go together, settings that cannot be, a folder that is there already.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: is there already; choose another folder, or delete it", code=5)
    questions = _questions(wanted)
    _settings(systems, "image", questions, wanted)  # what cannot be is said before minutes of drawing
    with _draft(output) as draft, tempfile.TemporaryDirectory(dir=draft) as drawn:
        folders = [_drawn(one, Path(drawn) / str(i), wanted) for i, one in enumerate(systems)]
        names = _common(systems, folders)
        prompts = _prompts(names, folders, wanted)
        if not questions:
            chosen = WITH_PROMPT if any(prompts) else WITHOUT_PROMPT
            questions = [Question(name=name, text=QUESTIONS[name]) for name in chosen]
        if not all(prompts) and any(one.name == "following" for one in questions):
            raise UserError(
                "--question following: a sample has no prompt that it could follow; leave it out, or give --prompts FILE"
            )
        samples, kind = _blinded(systems, folders, names, prompts, draft, wanted)
        settings = _settings(systems, kind, questions, wanted)
        write_study(draft, settings, samples)
    return Study(output)


@contextmanager
def _draft(output: Path) -> Iterator[Path]:
    """A folder beside the output, which takes its name at the end, or is gone."""
    draft = output.absolute().with_name(f".{output.absolute().name}.{os.getpid()}.partial")
    try:
        (draft / MEDIA).mkdir(parents=True)
        yield draft
        if output.is_dir():
            output.rmdir()
        draft.rename(output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written: {error.strerror or error}", code=6) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _questions(wanted: Wanted) -> list[Question]:
    found = []
    for one in wanted.questions:
        name, has_words, words = one.partition("=")
        if not has_words and name not in QUESTIONS:
            raise UserError(f"--question {one!r}: expected {', '.join(QUESTIONS)}, or your own as NAME='WORDS?'")
        words = clean_text(words) if has_words else QUESTIONS[name]
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name) or not 0 < len(words) <= 300:
            raise UserError(
                f"--question {one[:80]!r}: expected a name of small letters, and 1 to 300 characters of words"
            )
        found.append(Question(name=name, text=words))
    if len({one.name for one in found}) < len(found) or len(found) > 8:
        raise UserError("--question: expected at most 8, each once")
    return found


def _settings(systems: Sequence[System], kind: Any, questions: Sequence[Question], wanted: Wanted) -> Settings:
    checks = Checks(kinds=list(wanted.checks), every=wanted.every, passed=wanted.passed) if wanted.checks else None
    drawn = any(one.place is not None for one in systems)
    return Settings(
        kind=kind,
        systems=[one.name for one in systems],
        questions=list(questions) or [Question(name="preference", text=QUESTIONS["preference"])],
        ties=wanted.ties,
        judgements=wanted.judgements,
        per_rater=wanted.per_rater,
        checks=checks,
        seed=wanted.seed,
        drawn=", ".join(
            [f"seed={wanted.seed}", *(f"{k}={v}" for k, v in (wanted.wishes or {}).items() if v is not None)]
        )
        if drawn
        else "files",
        loudness=LEVELLED if kind == "sound" else None,
    )


def _drawn(system: System, folder: Path, wanted: Wanted) -> Path:
    """A folder with a system's samples: its own, or one that is drawn into, with the same seed for all systems."""
    if system.files is not None:
        return system.files
    assert system.place is not None
    log.info("drawing with %s", system.name)
    wishes = {name: value for name, value in (wanted.wishes or {}).items() if value is not None}
    return draw_prompts(
        system.place, wanted.prompts, output=folder, hardware=wanted.hardware, seed=wanted.seed, **wishes
    )


# ------------------------------------------------------------------------------------------- what goes together


def _listed(folder: Path) -> dict[str, Path]:
    """Samples in a folder, by name without suffix."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in SUFFIXES and file.name != GRID]
    files = [file for file in files if not file.name.startswith(".") and file.is_file()]
    found = {file.stem: file for file in files}
    if len(found) < len(files):
        twice = next(file for file in files if found[file.stem] != file)
        raise UserError(f"{twice}: another file in the folder has the same name with another suffix", code=3)
    return found


def _common(systems: Sequence[System], folders: Sequence[Path]) -> list[str]:
    """Names of samples that all systems have, in order."""
    listed = [_listed(folder) for folder in folders]
    names = sorted(set(listed[0]).intersection(*listed[1:]))
    if not names:
        few = "; ".join(
            f"{one.name}: {', '.join(list(files)[:3]) or 'no sample'}"
            for one, files in zip(systems, listed, strict=True)
        )
        raise UserError(
            f"no sample has the same name in all folders ({few}); files are paired by name without suffix", code=3
        )
    if len(names) * len(systems) > MOST_FILES:
        raise UserError(
            f"{len(names)} samples of {len(systems)} systems: expected at most {MOST_FILES:,} files", code=3
        )
    for one, files in zip(systems, listed, strict=True):
        if len(files) > len(names):
            log.warning("%s: %d samples have no counterpart and are left out", one.name, len(files) - len(names))
    return names


def _prompts(names: Sequence[str], folders: Sequence[Path], wanted: Wanted) -> list[str]:
    """The prompt of each name: of --prompts, of a text file beside the sample, or of the list that `nexus sample` left; or empty."""
    lines = [clean_text(line) for line in wanted.prompts]
    if lines:
        if len(names) % len(lines):
            raise UserError(
                f"--prompts: has {len(lines)} for {len(names)} samples; expected one for each, or for each so many",
                code=3,
            )
        return [lines[i * len(lines) // len(names)] for i in range(len(names))]
    records = [record_of(folder).get("prompts") for folder in folders]
    return [prompt_beside(name, folders, records) for name in names]


def _blinded(
    systems: Sequence[System],
    folders: Sequence[Path],
    names: Sequence[str],
    prompts: Sequence[str],
    draft: Path,
    wanted: Wanted,
) -> tuple[Samples, str]:
    """All samples under random names, and spoilt copies of a few."""
    rng = np.random.default_rng(wanted.seed)
    spoil = set(rng.permutation(len(names))[:CHECKS].tolist()) if "degraded" in wanted.checks else set()
    media, groups, checks, kinds = Blinded(draft / MEDIA), [], [], set()
    listed = [_listed(folder) for folder in folders]
    for number, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        group = [read_sample(files[name]) for files in listed]
        kinds |= {one.kind for one in group}
        if len(kinds) > 1:
            raise UserError(
                f"{name}: a study is of one kind of sample, and here are {' and '.join(sorted(kinds))}", code=3
            )
        groups.append(Group(name=name, prompt=prompt, media=media.add(group)))
        if number in spoil:
            one: Read = group[int(rng.integers(len(group)))]
            good, bad = media.add([one, spoilt(one, rng)])
            checks.append(Check(prompt=prompt, good=good, bad=bad))
    return Samples(systems=[one.name for one in systems], groups=groups, checks=checks), kinds.pop()
