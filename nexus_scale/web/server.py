"""Runs an application until SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
from collections.abc import Callable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from nexus_scale.contracts import UserError
from nexus_scale.web.access import Access

STOP_S = 5.0
"""Seconds that requests under way have to end once the server stops."""


def serve(app: web.Application, access: Access, told: Callable[[str], None]) -> None:
    """Serves until SIGINT or SIGTERM; then requests under way end, and it returns.

    Args:
        told: gets the address once it is open, with the token where there is one.
    Raises:
        UserError: the port is taken, or the address is not this machine's.
    """
    listening = _listen(access)
    try:
        asyncio.run(_serve(app, listening, lambda: told(_address(access, listening))))
    finally:
        listening.close()


async def _serve(app: web.Application, listening: socket.socket, opened: Callable[[], None]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    # An access log would hold tokens.
    runner = web.AppRunner(app, access_log=None, logger=_quiet(), shutdown_timeout=STOP_S)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        opened()
        await stop.wait()
    finally:
        await runner.cleanup()


def _quiet() -> logging.Logger:
    """aiohttp's log of what goes wrong, without stack traces, and without bytes that are no request, which anyone may send."""
    logger = logging.getLogger(f"{__name__}.aiohttp")
    logger.addFilter(_in_one_line)
    return logger


def _in_one_line(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    record.exc_info = record.exc_text = None
    if error is not None:
        record.msg, record.args = f"{record.getMessage()}: {type(error).__name__}: {error}", ()
    return not isinstance(error, HttpProcessingError)


def _listen(access: Access) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(
            access.host, access.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError):
        raise UserError(f"--host {access.host}: is no address of this machine, such as 127.0.0.1 or 0.0.0.0") from None
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise _refused(access, error) from None
    return listening


def _refused(access: Access, error: OSError) -> UserError:
    where = f"{access.host}:{access.port}"
    if error.errno == errno.EADDRINUSE:
        return UserError(f"{where}: another program listens there; choose a free port by --port, 0 for any")
    if error.errno == errno.EADDRNOTAVAIL:
        return UserError(f"--host {access.host}: is no address of this machine, such as 127.0.0.1 or 0.0.0.0")
    if error.errno in (errno.EACCES, errno.EPERM):
        return UserError(f"--port {access.port}: is not for this user to open; choose one from 1024 on")
    return UserError(f"{where}: cannot be opened: {os.strerror(error.errno or 0)}")


def _address(access: Access, listening: socket.socket) -> str:
    port = listening.getsockname()[1]
    everywhere = access.host in ("0.0.0.0", "::", "")  # noqa: S104 (said by the user, with a token)
    host = (access.names[0] if access.names else socket.gethostname()) if everywhere else access.host
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{port}/" + (f"?token={access.token}" if access.token else "")
