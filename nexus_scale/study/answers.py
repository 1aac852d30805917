"""What raters were shown and what they chose, in SQLite: an answer is on the disk before anyone is told that it is.

One transaction an answer, journal in a file of its own (WAL), synced at each commit: a kill at any moment, or a power cut, loses at most
the answer that is under way, and its page sends it again.
"""

from __future__ import annotations

import random
import re
import secrets
import sqlite3
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from nexus_scale.contracts import UserError
from nexus_scale.study.folder import ANSWERS, Medium, Pair, Study

OPEN_S = 1800
"""Seconds after which a pair that was shown and not answered is given to others, too."""
MOST_RATERS = 100_000
SIDES = ("left", "right", "tie")

_TABLES = """
CREATE TABLE IF NOT EXISTS study (fingerprint TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS raters (number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, joined REAL NOT NULL);
CREATE TABLE IF NOT EXISTS assignments (
    id TEXT PRIMARY KEY, rater INTEGER NOT NULL REFERENCES raters(number), kind TEXT NOT NULL, item INTEGER NOT NULL,
    swapped INTEGER NOT NULL, given REAL NOT NULL, answered REAL, seconds REAL);
CREATE INDEX IF NOT EXISTS of_a_rater ON assignments (rater, kind);
CREATE INDEX IF NOT EXISTS of_an_item ON assignments (kind, item);
CREATE TABLE IF NOT EXISTS answers (
    assignment TEXT NOT NULL REFERENCES assignments(id), question TEXT NOT NULL, choice TEXT NOT NULL,
    PRIMARY KEY (assignment, question));
"""
_FAILING = "CREATE TEMP TABLE failing (rater INTEGER PRIMARY KEY)"


class Assignment(NamedTuple):
    """One pair that one rater is shown.

    Attributes:
        kind: `pair`; `degraded` and `repeat` are checks.
        item: the pair, of `degraded` the check, by number.
        swapped: whether the second of the pair is on the left; of a check, the spoilt one.
    """

    id: str
    rater: int
    kind: str
    item: int
    swapped: bool


class Judgement(NamedTuple):
    """An answered assignment: `choices` by question are `first`, `second` (of the pair; of a check the good and the spoilt) or `tie`."""

    rater: int
    kind: str
    item: int
    swapped: bool
    seconds: float
    choices: Mapping[str, str]


def checked(judged: Iterable[Judgement]) -> dict[int, list[bool]]:
    """Which checks each rater passed. A spoilt copy must lose in every question; a repeated pair may be a tie once, and not turn round."""
    judged = list(judged)
    first = {(one.rater, one.item): one.choices for one in judged if one.kind == "pair"}
    found: dict[int, list[bool]] = defaultdict(list)
    for one in judged:
        if one.kind == "degraded":
            found[one.rater].append(all(choice == "first" for choice in one.choices.values()))
        elif one.kind == "repeat":
            before = first[one.rater, one.item]
            found[one.rater].append(
                not any({choice, before[name]} == {"first", "second"} for name, choice in one.choices.items())
            )
    return found


def failing(study: Study, checked: Mapping[int, Sequence[bool]]) -> set[int]:
    """Raters who passed too few of their checks: what they answered does not count, and fills no quota."""
    if study.settings.checks is None:
        return set()
    return {rater for rater, passed in checked.items() if sum(passed) < study.settings.checks.passed * len(passed)}


class Answers:
    """The answers of a study; for one thread.

    Raises:
        UserError: they are of other samples or other questions, or the file is none of SQLite's.
    """

    def __init__(self, study: Study):
        self.study = study
        self.file = study.folder / ANSWERS
        self.chance = random.SystemRandom()
        try:
            self._db = sqlite3.connect(self.file, timeout=30, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("PRAGMA foreign_keys=ON")
            with self._transaction():
                for statement in _TABLES.split(";")[:-1]:
                    self._db.execute(statement)
                known = self._db.execute("SELECT fingerprint FROM study").fetchone()
                if known is None:
                    self._db.execute("INSERT INTO study VALUES (?)", (study.fingerprint,))
            self._db.execute(_FAILING)
        except sqlite3.Error as error:
            raise UserError(f"{self.file}: cannot be used: {error}", code=5) from None
        if known is not None and known[0] != study.fingerprint:
            self.close()
            raise UserError(
                f"{self.file}: holds answers about other samples or other questions; change study.yaml back, or make a new study",
                code=3,
            )
        self._note_failing()

    def _note_failing(self, rater: int | None = None) -> None:
        """Notes who fails the checks as of now: all raters, or one."""
        found = failing(self.study, checked(self.judgements(rater)))
        self._db.execute("DELETE FROM failing WHERE ?1 IS NULL OR rater = ?1", (rater,))
        self._db.executemany("INSERT INTO failing VALUES (?)", [(one,) for one in found])

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:  # a full disk may have ended it already
                self._db.execute("ROLLBACK")
            raise

    # -------------------------------------------------------------------------------------------- raters

    def join(self) -> str | None:
        """A new rater's secret name; None where the study has too many."""
        name = secrets.token_hex(16)
        with self._transaction():
            if self._count("SELECT COUNT(*) FROM raters") >= MOST_RATERS:
                return None
            self._db.execute("INSERT INTO raters (id, joined) VALUES (?, ?)", (name, time.time()))
        return name

    def rater(self, name: str) -> int | None:
        """The number of the rater with that secret name."""
        if not re.fullmatch("[0-9a-f]{32}", name):
            return None
        row = self._db.execute("SELECT number FROM raters WHERE id = ?", (name,)).fetchone()
        return None if row is None else int(row[0])

    def done(self, rater: int) -> int:
        """How many assignments this rater has answered."""
        return self._count("SELECT COUNT(*) FROM assignments WHERE rater = ? AND answered IS NOT NULL", rater)

    def left(self, rater: int) -> int:
        """How many pairs, about, this rater will still be shown."""
        return min(len(self._open_pairs(rater)), self._allowed(rater))

    # -------------------------------------------------------------------------------------------- what is shown

    def assigned(self, rater: int, id: str) -> Assignment | None:
        """An assignment of this rater's, by its id."""
        row = self._db.execute(
            "SELECT id, rater, kind, item, swapped FROM assignments WHERE id = ? AND rater = ?", (id, rater)
        ).fetchone()
        return None if row is None else Assignment(row[0], row[1], row[2], row[3], bool(row[4]))

    def next(self, rater: int) -> Assignment | None:
        """What this rater is to judge: what is open, or a check that is due, or a pair with the fewest answers. None at the end."""
        with self._transaction():
            row = self._db.execute(
                "SELECT id FROM assignments WHERE rater = ? AND answered IS NULL ORDER BY given LIMIT 1", (rater,)
            ).fetchone()
            if row is not None:
                self._db.execute("UPDATE assignments SET given = ? WHERE id = ?", (time.time(), row[0]))
                return self.assigned(rater, row[0])
            pairs = self._open_pairs(rater)
            if not pairs or self._allowed(rater) <= 0:
                return None
            made = self._check(rater) or self._pair(rater, pairs)
            self._db.execute(
                "INSERT INTO assignments (id, rater, kind, item, swapped, given) VALUES (?, ?, ?, ?, ?, ?)",
                (*made, time.time()),
            )
        return made

    def _allowed(self, rater: int) -> int:
        if (most := self.study.settings.per_rater) is None:
            return len(self.study.pairs)
        return most - self._count("SELECT COUNT(*) FROM assignments WHERE rater = ? AND kind = 'pair'", rater)

    def _open_pairs(self, rater: int) -> dict[int, int]:
        """Pairs that this rater has not been shown and that want answers: how many each has, those counted that are under way, and those
        left out of raters who fail their checks."""
        counts = dict.fromkeys(range(len(self.study.pairs)), 0)
        counts |= dict(
            self._db.execute(
                "SELECT item, COUNT(*) FROM assignments WHERE kind = 'pair' AND (answered IS NOT NULL OR given > ?) "
                "AND rater NOT IN (SELECT rater FROM failing) GROUP BY item",
                (time.time() - OPEN_S,),
            )
        )
        seen = {
            row[0]
            for row in self._db.execute("SELECT item FROM assignments WHERE kind = 'pair' AND rater = ?", (rater,))
        }
        wanted = self.study.settings.judgements
        return {item: count for item, count in counts.items() if count < wanted and item not in seen}

    def _pair(self, rater: int, pairs: Mapping[int, int]) -> Assignment:
        fewest = min(pairs.values())
        item = self.chance.choice([item for item, count in pairs.items() if count == fewest])
        return Assignment(secrets.token_hex(12), rater, "pair", item, self.chance.random() < 0.5)

    def _check(self, rater: int) -> Assignment | None:
        """A check, at a place among each `every` assignments that differs from rater to rater."""
        checks = self.study.settings.checks
        if checks is None or not checks.kinds:
            return None
        shown = self._count("SELECT COUNT(*) FROM assignments WHERE rater = ?", rater)
        block, place = divmod(shown, checks.every)
        if place != random.Random(f"{self.study.fingerprint} {rater} {block}").randrange(1, checks.every):
            return None
        kind = checks.kinds[(block + rater) % len(checks.kinds)]
        id = secrets.token_hex(12)
        if kind == "degraded" and (there := len(self.study.samples.checks)):
            counts = dict.fromkeys(range(there), 0)
            counts |= dict(
                self._db.execute(
                    "SELECT item, COUNT(*) FROM assignments WHERE kind = 'degraded' AND rater = ? GROUP BY item",
                    (rater,),
                )
            )
            fewest = min(counts.values())
            item = self.chance.choice([item for item, count in counts.items() if count == fewest])
            return Assignment(id, rater, kind, item, self.chance.random() < 0.5)
        earlier = self._db.execute(
            "SELECT item, swapped FROM assignments WHERE rater = ? AND kind = 'pair' AND answered IS NOT NULL AND item NOT IN "
            "(SELECT item FROM assignments WHERE rater = ? AND kind = 'repeat') ORDER BY given LIMIT 20",
            (rater, rater),
        ).fetchall()
        if kind != "repeat" or not earlier:
            return None
        item, swapped = self.chance.choice(earlier)
        return Assignment(id, rater, kind, item, not swapped)

    def shown(self, one: Assignment) -> tuple[str, Medium, Medium]:
        """The prompt, and what is on the left and on the right."""
        if one.kind == "degraded":
            check = self.study.samples.checks[one.item]
            prompt, sides = check.prompt, (check.good, check.bad)
        else:
            pair: Pair = self.study.pairs[one.item]
            group = self.study.samples.groups[pair.group]
            prompt, sides = group.prompt, (group.media[pair.first], group.media[pair.second])
        return (prompt, sides[1], sides[0]) if one.swapped else (prompt, *sides)

    # -------------------------------------------------------------------------------------------- answers

    def answer(self, rater: int, id: str, choices: Mapping[str, str], seconds: float) -> bool:
        """Keeps an answer; once it returns, the answer is on the disk. The same answer again changes nothing.

        Args:
            choices: `left`, `right` or `tie` for each question.
        Returns:
            False where the assignment is none of this rater's, or has another answer.
        """
        one = self.assigned(rater, id)
        if one is None:
            return False
        kept = {question: _of_the_pair(choice, one.swapped) for question, choice in choices.items()}
        with self._transaction():
            before = dict(self._db.execute("SELECT question, choice FROM answers WHERE assignment = ?", (id,)))
            if before:
                return before == kept
            self._db.executemany("INSERT INTO answers VALUES (?, ?, ?)", [(id, *each) for each in kept.items()])
            self._db.execute(
                "UPDATE assignments SET answered = ?, seconds = ? WHERE id = ?", (time.time(), seconds, id)
            )
        if one.kind != "pair":
            self._note_failing(rater)
        return True

    def judgements(self, rater: int | None = None) -> Iterator[Judgement]:
        """All answers, or one rater's, in the order in which they came."""
        choices: dict[str, dict[str, str]] = {}
        for id, question, choice in self._db.execute(
            "SELECT assignment, question, choice FROM answers WHERE ?1 IS NULL "
            "OR assignment IN (SELECT id FROM assignments WHERE rater = ?1)",
            (rater,),
        ):
            choices.setdefault(id, {})[question] = choice
        rows = self._db.execute(
            "SELECT id, rater, kind, item, swapped, seconds FROM assignments WHERE answered IS NOT NULL AND (?1 IS NULL OR rater = ?1) "
            "ORDER BY answered, id",
            (rater,),
        )
        for id, rater, kind, item, swapped, seconds in rows:
            yield Judgement(rater, kind, item, bool(swapped), seconds, choices.get(id, {}))

    def _count(self, query: str, *values: object) -> int:
        return int(self._db.execute(query, values).fetchone()[0])


def _of_the_pair(side: str, swapped: bool) -> str:
    if side == "tie":
        return side
    return "first" if (side == "left") is not swapped else "second"
