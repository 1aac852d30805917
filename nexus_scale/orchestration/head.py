"""The head of a Ray cluster, and Ray's daemon on this machine: that one is gone is noticed, and the program ends with a word of its own.

Without them calls into Ray hang, those of a `finally` too. 60 s after the head's last answer Ray ends the program, by a line of C++ and
exit code 1; until then it holds its run, and the program of a submitted job outlives its head so.
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
"""Exit code of a program whose cluster lost its head: too few resources, as the `nexus` command counts."""

ASK_EVERY_S = 1.0
ANSWER_S = 2.0

_UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)

NO_WAY_BACK_S = 3.0
"""Patience with what nobody starts again."""


@dataclass(frozen=True)
class Server:
    """A part of Ray that this program cannot do without: what people call it, its host:port, and how long it may be silent."""

    name: str
    address: str
    patience_s: float


_acts: list[Callable[[str], None]] = []
_watched = False


def patience_s(ours: bool, environment: Mapping[str, str] = os.environ) -> float:
    """How long a head may be silent before it is given up.

    A head with a memory (GCS fault tolerance) may come back, and Ray waits 60 s for it (RAY_gcs_rpc_server_reconnect_timeout_s), on all
    machines. Two thirds of that leave workers on machines that still stand the time to save before their raylets end them. The head
    of a cluster that this program started for itself is started again by nobody.
    """
    return NO_WAY_BACK_S if ours else 2 / 3 * float(environment.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60"))


@contextmanager
def watched(servers: Sequence[Server]) -> Iterator[None]:
    """Ends this program, with code 4 and the reason, when one of these has been silent for too long.

    The first to enter watches for all within.
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
    """Has `act(reason)` called before this program is ended; it must not call Ray, and is called in another thread."""
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
                    f"{server.name} at {server.address} has not answered for {silent:.0f} s; once there is a cluster again, give the same "
                    "command again: it goes on from the newest checkpoint"
                )


_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(3) + b"\x04" + bytes(5)
"""How a client of HTTP/2, which Ray's servers speak, begins, with its settings (RFC 9113, section 3.4)."""

_SETTINGS = 4


def silence(address: str, seconds: float) -> str | None:
    """Why nothing of Ray's answers at `host:port` for so long; None where it does. Ray itself tries a dead address for minutes."""
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
            return None if answer[3:] == bytes([_SETTINGS]) else "what listens there is no server of Ray's"
        except OSError as error:  # a head may be starting
            if time.monotonic() + ASK_EVERY_S > end:
                return f"{error.strerror or error} for {seconds:g} s"
            time.sleep(ASK_EVERY_S)


@contextmanager
def deadline(seconds: float, words: str) -> Iterator[None]:
    """Ends this program, with code 4 and these words, where what is within takes longer: a call into Ray that nothing else ends."""
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
        # Too many open files, or no free port, is this machine's own trouble and says nothing of the other's.
        return not isinstance(error, ConnectionError | TimeoutError) and error.errno not in _UNREACHABLE
    return True


def _end(words: str) -> None:
    try:
        for act in reversed(_acts):
            act(words)
    except Exception:
        logger.exception("at the end of a program without a head")
    finally:
        security.forget_tokens()
        print(f"error: {words}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(GONE)  # the main thread may sit in a call of Ray's that nothing else ends
