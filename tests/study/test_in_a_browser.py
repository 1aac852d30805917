"""The page of a study in Chromium: on a wide screen by keyboard, on a phone by touch; clips in step, sounds one at a time.

`NEXUS_SCREENSHOTS=nexus_scale/bench/results NEXUS_STUDY=FOLDER pytest tests/study/test_in_a_browser.py` takes the README's pictures.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from aiohttp.test_utils import TestServer

from nexus_scale.study.answers import Answers, Judgement
from nexus_scale.study.folder import Study
from nexus_scale.study.server import study_application
from nexus_scale.web.access import Access
from tests.browser import Browser, Page, opened
from tests.study.studies import study_of

WIDE, PHONE = (1280, 800), (390, 844)
READY = "!document.getElementById('choose-left').disabled"
CONTRAST = """(() => {
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    const colour = getComputedStyle(e).backgroundColor;
    return /, 0\\)$/.test(colour) ? ground(e.parentElement) : colour;
  };
  const ratio = (e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  };
  const words = [...document.querySelectorAll('p, h1, h2, li, button:enabled, figcaption, .label')];
  return Math.min(...words.filter((e) => e.offsetParent).map(ratio));
})()"""
IN_SIGHT = """[...document.querySelectorAll('#question, .stage > *, #answers button')].filter((e) => !e.hidden).every((e) => {
  const r = e.getBoundingClientRect();
  return r.width > 40 && r.height > 20 && r.x >= 0 && r.y >= 0 && r.right <= innerWidth + 0.5 && r.bottom <= innerHeight + 0.5;
}) && document.documentElement.scrollWidth <= innerWidth"""

Do = Callable[[Browser, str], None]


def seen(study: Study, do: Do) -> list[Judgement]:
    """What a browser did with a study's page, as it was kept."""

    async def run(browser: Browser) -> None:
        async with TestServer(study_application(study, Access())) as server:
            await asyncio.to_thread(do, browser, str(server.make_url("/")))

    with opened() as browser:
        asyncio.run(run(browser))
    answers = Answers(study)
    try:
        return list(answers.judgements())
    finally:
        answers.close()


def begun(browser: Browser, address: str, size: tuple[int, int]) -> Page:
    page = browser.page(address, width=size[0], height=size[1], phone=size == PHONE, stranger=True)
    page.wait("!document.getElementById('begin').disabled")
    assert page.run(CONTRAST) >= 4.5
    return page


def of_pictures(tmp_path: Path) -> Study:
    """A small one; or, for the README's pictures, a copy of the study that is named."""
    if "NEXUS_STUDY" not in os.environ:
        return study_of(tmp_path, count=2, questions=["preference", "following"], checks=())
    shutil.copytree(os.environ["NEXUS_STUDY"], tmp_path / "study", ignore=shutil.ignore_patterns("answers*"))
    return Study(tmp_path / "study")


def picture(page: Page, name: str) -> None:
    if "NEXUS_SCREENSHOTS" in os.environ:
        page.picture(Path(os.environ["NEXUS_SCREENSHOTS"]) / f"{name}.png")


def test_pictures_by_keyboard_and_by_touch(tmp_path: Path) -> None:
    study = of_pictures(tmp_path)

    def do(one: Browser, address: str) -> None:
        page = begun(one, address, WIDE)
        page.run("document.getElementById('begin').focus()")
        page.press("Enter")
        page.wait(READY)
        assert page.run(IN_SIGHT) and page.run(CONTRAST) >= 4.5
        assert page.run("document.activeElement.id") == "question"
        sides = page.run("[...document.querySelectorAll('.stage img')].map((e) => [e.alt, e.naturalWidth > 0])")
        assert sides == [["First sample", True], ["Second sample", True]]
        picture(page, "study_wide")
        shown = page.run("document.querySelector('#left img').src")
        page.press("1")  # the first question
        page.wait("document.getElementById('question').textContent.includes('2 of 2')")
        page.go(address)  # loaded again: the same pair, from its first question
        page.wait(READY)
        assert page.run("document.querySelector('#left img').src") == shown
        page.press("2")
        page.press("0")
        page.wait(f"document.querySelector('#left img').src !== {shown!r} && {READY}")
        page.press("ArrowLeft")
        assert page.run("document.getElementById('left').classList.contains('pointed')")
        page.press("Enter")
        page.press("ArrowRight")
        page.press("Enter")
        assert not page.complaints

        phone = begun(one, address, PHONE)
        phone.touch("#begin")
        phone.wait(READY)
        assert phone.run(IN_SIGHT) and phone.run(CONTRAST) >= 4.5
        picture(phone, "study_phone")
        phone.touch("#choose-right")
        phone.wait("document.getElementById('question').textContent.includes('2 of 2')")
        phone.touch("#choose-tie")
        if len(study.pairs) == 2:
            page.wait("!document.getElementById('end').hidden")
            assert page.run("document.getElementById('count').textContent") == "2 pairs"
        phone.wait("document.querySelector('#progress').textContent.startsWith('2 ')")
        assert not phone.complaints

    first, second, by_touch = seen(study, do)
    side = [{"first": "left", "second": "right"}, {"first": "right", "second": "left"}]  # by whether it is swapped

    def sides(one: Judgement) -> list[str]:
        return [
            side[one.swapped].get(choice, choice) for choice in (one.choices["preference"], one.choices["following"])
        ]

    assert (
        sides(first) == ["right", "tie"] and sides(second) == ["left", "right"] and sides(by_touch) == ["right", "tie"]
    )
    assert first.rater == second.rater != by_touch.rater


FRAMES = "[...document.querySelectorAll('.stage canvas')].map((e) => Number(e.dataset.frame))"
RED = "[...document.querySelectorAll('.stage canvas')].map((e) => e.getContext('2d').getImageData(9, 9, 1, 1).data[0])"


def test_clips_play_in_step_and_sounds_one_at_a_time(tmp_path: Path) -> None:
    moving = study_of(tmp_path / "clips", "clip", count=1, questions=["preference"], checks=(), ties=False)

    def clips(one: Browser, address: str) -> None:
        page = begun(one, address, PHONE)
        page.touch("#begin")
        page.wait(READY)
        assert page.run(IN_SIGHT)
        met = set()
        for _ in range(2000):
            left, right = page.run(FRAMES)
            assert left == right
            met.add(left)
            if len(met) == 6:  # all frames of both, again and again
                break
        assert len(met) == 6
        page.touch("#play")  # pauses
        page.run(
            "(() => { const e = document.getElementById('seek'); e.value = 600; e.dispatchEvent(new Event('input')); })()"
        )
        assert page.run(FRAMES) == [3, 3] and page.run(RED) == [120, 120]
        page.press("0")  # there are no ties here
        page.touch("#choose-left")
        page.wait("!document.getElementById('end').hidden")
        assert not page.complaints

    (kept,) = seen(moving, clips)
    assert kept.choices["preference"] != "tie"
    heard = study_of(tmp_path / "sounds", "sound", count=1, questions=["preference"], checks=())

    def sounds(one: Browser, address: str) -> None:
        page = begun(one, address, WIDE)
        page.press("Tab")
        page.press("Enter")
        page.wait("document.querySelectorAll('.stage .sound').length === 2")
        page.press("2")  # nobody has heard them yet
        page.wait("document.getElementById('task').hidden === false")
        assert page.run("document.getElementById('choose-right').disabled")
        page.press("ArrowLeft")
        page.press(" ")
        page.wait("Number(document.getElementById('seek').value) > 0")
        assert page.run("document.getElementById('play').textContent") == "Pause"
        page.press("ArrowRight")  # the other, from there
        page.wait(READY)
        page.press("2")
        page.wait("!document.getElementById('end').hidden")
        assert not page.complaints

    (kept,) = seen(heard, sounds)
    assert kept.choices["preference"] == ("first" if kept.swapped else "second")
