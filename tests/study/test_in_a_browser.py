"""The page of a study in Chromium: on a wide screen by keyboard, on a phone by touch; clips in step, sounds one at a time.

`NEXUS_SCREENSHOTS=nexus_scale/bench/results NEXUS_STUDY=FOLDER pytest tests/study/test_in_a_browser.py` takes the README's pictures.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp.test_utils import TestServer

from nexus_scale.study.answers import Answers, Judgement
from nexus_scale.study.folder import Study
from nexus_scale.study.server import study_application
from nexus_scale.web.access import Access
from tests.study import browser
from tests.study.studies import study_of

pytestmark = pytest.mark.skipif(browser.found() is None, reason=f"no browser on the PATH: {', '.join(browser.NAMES)}")

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

Do = Callable[[browser.Browser, str], Awaitable[None]]


def seen(study: Study, do: Do) -> list[Judgement]:
    """What a browser did with a study's page, as it was kept."""

    async def run() -> None:
        async with TestServer(study_application(study, Access())) as server, browser.browser() as one:
            await do(one, str(server.make_url("/")))

    asyncio.run(run())
    answers = Answers(study)
    try:
        return list(answers.judgements())
    finally:
        answers.close()


async def begun(page: browser.Page, address: str) -> None:
    await page.go(address)
    await page.until("!document.getElementById('begin').disabled")
    assert await page.value(CONTRAST) >= 4.5


def of_pictures(tmp_path: Path) -> Study:
    """A small one; or, for the README's pictures, a copy of the study that is named."""
    if "NEXUS_STUDY" not in os.environ:
        return study_of(tmp_path, count=2, questions=["preference", "following"], checks=())
    shutil.copytree(os.environ["NEXUS_STUDY"], tmp_path / "study", ignore=shutil.ignore_patterns("answers*"))
    return Study(tmp_path / "study")


async def picture(page: browser.Page, name: str) -> None:
    if "NEXUS_SCREENSHOTS" in os.environ:
        await page.picture(Path(os.environ["NEXUS_SCREENSHOTS"]) / f"{name}.png")


def test_pictures_by_keyboard_and_by_touch(tmp_path: Path) -> None:
    study = of_pictures(tmp_path)

    async def do(one: browser.Browser, address: str) -> None:
        page = await one.page(*WIDE)
        await begun(page, address)
        await page.value("document.getElementById('begin').focus()")
        await page.key("Enter")
        await page.until(READY)
        assert await page.value(IN_SIGHT) and await page.value(CONTRAST) >= 4.5
        assert await page.value("document.activeElement.id") == "question"
        sides = await page.value("[...document.querySelectorAll('.stage img')].map((e) => [e.alt, e.naturalWidth > 0])")
        assert sides == [["First sample", True], ["Second sample", True]]
        await picture(page, "study_wide")
        shown = await page.value("document.querySelector('#left img').src")
        await page.key("1")  # the first question
        await page.until("document.getElementById('question').textContent.includes('2 of 2')")
        await page.go(address)  # loaded again: the same pair, from its first question
        await page.until(READY)
        assert await page.value("document.querySelector('#left img').src") == shown
        await page.key("2")
        await page.key("0")
        await page.until(f"document.querySelector('#left img').src !== {shown!r} && {READY}")
        await page.key("ArrowLeft")
        assert await page.value("document.getElementById('left').classList.contains('pointed')")
        await page.key("Enter")
        await page.key("ArrowRight")
        await page.key("Enter")
        assert not page.complaints

        phone = await one.page(*PHONE, touch=True)
        await begun(phone, address)
        await phone.tap("#begin")
        await phone.until(READY)
        assert await phone.value(IN_SIGHT) and await phone.value(CONTRAST) >= 4.5
        await picture(phone, "study_phone")
        await phone.tap("#choose-right")
        await phone.until("document.getElementById('question').textContent.includes('2 of 2')")
        await phone.tap("#choose-tie")
        if len(study.pairs) == 2:
            await page.until("!document.getElementById('end').hidden")
            assert await page.value("document.getElementById('count').textContent") == "2 pairs"
        await phone.until("document.querySelector('#progress').textContent.startsWith('2 ')")
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

    async def clips(one: browser.Browser, address: str) -> None:
        page = await one.page(*PHONE, touch=True)
        await begun(page, address)
        await page.tap("#begin")
        await page.until(READY)
        assert await page.value(IN_SIGHT)
        met = set()
        for _ in range(2000):
            left, right = await page.value(FRAMES)
            assert left == right
            met.add(left)
            if len(met) == 6:  # all frames of both, again and again
                break
        assert len(met) == 6
        await page.tap("#play")  # pauses
        await page.value(
            "(() => { const e = document.getElementById('seek'); e.value = 600; e.dispatchEvent(new Event('input')); })()"
        )
        assert await page.value(FRAMES) == [3, 3] and await page.value(RED) == [120, 120]
        await page.key("0")  # there are no ties here
        await page.tap("#choose-left")
        await page.until("!document.getElementById('end').hidden")
        assert not page.complaints

    (kept,) = seen(moving, clips)
    assert kept.choices["preference"] != "tie"
    heard = study_of(tmp_path / "sounds", "sound", count=1, questions=["preference"], checks=())

    async def sounds(one: browser.Browser, address: str) -> None:
        page = await one.page(*WIDE)
        await begun(page, address)
        await page.key("Tab")
        await page.key("Enter")
        await page.until("document.querySelectorAll('.stage .sound').length === 2")
        await page.key("2")  # nobody has heard them yet
        await page.until("document.getElementById('task').hidden === false")
        assert await page.value("document.getElementById('choose-right').disabled")
        await page.key("ArrowLeft")
        await page.key(" ")
        await page.until("Number(document.getElementById('seek').value) > 0")
        assert await page.value("document.getElementById('play').textContent") == "Pause"
        await page.key("ArrowRight")  # the other, from there
        await page.until(READY)
        await page.key("2")
        await page.until("!document.getElementById('end').hidden")
        assert not page.complaints

    (kept,) = seen(heard, sounds)
    assert kept.choices["preference"] == ("first" if kept.swapped else "second")
