"""The board as an application: pages that are whole without a script, and the parts of them that have changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from aiohttp import web

from nexus_scale.board.pages import MOST_COMPARED, Parts, compare_parts, list_parts, mark, run_parts
from nexus_scale.board.studies import studies_below
from nexus_scale.board.watch import Kept, Runs
from nexus_scale.contracts import UserError
from nexus_scale.report.page import style
from nexus_scale.web.access import Access
from nexus_scale.web.pages import HEADERS, add_pages, application, file_inside, send_file, send_json

FRESH_S = 1.0
"""A page's parts are made at most this often, however many look at it."""

EVERY_MS, EVERY_IDLE_MS = 2000, 15_000
"""How often a browser asks again: while a run of the page is at work, and otherwise."""

BUSY = ("running", "starting", "preparing", "stalled")

YEAR_S = 365 * 24 * 3600
"""Pictures have addresses that change with them."""

# Bars, charts and tiles have their sizes as style attributes; everything else of the policy is the floor's.
POLICY = HEADERS["Content-Security-Policy"].replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")

Made = tuple[str, Parts, bool]
"""A page's title and parts, and whether something of it is at work."""


def board(root: Path, access: Access) -> web.Application:
    """The application that shows the runs of a root; it writes nothing.

    Raises:
        UserError: the root cannot be listed.
    """
    runs, kept = Runs(root), Kept(FRESH_S)
    runs.listed()
    app = application(access)
    frame = Template(resources.files("nexus_scale.board").joinpath("page/board.html").read_text(encoding="utf-8"))
    add_pages(app, "nexus_scale.board", {"/board.js": "page/board.js", "/board.css": "page/board.css"})
    app.router.add_get("/report.css", _style)

    def add(path: str, make: Callable[[web.Request], Made]) -> None:
        async def made_of(request: web.Request) -> Made:
            key = str(request.rel_url.without_query_params("have")) if "have" in request.query else str(request.rel_url)
            try:
                return await asyncio.to_thread(kept.get, key.removeprefix("/live"), lambda: make(request))
            except UserError as error:
                raise web.HTTPNotFound(text=f"{error}\n") from None

        async def page(request: web.Request) -> web.Response:
            title, parts, _ = await made_of(request)
            body = "".join(
                f'<div data-part="{escape(name, quote=True)}" data-mark="{mark(html)}">{html}</div>'
                for name, html in parts.items()
            )
            return _html(frame.substitute(title=escape(title), body=body))

        async def live(request: web.Request) -> web.Response:
            title, parts, busy = await made_of(request)
            have = set(request.query.get("have", "").split(","))
            return send_json(
                {"title": title, "every_ms": EVERY_MS if busy else EVERY_IDLE_MS, "parts": _news(parts, have)}
            )

        app.router.add_get(path, page)
        app.router.add_get(f"/live{path}", live)

    add("/", lambda _: _list(runs))
    add("/run/{run}", lambda request: _run(runs, request.match_info["run"]))
    add("/compare", lambda request: _compare(runs, request))

    async def file(request: web.Request) -> web.FileResponse:
        try:
            folder = runs.folder(request.match_info["run"])
        except UserError as error:
            raise web.HTTPNotFound(text=f"{error}\n") from None
        found = file_inside(folder.samples, request.match_info["file"])
        return send_file(found, YEAR_S if "v" in request.query else 0)

    app.router.add_get("/run/{run}/samples/{file}", file)
    return app


def _news(parts: Parts, have: set[str]) -> list[Mapping[str, str]]:
    """All parts by name and mark, with the HTML of those whose mark the browser does not have."""
    named = ((name, mark(html), html) for name, html in parts.items())
    return [
        {"name": name, "mark": marked} if marked in have else {"name": name, "mark": marked, "html": html}
        for name, marked, html in named
    ]


def _list(runs: Runs) -> Made:
    rows = runs.listed()
    return (
        f"{len(rows)} runs",
        list_parts(rows, studies_below(runs.root), runs.root),
        any(r.summary.state in BUSY for r in rows),
    )


def _run(runs: Runs, name: str) -> Made:
    contents, summary = runs.contents(name)
    return name, run_parts(contents, summary), summary.state in BUSY or contents.doing is not None


def _compare(runs: Runs, request: web.Request) -> Made:
    names = list(dict.fromkeys(request.query.getall("run", [])))
    found, missing = {}, names[MOST_COMPARED:]
    for name in names[:MOST_COMPARED]:
        try:
            found[name] = runs.contents(name)
        except UserError:
            missing.append(name)
    parts = compare_parts(found, missing, by_time=request.query.get("by") == "time")
    return " and ".join(found) or "comparison", parts, any(summary.state in BUSY for _, summary in found.values())


async def _style(request: web.Request) -> web.Response:
    return web.Response(text=style(), content_type="text/css", headers={"Cache-Control": "no-cache"})


def _html(text: str) -> web.Response:
    return web.Response(text=text, content_type="text/html", headers={"Content-Security-Policy": POLICY})
