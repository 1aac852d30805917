"""The board: a real server over real folders, asked over HTTP and looked at in a real browser, while runs are written and vanish."""

from __future__ import annotations

import json
import shutil
import sqlite3
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from aiohttp import web

from nexus_scale.board import server
from nexus_scale.board.server import board
from nexus_scale.board.watch import AT_ONCE, Runs
from nexus_scale.callbacks.samples import Sample, Samples
from nexus_scale.callbacks.watchdog import StageClock
from nexus_scale.config.recipe import dump, load_recipe
from nexus_scale.contracts import RunFolder, UserError
from nexus_scale.io import incidents
from nexus_scale.io.rows import RowFile
from nexus_scale.io.stages import stage
from nexus_scale.report.page import write_report
from nexus_scale.web.access import Access
from tests.browser import opened

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"


class Served:
    """A board in a thread, on a free port."""

    def __init__(self, root: Path):
        import asyncio

        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._runner = web.AppRunner(board(root, Access(port=0)), access_log=None)
        self._do(self._runner.setup())
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        self._do(site.start())
        self.address = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    def _do(self, what: Any) -> None:
        import asyncio

        asyncio.run_coroutine_threadsafe(what, self._loop).result(60)

    def close(self) -> None:
        self._do(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        """The status and the text of an answer."""
        request = urllib.request.Request(self.address + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return reply.status, reply.read().decode(errors="replace")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode(errors="replace")

    def news(self, path: str, have: tuple[str, ...] = ()) -> dict[str, Any]:
        """The parts of a page by name, once they are fresh: those that the browser has are None."""
        time.sleep(0.06)  # a page is made at most that often
        status, text = self.get(f"/live{path}{'&' if '?' in path else '?'}have={','.join(have)}")
        assert status == 200, text
        return {one["name"]: one for one in json.loads(text)["parts"]}


def make(root: Path, name: str, *, steps: int = 100, caption: str = "red heart") -> RunFolder:
    """A run folder as a training leaves it, halfway through."""
    run = RunFolder(root / name)
    run.path.mkdir(parents=True)
    recipe = dump(load_recipe("mmdit/tiny_openmoji", {"steps": 2 * steps}, tiny=True))
    run.recipe.write_text(yaml.safe_dump({**recipe, "steps": 2 * steps}))
    rows = [
        {"step": s, "seconds": s / 10, "loss": 10.0 / s, "samples_per_s": 50.0, "time/forward": 0.5} for s in range(10, steps + 1, 10)
    ]  # fmt: skip
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run.path / "validation.jsonl").write_text(json.dumps({"step": steps, "loss": 0.5, "ratio": 0.25}) + "\n")
    scores = {"group_accuracy": 0.625, "real_accuracy": 0.84, "groups": {caption: 0.5, "flags": 0.75}, "frechet": 12.5}
    (run.path / "scores.json").write_text(json.dumps(scores))
    samples = Samples(every=1, draw=None, run=run, stage=StageClock(), context={})
    for step in (steps // 2, steps):
        samples.write(step, [Sample(caption=caption, image=np.full((8, 8, 3), step + i, np.uint8)) for i in range(6)])
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("board") / "runs"
    for name in ("first", "second"):
        make(root, name)
    return root


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patched:  # fresher than people need it
        patched.setattr(server, "FRESH_S", 0.05)
        patched.setattr(server, "EVERY_IDLE_MS", 300)
        served = Served(root)
        yield served
        served.close()


def test_runs_are_listed_with_their_state_and_each_has_the_page_of_its_report(served: Served, root: Path) -> None:
    incidents.note(root / "second", "spike", "the loss rose")
    status, text = served.get("/")
    assert status == 200
    for words in (
        "2 runs",
        "first",
        "second",
        ">new<",
        "100 of 200",
        "0.1</b> loss",
        "0.25</b> validation<",
        "50</b> samples/s",
        "1</b> incidents",
    ):
        assert words in text.replace("&#x27;", "'"), words
    status, page = served.get("/run/second")
    assert status == 200 and "the loss rose" in page and "step 100 of 200" in page
    report = write_report(RunFolder(root / "second")).read_text()
    for part in ("figures", "scores", "curves", "time", "incidents"):
        html = served.news("/run/second")[part]["html"]
        assert html and html in report, f"{part}: the report and the board show the same"
    picture = served.news("/run/second")["samples"]["html"].partition("url(")[2].partition(")")[0]
    with urllib.request.urlopen(served.address + picture) as reply:
        assert reply.headers["Content-Type"] == "image/png" and "immutable" in reply.headers["Cache-Control"]
        assert reply.read() == (root / "second" / "samples" / "step_00000100.png").read_bytes()


def test_what_is_no_run_and_no_sample_of_one_is_not_served(served: Served, root: Path) -> None:
    (root / "first" / "samples" / "secret.txt").symlink_to("/etc/passwd")
    (root / "elsewhere").symlink_to("/etc")
    for path in (
        "/run/nothing", "/live/run/nothing", "/run/..%2Frun", "/run/..", "/run/elsewhere", "/run/.hidden", "/run/%00",
        "/run/first/samples/secret.txt", "/run/first/samples/..%2Frecipe.yaml", "/run/first/samples/nothing.png",
        "/run/..%2F..%2Fx/samples/step_00000100.png", "/board.html", "/run/first/recipe.yaml",
    ):  # fmt: skip
        status, text = served.get(path)
        assert status == 404 and "Traceback" not in text and "root:" not in text, (path, status)
    assert served.get("/", Host="evil.example")[0] == 421
    request = urllib.request.Request(served.address + "/run/first", method="POST", data=b"")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(request)
    for run in ("first", "second"):
        assert not list((root / run).rglob("*.partial")), "the board writes nothing"


def test_a_run_that_is_written_is_followed_and_only_what_changed_is_sent(served: Served, root: Path) -> None:
    run = make(root, "grows")
    rows = RowFile(run.metrics, 100)
    parts = served.news("/run/grows")
    have = tuple(one["mark"] for one in parts.values())
    assert all("html" not in one for one in served.news("/run/grows", have).values()), (
        "nothing changed, nothing is sent"
    )
    with run.metrics.open("ab") as file:
        file.write(b'{"step": 110, "loss": 77')  # half a line
    assert "html" not in served.news("/run/grows", have)["curves"]
    with run.metrics.open("ab") as file:
        file.write(b'.25, "seconds": 11.0}\n')
    fresh = served.news("/run/grows", have)
    assert "77.2" in fresh["figures"]["html"] and "last 77.2" in fresh["curves"]["html"]
    assert "html" not in fresh["ran"] and "html" not in fresh["samples"]
    rows.close()
    RowFile(run.metrics, 50).close()  # the run goes back to step 50
    assert "last 0.2" in served.news("/run/grows")["curves"]["html"]
    with stage(run.path, "score") as progress:
        progress(1, 4)
        time.sleep(1.1)
        assert "score: 1 of 4, 25 %" in served.news("/run/grows")["head"]["html"]
        assert "score: 1 of 4" in served.news("/")["run-grows"]["html"]
    shutil.rmtree(run.path)
    time.sleep(0.06)
    assert served.get("/live/run/grows")[0] == 404
    assert "run-grows" not in served.news("/")
    make(root, "grows")
    assert "last 0.1" in served.news("/run/grows")["curves"]["html"], "another run of the same name is another run"
    shutil.rmtree(run.path)


def test_a_run_that_is_written_and_removed_all_the_time_is_never_an_error(served: Served, root: Path) -> None:
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            run = make(root, "restless", steps=50)
            rows = RowFile(run.metrics, 50)
            for step in range(51, 80):
                rows.append({"step": step, "loss": 1.0})
                rows.extend({"validation/loss": 2.0})
            rows.close()
            shutil.rmtree(run.path)

    worker = threading.Thread(target=work)
    worker.start()
    try:
        found = [
            served.get(path)[0] for _ in range(15) for path in ("/", "/run/restless", "/compare?run=first&run=restless")
        ]
    finally:
        over.set()
        worker.join()
    assert set(found) <= {200, 404} and found[::3] == [200] * 15, found


def test_runs_are_compared_by_step_and_by_time_with_one_colour_each(served: Served) -> None:
    status, text = served.get("/compare?run=first&run=second&run=gone")
    assert status == 200 and "Not here: gone" in text and "2 runs" in text
    assert text.count("var(--a)") > 3 and text.count("var(--b)") > 3
    for words in (
        "Training loss",
        "last 0.1, 0.1",
        "Figures",
        "62.5 %",
        "Newest samples",
        "nexus compare A B",
        "by time instead",
    ):
        assert words in text, words
    timed = served.get("/compare?run=first&run=second&by=time")[1]
    assert "by step instead" in timed and "10 s</span>" in timed
    assert served.get("/compare")[0] == 200
    many = "&".join(f"run=r{i}" for i in range(500))
    assert served.get(f"/compare?{many}")[0] == 200


def test_a_million_rows_open_within_a_second_and_two_hundred_runs_are_listed(tmp_path: Path) -> None:
    long = make(tmp_path, "long")
    block = "".join(
        json.dumps({"step": s, "seconds": s / 10, "loss": 10.0 / s, "lr": 0.001}) + "\n"
        for s in range(10**6, 10**6 + 10**4)
    )
    with long.metrics.open("w") as file:
        for _ in range(100):  # a million lines; their steps repeat, which nothing here reads
            file.write(block)
    assert long.metrics.stat().st_size > 10 * AT_ONCE
    for number in range(199):
        shutil.copytree(tmp_path / "long", tmp_path / f"r{number:03d}", ignore=shutil.ignore_patterns("metrics.jsonl"))
    runs = Runs(tmp_path)
    begun = time.process_time()
    contents, _ = runs.contents("long")
    assert time.process_time() - begun < 1.0
    assert len(contents.metrics) > 1000 and contents.metrics[-1]["step"] == 10**6 + 10**4 - 1
    assert len(runs.listed()) == 200
    begun = time.process_time()
    assert len(runs.listed()) == 200
    assert time.process_time() - begun < 0.5, "what has not changed is not read again"


def test_studies_and_names_from_files_are_shown_and_become_no_markup(tmp_path: Path) -> None:
    make(tmp_path / "runs", "hostile", caption=ATTACK)
    incidents.note(tmp_path / "runs" / "hostile", "spike", ATTACK)
    study = tmp_path / "runs" / "study"
    study.mkdir()
    settings = {
        "version": 1,
        "kind": "image",
        "systems": ["A", ATTACK],
        "questions": [{"name": "preference", "text": "Which?"}],
    }
    (study / "study.yaml").write_text(yaml.safe_dump(settings))
    with sqlite3.connect(study / "answers.sqlite") as database:
        database.execute("CREATE TABLE assignments (rater INTEGER, answered REAL)")
        database.executemany("INSERT INTO assignments VALUES (?, ?)", [(1, 1.0), (2, 1.0), (2, None)])
    served = Served(tmp_path / "runs")
    try:
        listed, page, both = (
            served.get(path)[1] for path in ("/", "/run/hostile", "/compare?run=hostile&run=%3Cscript%3Ex")
        )
    finally:
        served.close()
    assert "2 answers of 2 raters" in listed
    for text in (listed, page, both):
        assert text.count("<script") == 1 and "<img src=x" not in text and "&lt;script&gt;" in text


def test_a_root_that_cannot_be_listed_is_refused_before_anything_is_served(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="expected a folder of runs"):
        board(tmp_path / "file", Access(port=0))
    assert Runs(tmp_path / "nothing").listed() == []


def test_a_browser_sees_runs_grow_moves_the_slider_and_compares(served: Served, root: Path) -> None:
    """On a wide screen and on a phone; no script fails, and the policy blocks nothing."""
    run = make(root, "watched", caption="a person who stands in the rain and holds a very long umbrella")
    with opened() as browser:
        page = browser.page(f"{served.address}/run/watched")
        page.wait("document.querySelector('.over-time output').textContent === 'step 100'")
        page.run("document.querySelector('.over-time input').focus()")
        page.press("ArrowLeft")
        page.wait("document.querySelector('.over-time output').textContent === 'step 50'")
        assert "step_00000050" in page.run("document.querySelector('.over-time img').src")
        page.run("document.querySelector('details').open = true")
        rows = RowFile(run.metrics, 100)
        rows.append({"step": 110, "loss": 77.25})
        rows.close()
        page.wait("document.querySelector('.figures').textContent.includes('77.2')")
        assert page.run("document.querySelector('details').open") is True, "what was open stays open"
        assert page.run("document.querySelector('.over-time output').textContent") == "step 50", (
            "the slider stays where it was put"
        )
        page.point(".plot")
        page.wait("document.querySelector('.told')?.textContent")
        assert page.overflowing() == [] and page.complaints == []

        listed = browser.page(f"{served.address}/", width=390, height=800, phone=True)
        assert listed.overflowing() == [] and listed.run("document.querySelectorAll('.run').length") == 3
        assert listed.run("document.getElementById('chosen').className") == "none"
        for name in ("first", "second"):
            listed.touch(f"input[value={name}]")
        listed.wait("document.getElementById('chosen').textContent === 'Compare 2 runs'")
        shutil.rmtree(run.path)
        listed.wait("document.querySelectorAll('.run').length === 2")
        assert listed.run("[...document.querySelectorAll('input:checked')].length") == 2, (
            "the choice outlives an update"
        )
        page.tell("Page.bringToFront")  # a tab that nobody sees asks for nothing
        page.wait("document.getElementById('fresh').textContent === 'This run is no longer here.'")
        listed.tell("Page.bringToFront")
        listed.touch("#chosen button")
        listed.wait("location.pathname === '/compare' && document.querySelectorAll('.plot').length > 2")
        assert listed.overflowing() == [] and listed.complaints == []
