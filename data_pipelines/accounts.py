"""What became of everything a job read: used, or dropped for a reason and at a place that can be looked up. Nothing vanishes uncounted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nexus_scale.contracts import UserError

MAX_ITEMS = 10_000
"""Dropped items whose places are listed, a tenth of them harmless ones; above it they are still counted by reason."""


@dataclass
class Account:
    """read = used + dropped, over one source, one shard or a whole job; `check` holds a job to it.

    Attributes:
        read: how many items there were: rows, files, samples, clips. Counted where they are found, not where they are used.
        used: how many of them are in the output.
        dropped: how many are not, by reason.
        items: place and reason of each dropped item, up to MAX_ITEMS, and in `detail` what was found there where the reason alone does not
            say it. A place is `table.csv:17`, `a.tar:0001.jpg` or `folder/file.png`.
        harmless: the reasons that say nothing against the data, such as a hidden file or a rule of the recipe; they do not count as bad.
    """

    read: int = 0
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    items: list[dict[str, Any]] = field(default_factory=list)
    harmless: set[str] = field(default_factory=set)
    _harmless_items: int = field(default=0, repr=False, compare=False)

    def drop(self, place: object, reason: str, *, detail: str = "", count: int = 1, harmless: bool = False) -> None:
        """Counts what was read and is not used. `count` items at one place share a line in `items`."""
        self.dropped[reason] += count
        if harmless:
            self.harmless.add(reason)
        item: dict[str, Any] = {"place": printable(str(place)), "reason": reason}
        if detail:
            item["detail"] = printable(detail)[:400]
        if count != 1:
            item["count"] = count
        self._list(item)

    def _list(self, item: dict[str, Any]) -> None:
        harmless = item["reason"] in self.harmless
        if len(self.items) < MAX_ITEMS and not (harmless and self._harmless_items >= max(1, MAX_ITEMS // 10)):
            self.items.append(item)
            self._harmless_items += harmless

    @property
    def bad(self) -> int:
        """How many were dropped for a reason that is not harmless; a job's `max_bad` is a share of `read` less the harmless ones."""
        return sum(count for reason, count in self.dropped.items() if reason not in self.harmless)

    @property
    def candidates(self) -> int:
        """How many items the share of bad ones is taken of: all but those that were left out for a harmless reason."""
        return self.read - (sum(self.dropped.values()) - self.bad)

    def merge(self, *others: Account) -> Account:
        """Adds the others' counts and items to this account, and returns it."""
        for other in others:
            self.read += other.read
            self.used += other.used
            self.dropped.update(other.dropped)
            self.harmless |= other.harmless
            for item in other.items:
                self._list(item)
        return self

    @classmethod
    def merged(cls, accounts: Iterable[Account]) -> Account:
        """The sum of several accounts."""
        return cls().merge(*accounts)

    def check(self, job: str) -> None:
        """Holds the job to read = used + dropped.

        Raises:
            UserError: something that was read is neither used nor dropped (or counted twice); with the figures.
        """
        dropped = sum(self.dropped.values())
        if self.read != self.used + dropped:
            raise UserError(
                f"{job}: read {self.read}, used {self.used}, dropped {dropped}: {abs(self.read - self.used - dropped)} items are "
                f"{'unaccounted for' if self.read > self.used + dropped else 'counted twice'}. This is a fault of the job, not of the "
                "data; please report it with this line.",
                3,
            )

    def check_bad(self, job: str, max_bad: float) -> None:
        """Ends a job whose share of bad items is too large.

        Raises:
            UserError: more than `max_bad` of the candidates are bad; names the commonest reasons, and where each was first met.
        """
        if self.bad > max_bad * self.candidates:
            raise UserError(
                f"{job}: {self.bad} of {self.candidates} samples are bad, more than max_bad={max_bad:g} allows: {self.said()}. Correct "
                "the source, or raise max_bad to leave them out.",
                3,
            )

    def said(self, most: int = 5) -> str:
        """The commonest reasons for bad items in a line, each with its count and its first place."""
        first: dict[str, str] = {}
        for item in self.items:
            detail = f": {item['detail'][:120]}" if "detail" in item else ""
            first.setdefault(item["reason"], f"{item['place'][-120:]}{detail}")
        reasons = [(reason, count) for reason, count in self.dropped.most_common() if reason not in self.harmless]
        return "; ".join(
            f"{count} x {reason}" + (f" (first: {first[reason]})" if reason in first else "")
            for reason, count in reasons[:most]
        )

    def found(self) -> str:
        """What there was instead of anything that could be used, in a line."""
        return self.said() or "; ".join(f"{count} x {reason}" for reason, count in self.dropped.items()) or "nothing"

    def to_json(self) -> dict[str, Any]:
        """For a job's report."""
        return {
            "read": self.read,
            "used": self.used,
            "dropped": dict(sorted(self.dropped.items())),
            "harmless": sorted(self.harmless),
            "items": self.items,
            "items_not_listed": sum(self.dropped.values()) - sum(item.get("count", 1) for item in self.items),
        }

    @classmethod
    def of_json(cls, body: Mapping[str, Any]) -> Account:
        """From `to_json`, such as a worker's note."""
        return cls(
            read=int(body["read"]),
            used=int(body["used"]),
            dropped=Counter(body["dropped"]),
            items=list(body["items"]),
            harmless=set(body["harmless"]),
        )


def printable(text: str) -> str:
    """A name as it can be written to any file or terminal: control characters and what is no UTF-8 are escaped."""
    if text.isascii() and text.isprintable():
        return text
    shown = text.encode("utf-8", "backslashreplace").decode()
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in shown)
