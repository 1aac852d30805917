"""Who may see what is served: this machine alone, or whoever has the token.

Without a token the server listens on loopback only. What else reaches it there is a page of another site in the same browser, by a name
that it lets point here (DNS rebinding: the Host header is checked) or by a form (Origin and Sec-Fetch-Site are checked).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from nexus_scale.contracts import UserError

SHORTEST_TOKEN = 16
LOOPBACK = ("localhost", "127.0.0.1", "::1")
YEAR_S = 365 * 24 * 3600


@dataclass(frozen=True)
class Access:
    """Where to listen, and who is let in.

    Args:
        host: an address of this machine; `0.0.0.0` and `::` are all of them.
        port: 0 takes any that is free.
        token: what opens the pages; None lets everyone on this machine in, and is refused for other addresses.
        names: names by which others reach this machine, beside its own: of a proxy, for example.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = field(default=None, repr=False)
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not self.host.strip():
            raise UserError("--host: is empty; expected an address such as 127.0.0.1 or 0.0.0.0")
        if not 0 <= self.port < 1 << 16:
            raise UserError(f"--port {self.port}: expected 0 to 65535")
        if self.token is None and not self.is_local:
            raise UserError(f"--host {self.host}: is open to other machines, which takes a token")
        if self.token is not None and not re.fullmatch(rf"[A-Za-z0-9_.~-]{{{SHORTEST_TOKEN},200}}", self.token):
            raise UserError(
                f"the token: expected {SHORTEST_TOKEN} to 200 letters, digits, dashes, dots and underscores"
            )

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches it."""
        return _is_local(self.host)

    @property
    def cookie(self) -> str:
        """The cookie that stands for the token after its first use: browsers tell servers apart by name, not by port."""
        return f"nexus_{_hashed('name', self.token or '')[:8]}"

    def proof(self) -> str:
        """What the cookie holds: of the token, and not the token."""
        return _hashed("proof", self.token or "")

    def opens(self, given: str) -> bool:
        """Whether it is the token, in time that does not depend on how much of it is right."""
        return self.token is not None and hmac.compare_digest(_bytes(given), self.token.encode())

    def lets_in(self, request: web.Request) -> bool:
        """Whether a request has the cookie or the header `Authorization: Bearer TOKEN`, where one is needed."""
        if self.token is None:
            return True
        kind, _, bearer = request.headers.get("Authorization", "").partition(" ")
        cookie = request.cookies.get(self.cookie, "")
        by_cookie = hmac.compare_digest(_bytes(cookie), self.proof().encode())
        return by_cookie or (kind.lower() == "bearer" and self.opens(bearer.strip()))

    def knows(self, host: str) -> bool:
        """Whether a Host header names this machine. An address cannot be made to point elsewhere; of names, only known ones are right."""
        name = _name_of(host)
        if name is None:
            return False
        if _address(name) is not None:
            return not self.is_local or name in LOOPBACK or name == self.host
        own = {"localhost", self.host, *self.names}
        if not self.is_local:
            own |= {socket.gethostname()}
        return name in {one.lower().rstrip(".") for one in own}


def access_to(host: str, port: int, token_file: Path | None = None, names: Sequence[str] = ()) -> Access:
    """The access that a command's options ask for: an open address gets a token, made here unless a file holds one.

    Raises:
        UserError: a file that is not there or that others can read, a token that is too short, a port that cannot be.
    """
    token = None if token_file is None else _read_token(token_file)
    if token is None and not _is_local(host):
        token = secrets.token_urlsafe(24)
    return Access(host, port, token, tuple(names))


def _read_token(file: Path) -> str:
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > 1000:
            raise UserError(f"--token-file {file}: expected a file with a token and nothing else")
        if status.st_mode & 0o077:
            raise UserError(f"--token-file {file}: other users can read it, so it protects nothing: chmod 600 it")
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--token-file {file}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _is_local(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)


def _bytes(text: str) -> bytes:
    """Text of a request, which may be no text."""
    return text.encode(errors="surrogateescape")


def _hashed(purpose: str, token: str) -> str:
    return hmac.new(token.encode(), purpose.encode(), hashlib.sha256).hexdigest()


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _name_of(host: str) -> str | None:
    """The name or address in a Host header, in lower case and without its port; None where there is none."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".") or None
    except ValueError:
        return None


def guard(access: Access) -> Middleware:
    """The middleware that turns away what `access` does not let in, before anything else looks at it."""

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = request.headers.get("Host", "")
        if not access.knows(host):
            raise web.HTTPMisdirectedRequest(text="this server does not go by that name\n")
        if request.method not in ("GET", "HEAD") and not _own(request, host):
            raise web.HTTPForbidden(text="only the server's own pages may send this\n")
        token = request.query.get("token")
        if token is not None and access.token is not None and request.method == "GET" and access.opens(token):
            return _welcomed(request, access)
        if not access.lets_in(request):
            raise web.HTTPUnauthorized(text="open the address that the server printed, with its token\n")
        return await handler(request)

    return guarded


def _own(request: web.Request, host: str) -> bool:
    """Whether a request that changes something comes from a page of this server, or from no page at all."""
    if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
        return False
    origin = request.headers.get("Origin")
    try:
        return origin is None or urlsplit(origin).netloc.lower() == host.lower()
    except ValueError:
        return False


def _welcomed(request: web.Request, access: Access) -> web.Response:
    """Leads on to the same page without the token, which neither history nor a screenshot then shows."""
    rest = {name: value for name, value in request.query.items() if name != "token"}
    # The path is this server's own, however many slashes it begins with.
    reply = web.Response(status=303, headers={"Location": "/" + str(request.rel_url.with_query(rest)).lstrip("/\\")})
    # Lax and not Strict: the first click comes from a message or a chat, and browsers would leave a strict cookie out of what follows it.
    reply.set_cookie(access.cookie, access.proof(), max_age=YEAR_S, httponly=True, samesite="Lax", path="/")
    return reply
