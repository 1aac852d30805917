"""Foreign files are decoded in a separate process. If a file kills it, that one file is dropped with a reason, and the job goes on.

Decoders are C code. A damaged file can crash them, keep them busy for ever, or make them claim terabytes. A server imports them once
and forks a child, which decodes one file after another within MEMORY_BYTES and CPU_S. Each result goes into shared memory, and the server
passes it on only once it is whole. A crash costs one file; the next child starts within milliseconds.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import math
import os
import resource
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nexus_scale.contracts import UserError

MEMORY_BYTES = 4 << 30
"""Memory that a child may take beyond what it is forked with."""
CPU_S = 900
"""Seconds that one file may take: of processor time, so that no file is too slow only because the machine is busy."""

MISSING = "a file that is missing or cannot be read"
DIED = "a file that kills the process that decodes it"
TOO_SLOW = "a file that takes too long to decode"
TOO_LARGE = "a file that needs too much memory to decode"
UNEXPECTED = "a file that its decoder fails on"

PR_SET_PDEATHSIG = 1
"""From <sys/prctl.h>: sets the signal that a process gets when its parent ends."""
PRELOADED = ("data_pipelines.sound_decoding", "data_pipelines.video_decoding")

Decoder = Callable[[BinaryIO, str, Mapping[str, Any]], tuple[Mapping[str, Any], Sequence[np.ndarray]]]
"""`decoder(file, name, arguments)` returns JSON values and arrays made from a file; a top-level function of a module, not of a script."""


@dataclass(frozen=True)
class Decoded:
    """What a decoder returned; or nothing, with the reason and its details."""

    facts: Mapping[str, Any]
    arrays: Sequence[np.ndarray]
    reason: str = ""
    details: str = ""


def decode_apart(decoder: Decoder, path: str | Path, arguments: Mapping[str, Any]) -> Decoded:
    """The result of `decoder(file, name, arguments)` for the file at `path`, from a child process.

    Args:
        arguments: JSON values.
    Returns:
        What the decoder made; or a reason: MISSING, DIED, TOO_SLOW, TOO_LARGE, or UNEXPECTED where it raised.
    Raises:
        UserError: the decoder raised it (a package is missing), or the process cannot be started.
    """
    request = {
        "decoder": [decoder.__module__, decoder.__qualname__],
        "path": str(path),
        "arguments": dict(arguments),
        "memory": MEMORY_BYTES,
        "cpu": CPU_S,
    }
    with _lock:
        head, arrays = _ask(json.dumps(request).encode())
    if "code" in head:
        raise UserError(head["error"], head["code"])
    return Decoded(head.get("facts", {}), arrays, head.get("reason", ""), head.get("details", ""))


# ------------------------------------------------------------------------------------------------- the job's side

_lock = threading.Lock()
_server: subprocess.Popen[bytes] | None = None
_owner = 0


def _ask(request: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
    for _ in range(2):
        server = _running()
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            server.stdin.write(len(request).to_bytes(8, "little") + request)
            server.stdin.flush()
            return _reply(server.stdout)
        except (OSError, EOFError):  # something ended the server: a new one tries the same file
            _stop()
        except BaseException:  # Ctrl-C leaves half a reply, which must not reach the next file
            _stop()
            raise
    raise UserError("the process that decodes files exits before it has decoded one; see its message above", 4)


def _running() -> subprocess.Popen[bytes]:
    global _server, _owner
    if _server is None or _owner != os.getpid() or _server.poll() is not None:
        _owner = os.getpid()
        _server = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "MALLOC_ARENA_MAX": "2"},  # each arena reserves 64 MiB of the bounded address space
            start_new_session=True,  # Ctrl-C is for the job; the server ends when the job closes its end of the pipe
        )
    return _server


@atexit.register
def _stop() -> None:
    global _server
    server, _server = _server, None
    if server is None or _owner != os.getpid():
        return
    for pipe in (server.stdin, server.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # for what could not be sent to a server that is gone
                pipe.close()
    try:
        server.wait(2)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _reply(stream: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    head = json.loads(_exactly(stream, int.from_bytes(_exactly(stream, 8), "little")))
    arrays = []
    for dtype, shape in head.get("arrays", ()):
        array = np.empty(shape, dtype)
        view, got = array.data.cast("B") if array.size else memoryview(b""), 0
        while got < len(view):
            count = stream.readinto(view[got:])
            if not count:
                raise EOFError("the server ended")
            got += count
        arrays.append(array)
    return head, arrays


def _exactly(stream: Any, count: int) -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise EOFError("the other side ended")
    return bytes(data)


# ------------------------------------------------------------------------------------------------- the server's side


def serve() -> None:
    """Decodes the files requested on standard input until it is closed."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that nothing a library prints passes for a reply
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.freeze()
    child: Child | None = None
    try:
        while head := requests.read(8):
            request = head + _exactly(requests, int.from_bytes(head, "little"))
            child = child or Child(requests.fileno(), replies.fileno())
            if child.takes(request):
                sent = 0
                while part := os.pread(child.result, 1 << 20, sent):
                    sent += replies.write(part)
                os.ftruncate(child.result, 0)
            else:
                death = json.dumps(_death(child.code())).encode()
                replies.write(len(death).to_bytes(8, "little") + death)
                child = None
            replies.flush()
    except (BrokenPipeError, EOFError):
        os._exit(0)  # the job was killed: nobody reads this


class Child:
    """The server's handle of a forked process that decodes; it ends with the server. Both have the in-memory file `result` open.

    Args:
        requests, replies: the server's descriptors towards the job.
    """

    def __init__(self, requests: int, replies: int):
        self._job = requests
        self.result = os.memfd_create("decoded")
        (inbox, outbox), (self._done, done) = os.pipe(), os.pipe()
        self._process = os.fork()
        if not self._process:
            for descriptor in (outbox, requests, replies):  # an end left open here would keep the job waiting
                os.close(descriptor)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            _work(os.fdopen(inbox, "rb"), done, self.result)
        os.close(inbox)
        os.close(done)
        self._requests = os.fdopen(outbox, "wb")

    def takes(self, request: bytes) -> bool:
        """Whether the child survived the request and left a `result`. Raises EOFError where the job is gone."""
        try:
            self._requests.write(request)
            self._requests.flush()
        except BrokenPipeError:
            return False
        waiting = select.poll()
        waiting.register(self._done, select.POLLIN)
        waiting.register(self._job, 0)  # reports the child's end
        if any(descriptor == self._job for descriptor, _ in waiting.poll()):
            raise EOFError("the job ended")
        return bool(os.read(self._done, 1))

    def code(self) -> int:
        """Its exit code; negative for a signal."""
        with contextlib.suppress(BrokenPipeError):  # with the request that it did not read
            self._requests.close()
        os.close(self._done)
        os.close(self.result)
        return os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])


def _death(code: int) -> dict[str, Any]:
    if code == -signal.SIGXCPU:
        return {"reason": TOO_SLOW, "details": "SIGXCPU"}
    return {"reason": DIED, "details": signal.Signals(-code).name if code < 0 else f"exit code {code}"}


def _work(requests: BinaryIO, done: int, result: int) -> None:
    """Runs in the child and never returns."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the C library's last message
        _limit(resource.RLIMIT_CORE, 0)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        while head := requests.read(8):
            request = json.loads(_exactly(requests, int.from_bytes(head, "little")))
            _limit(resource.RLIMIT_AS, pages * resource.getpagesize() + request["memory"])
            _limit(resource.RLIMIT_CPU, math.ceil(time.process_time()) + request["cpu"])
            try:
                _write(result, *_answer(request))
            except MemoryError as error:
                _write(result, {"reason": TOO_LARGE, "details": str(error)}, ())
            os.write(done, b"!")
        code = 0
    finally:
        os._exit(code)


def _answer(request: Mapping[str, Any]) -> tuple[dict[str, Any], Sequence[np.ndarray]]:
    module, name = request["decoder"]
    decoder: Decoder = getattr(importlib.import_module(module), name)
    try:
        descriptor = os.open(
            request["path"], os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        )  # opening a pipe would block for ever
        file = os.fdopen(descriptor, "rb")
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return {"reason": MISSING, "details": "not a regular file"}, ()
        file.peek(1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return {"reason": MISSING, "details": str(error)}, ()
    try:
        facts, arrays = decoder(file, request["path"], request["arguments"])
    except UserError as error:
        return {"error": str(error), "code": error.code}, ()
    except MemoryError:
        raise
    except Exception as error:  # a bug in a library or ours: it must not end the job, and is counted by its name
        return {"reason": UNEXPECTED, "details": f"{type(error).__name__}: {error}"}, ()
    return {"facts": dict(facts), "arrays": [[array.dtype.str, list(array.shape)] for array in arrays]}, arrays


def _write(result: int, head: Mapping[str, Any], arrays: Sequence[np.ndarray]) -> None:
    os.ftruncate(result, 0)
    os.lseek(result, 0, os.SEEK_SET)
    body = json.dumps(dict(head)).encode()
    with open(result, "wb", closefd=False) as file:
        file.write(len(body).to_bytes(8, "little") + body)
        for array in arrays:
            file.write(np.ascontiguousarray(array).data if array.size else b"")


def _limit(kind: int, limit: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
