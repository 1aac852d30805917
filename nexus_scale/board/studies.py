"""Human studies whose folders lie among the runs, for the list."""

from __future__ import annotations

import logging
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from nexus_scale.config.plain_yaml import read_yaml
from nexus_scale.contracts import UserError

log = logging.getLogger(__name__)

SETTINGS, ANSWERS = "study.yaml", "answers.sqlite"


@dataclass(frozen=True)
class Study:
    """A study: what it compares and asks, and how much has been answered."""

    name: str
    folder: Path
    systems: list[str]
    questions: list[str]
    answers: int
    raters: int


def studies_below(root: Path) -> list[Study]:
    """Studies in folders directly below the root, by name; those that cannot be read are left out, and logged."""
    found = []
    for settings in sorted(root.glob(f"*/{SETTINGS}")):
        try:
            found.append(_read(settings))
        except (UserError, OSError, sqlite3.Error) as error:
            log.debug("%s: %s", settings, error)
    return found


def _read(settings: Path) -> Study:
    said, folder = read_yaml(settings), settings.parent
    systems = said.get("systems")
    questions = said.get("questions")
    answers, raters = _counts(folder / ANSWERS)
    return Study(
        name=folder.name,
        folder=folder,
        systems=[str(one) for one in systems] if isinstance(systems, list) else [],
        questions=[str(one.get("text", "")) for one in questions if isinstance(one, dict)]
        if isinstance(questions, list)
        else [],
        answers=answers,
        raters=raters,
    )


def _counts(answers: Path) -> tuple[int, int]:
    """How many answers there are, and of how many raters."""
    if not answers.is_file():
        return 0, 0
    with closing(sqlite3.connect(f"{answers.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0)) as database:
        count, raters = database.execute(
            "SELECT count(*), count(DISTINCT rater) FROM assignments WHERE answered IS NOT NULL"
        ).fetchone()
    return int(count), int(raters)
