"""Pages that this machine serves: who is let in, what may run on them, which files they reach, how the server begins and ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from aiohttp import ClientSession, CookieJar, web
from aiohttp.test_utils import TestClient, TestServer

from nexus_scale.contracts import UserError
from nexus_scale.web.access import Access, access_to
from nexus_scale.web.pages import HEADERS, add_pages, application, file_inside, json_of, send_file, send_json
from nexus_scale.web.server import serve
from tests.distributed import free_port, started, until

TOKEN = "a-token-that-is-long-enough"


def site(access: Access, root: Path) -> web.Application:
    """A page, files of a folder, something to send to, and a handler with a mistake in it."""
    app = application(access)

    async def media(request: web.Request) -> web.StreamResponse:
        return send_file(file_inside(root, request.match_info["name"]), cache_s=60)

    async def take(request: web.Request) -> web.Response:
        return send_json(await json_of(request))

    async def mistaken(request: web.Request) -> web.Response:
        raise RuntimeError("inside")

    app.router.add_get("/media/{name:.*}", media)
    app.router.add_post("/take", take)
    app.router.add_get("/mistaken", mistaken)
    add_pages(app, "tests.web", {"/page.txt": "page.txt"})
    return app


def asked(access: Access, root: Path, do: Callable[[TestClient], Awaitable[None]]) -> None:
    async def run() -> None:
        # The jar keeps cookies of addresses; browsers do.
        async with TestClient(TestServer(site(access, root)), cookie_jar=CookieJar(unsafe=True)) as client:
            await do(client)

    asyncio.run(run())


def test_a_page_of_this_machine_alone(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.wav").write_bytes(bytes(range(100)))
    (tmp_path / "in" / "a.svg").write_text("<svg onload='alert(1)'/>")
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "in" / "link.txt").symlink_to(tmp_path / "secret.txt")

    async def do(client: TestClient) -> None:
        page = await client.get("/page.txt")
        assert (page.status, await page.text()) == (200, "A page.\n")
        for path in ("/page.txt", "/nothing", "/mistaken", "/media/a.wav", "/media/none.wav"):
            answer = await client.get(path)
            assert {**HEADERS, **answer.headers}.items() >= {
                name: value for name, value in HEADERS.items() if name != "Cache-Control"
            }.items()
            assert all(name in answer.headers for name in HEADERS), path
            assert "inside" not in await answer.text()
        assert "unsafe" not in HEADERS["Content-Security-Policy"] and "http" not in HEADERS["Content-Security-Policy"]

        part = await client.get("/media/a.wav", headers={"Range": "bytes=10-19"})
        assert (part.status, await part.read()) == (206, bytes(range(10, 20)))
        assert part.headers["Content-Range"] == "bytes 10-19/100"
        beyond = await client.get("/media/a.wav", headers={"Range": "bytes=200-"})
        assert beyond.status == 416

        outside = ("../secret.txt", "%2e%2e/secret.txt", "..%2fsecret.txt", "%2Fetc/passwd", "link.txt", "a.svg", "", ".",
                   "a.wav/..", "%00", "..\\secret.txt", "a" * 5000)  # fmt: skip
        for name in outside:
            answer = await client.get(f"/media/{name}")
            assert answer.status in (400, 404) and "secret" not in await answer.text(), name

        # A name of another site that points here, and a form or script of another site.
        for host, status in (
            ("evil.example:80", 421),
            ("localhost:1", 200),
            ("[::1]", 200),
            ("192.168.1.1", 421),
            ("[", 421),
            ("", 421),
        ):
            assert (await client.get("/page.txt", headers={"Host": host})).status == status, host
        good = {"Content-Type": "application/json"}
        assert await (await client.post("/take", data=b'{"a": 1}', headers=good)).json() == {"a": 1}
        for headers, status in (
            ({**good, "Origin": "http://evil.example"}, 403), ({**good, "Origin": "http://["}, 403),
            ({**good, "Sec-Fetch-Site": "cross-site"}, 403), ({"Content-Type": "text/plain"}, 415),
        ):  # fmt: skip
            assert (await client.post("/take", data=b'{"a": 1}', headers=headers)).status == status, headers
        for body in (b"", b"[1]", b"{", b"\xff", b"[" * 30_000):
            assert (await client.post("/take", data=body, headers=good)).status == 400, body[:9]
        assert (await client.post("/take", data=b"1" * 70_000, headers=good)).status == 413

    asked(Access(), tmp_path / "in", do)


def test_a_token_opens_to_others(tmp_path: Path) -> None:
    access = Access("0.0.0.0", token=TOKEN, names=("lab.example",))
    assert TOKEN not in repr(access) and TOKEN not in access.proof()

    async def do(client: TestClient) -> None:
        for path in ("/page.txt", "/page.txt?token=", f"/page.txt?token={TOKEN}x", "/page.txt?token=%ff", "/nothing"):
            answer = await client.get(path, allow_redirects=False)
            assert answer.status == 401 and "A page" not in await answer.text(), path
        for headers in (
            {"Authorization": "Bearer wrong"},
            {"Authorization": "\udcff"},
            {"Cookie": f"{access.cookie}=\xff"},
        ):
            assert (await client.get("/page.txt", headers=headers)).status == 401, headers
        assert (await client.get("/page.txt", headers={"Authorization": f"Bearer {TOKEN}"})).status == 200

        own = str(client.make_url("/"))
        first = await client.session.get(f"{own}/evil.example?b=1&token={TOKEN}", allow_redirects=False)
        assert first.status == 303 and TOKEN not in first.headers["Location"]
        assert first.headers["Location"] == "/evil.example?b=1"
        cookie = first.headers["Set-Cookie"]
        assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and TOKEN not in cookie
        again = await client.get("/page.txt")  # with the cookie
        assert again.status == 200
        for host, status in (
            ("lab.example", 200),
            ("10.0.0.1:8000", 200),
            (f"{socket.gethostname()}:1", 200),
            ("evil.example", 421),
        ):
            assert (await client.get("/page.txt", headers={"Host": host})).status == status, host

    asked(access, tmp_path, do)


def test_what_opens_too_far_is_refused(tmp_path: Path) -> None:
    assert (
        access_to("127.0.0.1", 1).token is None and access_to("::1", 1).is_local and access_to("127.9.9.9", 1).is_local
    )
    made = [access_to("0.0.0.0", 1).token for _ in range(2)]
    assert made[0] != made[1] and all(len(token or "") >= 32 for token in made)
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        access_to("0.0.0.0", 1, file)
    file.chmod(0o600)
    assert access_to("127.0.0.1", 1, file).token == TOKEN
    file.write_text("short")
    for wrong, call in (
        ("takes a token", lambda: Access("0.0.0.0")), ("16 to 200", lambda: access_to("::", 1, file)),
        ("65535", lambda: Access(port=70_000)),
        ("cannot be read", lambda: access_to("::", 1, tmp_path / "none")), ("nothing else", lambda: access_to("::", 1, tmp_path)),
        ("is empty", lambda: Access(" ")),
    ):  # fmt: skip
        with pytest.raises(UserError, match=wrong):
            call()


def served(port: int, host: str = "127.0.0.1") -> None:
    try:
        access = Access(host, port)
        serve(site(access, Path()), access, lambda address: print(address, flush=True))
    except UserError as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(error.code) from None
    print("ended", flush=True)


@contextlib.contextmanager
def server_on(port: int, log: Path) -> Iterator[ForkServerProcess]:
    server = started(served, port, log=log)
    try:
        until(lambda: log.exists() and f"http://127.0.0.1:{port}/\n" in log.read_text())
        yield server
    finally:
        server.kill()
        server.join()


def test_the_server_begins_and_ends(tmp_path: Path) -> None:
    port = free_port()
    for number in (signal.SIGTERM, signal.SIGINT):  # the second begins at once, on the same port
        log = tmp_path / f"{number}"
        with server_on(port, log) as server:
            if number == signal.SIGTERM:
                refused_beside(port, tmp_path)
            os.kill(server.pid or 0, number)
            server.join(60)
            assert server.exitcode == 0 and log.read_text().endswith("ended\n")
            assert "Traceback" not in log.read_text()


def refused_beside(port: int, tmp_path: Path) -> None:
    """What a running server answers to bytes that are no requests, and what a second one on its port says."""
    assert urllib.request.urlopen(f"http://127.0.0.1:{port}/page.txt", timeout=30).read() == b"A page.\n"
    no_requests = (
        b"\x00\xff\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET " + b"/" * 20_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /page.txt",
    )
    for sent in no_requests:
        with socket.create_connection(("127.0.0.1", port), timeout=30) as raw, contextlib.suppress(ConnectionError):
            raw.sendall(sent)
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(4096):
                pass
    for wrong, host, words in (
        (port, "127.0.0.1", "another program listens there"), (0, "203.0.113.1", "takes a token"),
        (0, "127.9.9.9.9", "takes a token"),
    ):  # fmt: skip
        log = tmp_path / words
        taken = started(served, wrong, host, log=log)
        taken.join(60)
        assert taken.exitcode == 2 and words in log.read_text(), log.read_text()
        log.unlink()


def test_many_at_once_are_answered(tmp_path: Path) -> None:
    async def do(client: TestClient) -> None:
        async with ClientSession() as session:
            url = client.make_url("/page.txt")
            answers = await asyncio.gather(*(session.get(url) for _ in range(200)))
            assert {answer.status for answer in answers} == {200}

    asked(Access(), tmp_path, do)
