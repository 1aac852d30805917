"""Everything that a job reads is used or dropped with its reason and place; the account says so or ends the job."""

from __future__ import annotations

import json

import pytest

from data_pipelines import accounts
from data_pipelines.accounts import Account
from nexus_scale.contracts import UserError


def test_an_account_adds_up_or_ends_the_job() -> None:
    account = Account(read=4, used=2)
    account.drop("t.csv:3", "a row without a path")
    with pytest.raises(UserError, match=r"job: read 4, used 2, dropped 1: 1 items are unaccounted for"):
        account.check("job")
    account.drop("photos/.DS_Store", "a hidden file", harmless=True)
    account.check("job")
    account.used += 1
    with pytest.raises(UserError, match="counted twice"):
        account.check("job")


def test_accounts_of_shards_sum_up_and_survive_json() -> None:
    one, two = Account(read=3, used=2), Account(read=2, used=1)
    one.drop("a:1", "torn")
    two.drop("b:1", "torn")
    sent = [Account.of_json(json.loads(json.dumps(each.to_json()))) for each in (one, two)]
    total = Account.merged(sent)
    total.check("job")
    assert total.to_json() == {
        "read": 5,
        "used": 3,
        "dropped": {"torn": 2},
        "harmless": [],
        "items": [{"place": "a:1", "reason": "torn"}, {"place": "b:1", "reason": "torn"}],
        "items_not_listed": 0,
    }


def test_only_what_is_bad_counts_against_max_bad() -> None:
    account = Account(read=12, used=9)
    account.drop("x/.DS_Store", "a hidden file", count=2, harmless=True)
    account.drop("x/a.png", "torn")
    account.check_bad("job", 0.1)
    with pytest.raises(
        UserError, match=r"1 of 10 samples are bad, more than max_bad=0\.09 .*1 x torn \(first: x/a\.png\)"
    ):
        account.check_bad("job", 0.09)


def test_places_are_bounded_and_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "MAX_ITEMS", 2)
    account = Account(read=3)
    for number in range(3):
        account.drop(f"\udcff\x1b[31m{number}", "torn")
    body = account.to_json()
    assert body["items_not_listed"] == 1
    assert [item["place"] for item in body["items"]] == ["\\udcff\\x1b[31m0", "\\udcff\\x1b[31m1"]
    json.dumps(body, ensure_ascii=False).encode()
    account.check("job")
