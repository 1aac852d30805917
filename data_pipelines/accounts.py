"""An account of everything a job read: used, or dropped with a reason and a place to look it up. Nothing is lost uncounted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nexus_scale.contracts import UserError

MAX_ITEMS = 10_000
"""Dropped items that are listed with their places, a tenth of them harmless ones. All are counted by reason."""


@dataclass
class Account:
    """The items of a source, a shard or a whole job: read = used + dropped, which `check` verifies.

    Attributes:
        read: number of items (rows, files, samples, clips), counted where they are found and not where they are used.
        used: number of items in the output.
        dropped: number of items that are not, by reason.
        items: place and reason of each dropped item, up to MAX_ITEMS, with a `detail` where the reason alone does not say what was found. A
            place is `table.csv:17`, `a.tar:0001.jpg` or `folder/file.png`.
        harmless: reasons that say nothing against the data, such as a hidden file or a rule of the recipe. They do not count as bad.
    """

    read: int = 0
    used: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    items: list[dict[str, Any]] = field(default_factory=list)
    harmless: set[str] = field(default_factory=set)
    _harmless_items: int = field(default=0, repr=False, compare=False)

    def drop(self, place: object, reason: str, *, detail: str = "", count: int = 1, harmless: bool = False) -> None:
        """Counts items that were read and are not used. `count` items at one place share an entry in `items`."""
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
        """Number of items dropped for a reason that is not harmless."""
        return sum(count for reason, count in self.dropped.items() if reason not in self.harmless)

    @property
    def candidates(self) -> int:
        """Number of items that `max_bad` is a share of: all but those dropped for a harmless reason."""
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
        """Verifies that read = used + dropped.

        Raises:
            UserError: an item is neither used nor dropped, or was counted twice; with the figures.
        """
        dropped = sum(self.dropped.values())
        if self.read != self.used + dropped:
            raise UserError(
                f"{job}: read {self.read}, used {self.used}, dropped {dropped}: {abs(self.read - self.used - dropped)} items are "
                f"{'unaccounted for' if self.read > self.used + dropped else 'counted twice'}. This is a bug in the job, not in the "
                "data; please report it with this line.",
                3,
            )

    def check_bad(self, job: str, max_bad: float) -> None:
        """Verifies that at most `max_bad` of the candidates are bad.

        Raises:
            UserError: more are bad; names the most common reasons and the first place of each.
        """
        if self.bad > max_bad * self.candidates:
            raise UserError(
                f"{job}: {self.bad} of {self.candidates} samples are bad, more than max_bad={max_bad:g} allows: {self.said()}. Correct "
                "the source, or raise max_bad to leave them out.",
                3,
            )

    def said(self, most: int = 5) -> str:
        """The most common reasons for bad items on one line, each with its count and first place."""
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
        """What was found where nothing could be used, on one line."""
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
        """The account that `to_json` wrote, such as a worker's note."""
        return cls(
            read=int(body["read"]),
            used=int(body["used"]),
            dropped=Counter(body["dropped"]),
            items=list(body["items"]),
            harmless=set(body["harmless"]),
        )


def printable(text: str) -> str:
    """A name that can be written to any file or terminal: control characters and invalid UTF-8 are escaped."""
    if text.isascii() and text.isprintable():
        return text
    shown = text.encode("utf-8", "backslashreplace").decode()
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in shown)
