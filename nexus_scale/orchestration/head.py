"""Ends the program, with a message and code 4, when the head of the Ray cluster or Ray's daemon on this machine is gone.

Calls into Ray then hang, also those in a `finally`. 60 s after the head's last answer Ray itself ends the program with a C++ trace and
code 1; until then the program would keep its run, and that of a submitted job would outlive its head.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from nexus_scale.orchestration import security

logger = logging.getLogger(__name__)

GONE = 4
"""Exit code of a program whose cluster lost its head: that of missing resources."""

ASK_EVERY_S = 1.0
ANSWER_S = 2.0

_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)

NO_WAY_BACK_S = 3.0
"""Patience with a server that nobody will start again."""


@dataclass(frozen=True)
class Server:
    """A part of Ray that the program needs: its name for people, host:port, and how long it may be silent."""

    name: str
    address: str
    patience_s: float


_acts: list[Callable[[str], None]] = []
_watched = False


def patience_s(ours: bool, environment: Mapping[str, str] = os.environ) -> float:
    """How long a head may be silent before it counts as gone.

    A head with GCS fault tolerance may come back, and Ray waits 60 s for it on all machines (RAY_gcs_rpc_server_reconnect_timeout_s).
    After two thirds of that, workers on other machines still have time to save before their raylets end them. Nobody restarts the
    head of a local cluster.
    """
    return NO_WAY_BACK_S if ours else 2 / 3 * float(environment.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))


@contextmanager
def watched(servers: Sequence[Server]) -> Iterator[None]:
    """Ends the program, with code 4 and the reason, when one of the servers has been silent for too long.

    Within another watch it does nothing.
    """
    global _watched
    if _watched:
        yield
        return
    ended = threading.Event()
    thread = threading.Thread(target=_watch, args=(servers, ended), name="watch of the head", daemon=True)
    _watched = True
    thread.start()
    try:
        yield
    finally:
        _watched = False
        ended.set()
        thread.join(ANSWER_S + ASK_EVERY_S)


@contextmanager
def last_act(act: Callable[[str], None]) -> Iterator[None]:
    """Calls `act(reason)` before the program is ended, in another thread; it must not call Ray."""
    _acts.append(act)
    try:
        yield
    finally:
        _acts.remove(act)


def _watch(servers: Sequence[Server], ended: threading.Event) -> None:
    answered = dict.fromkeys(servers, time.monotonic())
    while not ended.wait(ASK_EVERY_S):
        for server in servers:
            if _listens(server.address):
                answered[server] = time.monotonic()
            elif (silent := time.monotonic() - answered[server]) > server.patience_s:
                _end(
                    f"{server.name} at {server.address} has not answered for {silent:.0f} s. Start the cluster again and repeat the same "
                    "command: it resumes from the newest checkpoint"
                )


_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""The first bytes of an HTTP/2 client, which Ray's servers speak: preface and settings (RFC 9113, section 3.4)."""

_SETTINGS = 4


def silence(address: str, seconds: float) -> str | None:
    """Why no Ray server answers at `host:port` within so many seconds; None where one does. Ray itself tries a dead address for minutes."""
    found = re.fullmatch(r"\[?([^\[\]/]+?)\]?:(\d{1,5})", address)
    if found is None or int(found[2]) > 65535:
        return "expected host:port, the address that `ray start --head` prints"
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((found[1], int(found[2])), timeout=max(0.1, end - time.monotonic())) as wire:
                if os.environ.get("RAY_USE_TLS", "0") == "1":
                    return None  # whoever listens says nothing before a handshake
                wire.settimeout(max(0.1, end - time.monotonic()))
                wire.sendall(_HELLO)
                answer = wire.recv(4)
            return None if answer[3:] == bytes([_SETTINGS]) else "the server there is not Ray's"
        except OSError as error:  # a head may be starting
            if time.monotonic() + ASK_EVERY_S > end:
                return f"{error.strerror or error} for {seconds:g} s"
            time.sleep(ASK_EVERY_S)


@contextmanager
def deadline(seconds: float, words: str) -> Iterator[None]:
    """Ends the program, with code 4 and this message, where the code within takes longer: a call into Ray that nothing else ends."""
    timer = threading.Timer(seconds, _end, (words,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
    except OSError as error:
        # Too many open files, or no free port, is a problem of this machine and says nothing about the other.
        return not isinstance(error, ConnectionError | TimeoutError) and error.errno not in _UNREACHABLE
    return True


def _end(words: str) -> None:
    try:
        for act in reversed(_acts):
            act(words)
    except Exception:
        logger.exception("while ending a program that lost its head")
    finally:
        security.forget_tokens()
        print(f"error: {words}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(GONE)  # the main thread may sit in a call of Ray's that nothing else ends
