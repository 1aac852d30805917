"""A study in front of people: what the server tells a page, many raters at once, a kill in the middle."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientConnectionError, ClientSession, ClientTimeout, CookieJar
from aiohttp.test_utils import TestClient, TestServer

from nexus_scale.study.answers import Answers
from nexus_scale.study.folder import Study
from nexus_scale.study.server import study_application
from nexus_scale.web.access import Access
from tests.distributed import free_port, nexus, nexus_started, until
from tests.study.studies import pictures, study_of


def test_a_page_learns_nothing_of_systems(tmp_path: Path) -> None:
    study = study_of(tmp_path, count=3, questions=["preference", "beauty=Which is <i>nicer</i>?"], every=3)
    secrets = {part for group in study.samples.groups for one in group.media for part in one.parts} | {
        "degraded",
        "thing.png",
        "repeat",
    }

    async def run() -> None:
        server = TestServer(study_application(study, Access()))
        one_browser = TestClient(server, cookie_jar=CookieJar(unsafe=True))
        async with one_browser as client, ClientSession() as other:
            for path in ("/", "/study.js", "/study.css"):
                page = await client.get(path)
                assert page.status == 200 and "'unsafe" not in page.headers["Content-Security-Policy"]
            html = await (await client.get("/")).text()
            assert "http" not in html and "<style" not in html and " style=" not in html and "onclick" not in html
            state = await (await client.get("/state")).json()
            assert state["joined"] is False and [one["name"] for one in state["questions"]] == ["preference", "beauty"]
            assert (await client.post("/answer", json={"pair": "0" * 24, "choices": dict.fromkeys(("preference", "beauty"), "left"),
                                                       "seconds": 1})).status == 403  # fmt: skip
            joined = await client.post("/join", json={})
            cookie = joined.headers["Set-Cookie"]
            assert "HttpOnly" in cookie and "SameSite=Lax" in cookie
            shown, seen = await joined.json(), []
            while shown["pair"]:
                pair = shown["pair"]
                seen.append(pair)
                for side in ("left", "right"):
                    url = pair[side]["parts"][0]
                    media = await client.get(url)
                    assert media.status == 200 and media.headers["Content-Type"] == "image/png"
                    said = str(media.headers) + url + str(pair)
                    assert not [one for one in secrets if one in said] and str(tmp_path) not in said
                    assert (await client.get(url, headers={"Range": "bytes=0-7"})).status == 206
                    assert (await other.get(server.make_url(url))).status == 404  # another's pair
                    for wrong in (
                        url[:-1] + "1",
                        url.replace(side, "up"),
                        url + "/..%2f..%2fstudy.yaml",
                        url.replace("media", "media/.."),
                    ):
                        assert (await client.get(wrong)).status == 404, wrong
                good = {"pair": pair["id"], "choices": {"preference": "left", "beauty": "tie"}, "seconds": 1.5}
                if len(seen) == 1:
                    for change in (
                        {"pair": 3}, {"pair": "' OR 1=1"}, {"pair": "\ud800" * 24}, {"choices": {}}, {"choices": {"preference": "left"}},
                        {"choices": {"preference": "left", "beauty": "up"}}, {"choices": {"preference": "left", "beauty": ["tie"]}},
                        {"choices": None}, {"seconds": "1"}, {"seconds": -1}, {"seconds": None}, {"seconds": 1e999},
                    ):  # fmt: skip
                        assert (await client.post("/answer", json={**good, **change})).status == 400, change
                    assert (await client.post("/answer", json={**good, "pair": "0" * 24})).status == 409
                    again = await (await client.post("/join", json={})).json()
                    assert again["pair"] == pair  # a page that is loaded again goes on
                shown = await (await client.post("/answer", json=good)).json()
                assert (await client.post("/answer", json=good)).status == 200  # sent twice is one
            assert len({pair["id"] for pair in seen}) == len(seen) == shown["done"] >= 4

    asyncio.run(run())
    answers = Answers(study)
    assert len(list(answers.judgements())) >= 4
    answers.close()


RATERS, PAIRS = 50, 5


class Rater:
    """Takes part as the page does: sends an answer again until it is told that it is kept."""

    def __init__(self, address: str, seed: int):
        self.address, self.chance = address, random.Random(seed)
        self.kept: dict[str, str] = {}  # what the server said is kept

    async def insist(self, session: ClientSession, path: str, body: dict[str, Any]) -> Any:
        while True:
            try:
                async with session.post(self.address + path, json=body) as answer:
                    assert answer.status == 200, await answer.text()
                    return await answer.json()
            except (TimeoutError, ClientConnectionError):
                await asyncio.sleep(0.05 + 0.1 * self.chance.random())

    async def take_part(self) -> None:
        async with ClientSession(cookie_jar=CookieJar(unsafe=True), timeout=ClientTimeout(30)) as session:
            shown = await self.insist(session, "/join", {})
            while (pair := shown["pair"]) is not None:
                choice = self.chance.choice(("left", "right", "tie"))
                shown = await self.insist(
                    session, "/answer", {"pair": pair["id"], "choices": {"preference": choice}, "seconds": 1}
                )
                self.kept[pair["id"]] = choice


def on_the_disk(study: Study) -> dict[str, str]:
    """What the file says, read beside whoever else has it open: the side chosen, by pair."""
    with sqlite3.connect(f"file:{study.folder / 'answers.sqlite'}?mode=ro", uri=True, timeout=30) as db:
        rows = db.execute(
            "SELECT id, swapped, choice FROM assignments JOIN answers ON id = assignment WHERE answered IS NOT NULL"
        )
        return {
            id: choice if choice == "tie" else ("left" if (choice == "first") is not bool(swapped) else "right")
            for id, swapped, choice in rows
        }


def test_fifty_raters_and_a_kill_in_the_middle_lose_nothing(tmp_path: Path) -> None:
    """What the server has confirmed before SIGKILL is on the disk; what was under way is sent again and kept once."""
    study = study_of(tmp_path, count=40, questions=["preference"], per_rater=PAIRS, judgements=50, checks=())
    port, folder = free_port(), str(study.folder)
    first, second = tmp_path / "first", tmp_path / "second"
    command = ("study", "serve", folder, "--port", str(port))
    raters = [Rater(f"http://127.0.0.1:{port}", seed) for seed in range(RATERS)]

    async def run() -> None:
        with nexus_started(tmp_path, *command, log=first) as server:
            await asyncio.to_thread(until, lambda: first.exists() and "study at" in first.read_text())
            taking = [asyncio.create_task(one.take_part()) for one in raters]
            while sum(len(one.kept) for one in raters) < RATERS * PAIRS // 3:
                await asyncio.sleep(0.005)
            os.kill(server.pid or 0, signal.SIGKILL)
            confirmed = {id: choice for one in raters for id, choice in one.kept.items()}
            await asyncio.to_thread(server.join)
        kept = on_the_disk(study)
        assert len(confirmed) < RATERS * PAIRS, "all were done before the kill"
        assert confirmed.items() <= kept.items()  # none that was confirmed is lost
        assert (
            len(kept) <= len(confirmed) + RATERS
        )  # and each rater has at most one more, whose confirmation was under way
        with nexus_started(tmp_path, *command, log=second) as server:
            await asyncio.gather(*taking)
            os.kill(server.pid or 0, signal.SIGTERM)
            await asyncio.to_thread(server.join, 60)
            assert server.exitcode == 0 and "Traceback" not in second.read_text()

    asyncio.run(run())
    assert {len(one.kept) for one in raters} == {PAIRS}
    assert on_the_disk(study) == {
        id: choice for one in raters for id, choice in one.kept.items()
    }  # each once, as it was chosen
    answers = Answers(study)
    judged = list(answers.judgements())
    answers.close()
    assert len(judged) == RATERS * PAIRS == len({(one.rater, one.item) for one in judged})
    counts = [sum(one.item == item for one in judged) for item in range(len(study.pairs))]
    assert max(counts) - min(counts) <= 1  # shared out evenly by all of them together


def test_the_commands(tmp_path: Path) -> None:
    a, b = pictures(tmp_path / "a", 2, 200), pictures(tmp_path / "b", 2, 90)
    study = tmp_path / "study"
    code, said = nexus(
        tmp_path, "study", "new", str(a), f"better={b}", "--output", str(study), "--no-ties", "--check", "none"
    )
    assert code == 0 and "2 pairs" in said, said
    for arguments, code, words in (
        (("study", "new", "a", "b", "--output", "study"), 5, "is there already"),
        (("study", "report", "study"), 3, "nobody has judged a pair yet"),
        (("study", "report", "nowhere"), 3, "is no study"),
        (("study", "serve", "study", "--host", "no.such.host.invalid"), 2, "no address of this machine"),
    ):
        got = nexus(tmp_path, *arguments)
        assert got[0] == code and words in got[1] and "Traceback" not in got[1], got


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
