"""The page on which people choose, and what it asks the server for.

A page learns nothing of systems: a pair is named by a random id, its sides by their place, and files are served under these names.
"""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from aiohttp import web

from nexus_scale.io.plain_json import is_number
from nexus_scale.study.answers import SIDES, Answers, Assignment
from nexus_scale.study.folder import Medium, Study
from nexus_scale.web.access import YEAR_S, Access
from nexus_scale.web.pages import add_pages, application, json_of, send_file, send_json

T = TypeVar("T")

LONGEST_S = 24 * 3600.0
MEDIA_KEPT_S = 3600


def study_application(study: Study, access: Access) -> web.Application:
    """The application of a study, for `web.server.serve`."""
    app = application(access)
    page = _Page(study)
    app.cleanup_ctx.append(page.opened)
    app.router.add_get("/state", page.state)
    app.router.add_post("/join", page.join)
    app.router.add_post("/answer", page.answer)
    app.router.add_get("/media/{id:[0-9a-f]{24}}/{side:left|right}/{part:[0-9]{1,4}}", page.media)
    add_pages(app, "nexus_scale.study.page", {"/": "index.html", "/study.css": "study.css", "/study.js": "study.js"})
    return app


class _Page:
    """Handlers. SQLite is in a thread of its own, so that a slow disk does not hold up those who look at samples."""

    answers: Answers

    def __init__(self, study: Study):
        self.study = study
        self.cookie = f"nexus_rater_{study.fingerprint[:8]}"
        self.thread = ThreadPoolExecutor(1, "answers")

    async def opened(self, app: web.Application) -> AsyncIterator[None]:
        self.answers = await self._in_thread(lambda: Answers(self.study))
        yield
        await self._in_thread(self.answers.close)
        self.thread.shutdown()

    async def _in_thread(self, call: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, call)
        except sqlite3.OperationalError as error:  # a full disk: the page keeps the answer and sends it again
            raise web.HTTPServiceUnavailable(text=f"answers cannot be kept now: {error}\n") from None

    # ------------------------------------------------------------------------------------------ requests

    async def state(self, request: web.Request) -> web.Response:
        """What the page is about, and whether this browser takes part already."""
        settings = self.study.settings
        about = {
            "kind": settings.kind,
            "questions": [one.model_dump() for one in settings.questions],
            "ties": settings.ties,
            "prompts": any(group.prompt for group in self.study.samples.groups),
            "joined": await self._in_thread(lambda: self._rater(request)) is not None,
        }
        return send_json(about)

    async def join(self, request: web.Request) -> web.Response:
        """The next pair of this browser's rater, who is made where there is none."""
        await json_of(request)
        name = request.cookies.get(self.cookie, "")
        rater = await self._in_thread(lambda: self.answers.rater(name))
        if rater is None:
            made = await self._in_thread(self.answers.join)
            if made is None:
                raise web.HTTPServiceUnavailable(text="this study has as many raters as it can take\n")
            name = made
        reply = send_json(await self._in_thread(lambda: self._next(name)))
        reply.set_cookie(self.cookie, name, max_age=YEAR_S, httponly=True, samesite="Lax", path="/")
        return reply

    async def answer(self, request: web.Request) -> web.Response:
        """Keeps an answer; then the next pair."""
        id, choices, seconds = self._read(await json_of(request))
        name = request.cookies.get(self.cookie, "")

        def keep() -> Any:
            rater = self.answers.rater(name)
            if rater is None:
                raise web.HTTPForbidden(text="nobody of that name takes part; load the page again\n")
            if not self.answers.answer(rater, id, choices, seconds):
                raise web.HTTPConflict(text="that pair is another's, or has another answer; load the page again\n")
            return self._next(name)

        return send_json(await self._in_thread(keep))

    async def media(self, request: web.Request) -> web.StreamResponse:
        """A file of a pair that this browser's rater was given."""
        id, side, part = (request.match_info[name] for name in ("id", "side", "part"))

        def find() -> Medium | None:
            rater = self._rater(request)
            one = None if rater is None else self.answers.assigned(rater, id)
            if one is None:
                return None
            _, left, right = self.answers.shown(one)
            return left if side == "left" else right

        medium = await self._in_thread(find)
        if medium is None or int(part) >= len(medium.parts):
            raise web.HTTPNotFound(text="there is no such sample\n")
        return send_file(self.study.file(medium.parts[int(part)]), MEDIA_KEPT_S)

    # ------------------------------------------------------------------------------------------ in the thread

    def _rater(self, request: web.Request) -> int | None:
        return self.answers.rater(request.cookies.get(self.cookie, ""))

    def _next(self, name: str) -> dict[str, Any]:
        rater = self.answers.rater(name)
        assert rater is not None, "a rater who has joined"
        one = self.answers.next(rater)
        done, left = self.answers.done(rater), self.answers.left(rater)
        pair = None if one is None else self._as_seen(one)
        return {"done": done, "total": done + left + (one is not None), "pair": pair}

    def _as_seen(self, one: Assignment) -> dict[str, Any]:
        prompt, left, right = self.answers.shown(one)
        return {
            "id": one.id,
            "prompt": prompt,
            "left": _seen(one.id, "left", left),
            "right": _seen(one.id, "right", right),
        }

    def _read(self, body: dict[str, Any]) -> tuple[str, dict[str, str], float]:
        id, choices, seconds = body.get("pair"), body.get("choices"), body.get("seconds")
        wanted = {one.name for one in self.study.settings.questions}
        sides = SIDES if self.study.settings.ties else SIDES[:2]
        named = isinstance(id, str) and re.fullmatch("[0-9a-f]{24}", id)
        if (
            not named
            or not isinstance(choices, dict)
            or set(choices) != wanted
            or not set(map(str, choices.values())) <= set(sides)
        ):
            raise web.HTTPBadRequest(
                text=f"expected a pair and choices among {', '.join(sides)} for {', '.join(sorted(wanted))}\n"
            )
        if not is_number(seconds) or seconds < 0:  # type: ignore[operator]
            raise web.HTTPBadRequest(text="expected seconds, a number\n")
        return str(id), choices, min(float(seconds), LONGEST_S)  # type: ignore[arg-type]


def _seen(id: str, side: str, medium: Medium) -> dict[str, Any]:
    """A sample as its page is told of it."""
    parts = [f"/media/{id}/{side}/{number}" for number in range(len(medium.parts))]
    return {**medium.model_dump(exclude={"parts", "gain_db"}), "parts": parts}
