"""The files that pages are made of, and the headers that say what may run on them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from nexus_scale.web.access import Access, guard

log = logging.getLogger(__name__)

LONGEST_BODY = 64 * 1024
"""Bytes of a request."""

CLOSING = web.AppKey("closing", asyncio.Event)
"""Set once the server stops: handlers that stream wait for it beside what they wait for."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
"""Of every answer, unless it has its own."""

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".mp4": "video/mp4",
    ".wav": "audio/wav",
    ".flac": "audio/flac",
}
"""Files that are served, and as what. No other: an SVG or an unknown file is a page to a browser that looks into it."""


def application(access: Access) -> web.Application:
    """An application that lets in whom `access` says, with `HEADERS` on each answer; routes are the caller's to add."""
    app = web.Application(middlewares=[_guarded_answers(access)], client_max_size=LONGEST_BODY)
    app.on_response_prepare.append(_with_headers)
    app.on_shutdown.append(_close)
    app[CLOSING] = asyncio.Event()
    app.router.add_get("/favicon.ico", _no_icon)  # browsers ask by themselves
    return app


async def _no_icon(request: web.Request) -> web.Response:
    return web.Response(status=204)


async def _close(app: web.Application) -> None:
    app[CLOSING].set()


async def _with_headers(request: web.Request, response: web.StreamResponse) -> None:
    for name, value in HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers.pop("Server", None)


def _guarded_answers(access: Access) -> Middleware:
    """`guard`, and an error that nobody foresaw as one line in the log and an answer without its inside."""
    guarded = guard(access)

    @web.middleware
    async def answered(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await guarded(request, handler)
        except (web.HTTPException, ConnectionError):
            raise
        except Exception as error:
            log.error("%s %s: %s: %s", request.method, request.path, type(error).__name__, error)
            log.debug("", exc_info=True)
            raise web.HTTPInternalServerError(text="this request failed; the server's output says why\n") from None

    return answered


def add_pages(app: web.Application, package: str, names: Mapping[str, str]) -> None:
    """Serves files of a package, `{"/": "index.html", "/study.js": "study.js"}`, and nothing else of it.

    They are read once, so that a page and its scripts are of one version for as long as the server runs.
    """
    for path, name in names.items():
        body = resources.files(package).joinpath(name).read_bytes()
        app.router.add_get(path, _constant(body, TYPES[Path(name).suffix]))


def _constant(body: bytes, kind: str) -> Handler:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=body, headers={"Content-Type": kind, "Cache-Control": "no-cache"})

    return handler


def file_inside(root: Path, relative: str) -> Path:
    """The file below a folder that a request names.

    Raises:
        HTTPNotFound: it is not there, is of no kind in `TYPES`, or lies elsewhere, be it by `..`, by an absolute path or behind a link.
    """
    try:
        file = (root / relative).resolve(strict=True)
        if file.is_relative_to(root.resolve()) and file.is_file() and file.suffix.lower() in TYPES:
            return file
    except (OSError, ValueError, RuntimeError) as error:
        log.debug("%s: %s", relative, error)
    raise web.HTTPNotFound(text="there is no such file\n")


def send_file(file: Path, cache_s: int = 0) -> web.FileResponse:
    """A file, whole or the range that the request asks for (sound and video seek by ranges).

    Args:
        cache_s: seconds for which the browser need not ask again.
    """
    keep = f"private, max-age={cache_s}, immutable" if cache_s else "no-cache"
    return web.FileResponse(file, headers={"Content-Type": TYPES[file.suffix.lower()], "Cache-Control": keep})


def send_json(value: Any, status: int = 200) -> web.Response:
    """A value as JSON."""
    return web.json_response(value, status=status)


async def json_of(request: web.Request) -> dict[str, Any]:
    """The JSON object that a request sends.

    Raises:
        HTTPUnsupportedMediaType: it is not declared as JSON, as a form of another site could send it.
        HTTPBadRequest: it is none.
    """
    if request.content_type != "application/json":
        raise web.HTTPUnsupportedMediaType(text="expected Content-Type: application/json\n")
    try:
        value = json.loads(await request.read())
    except (ValueError, RecursionError):
        raise web.HTTPBadRequest(text="expected a JSON object\n") from None
    if not isinstance(value, dict):
        raise web.HTTPBadRequest(text="expected a JSON object\n")
    return value
