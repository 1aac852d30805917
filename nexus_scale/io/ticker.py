"""Breaks long silences: every few seconds a quiet program says that it is still working, and on what."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class _Heard:
    """A text stream that remembers its last line and when it was printed."""

    def __init__(self, stream: TextIO, hear: Callable[[str], None]):
        self._stream, self._hear = stream, hear

    def write(self, text: str) -> int:
        self._hear(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Ticker(threading.Thread):
    """Repeats the last line, with the seconds since, whenever nothing was printed for `every_s`.

    Args:
        every_s: seconds of silence after which a line is printed.
        max_s: the interval grows by half with each line of one silence, up to this many seconds, so that days of training do not
            fill the log.
        say: prints a line.
    """

    def __init__(self, every_s: float, max_s: float, say: Callable[[str], None]):
        super().__init__(name="ticker", daemon=True)
        self.every_s, self.max_s, self.say = every_s, max_s, say
        self._lock = threading.Lock()
        self._last, self._at = "starting", time.monotonic()
        self._over = threading.Event()

    def hear(self, text: str) -> None:
        """Notes what was printed; the last line that is not blank counts."""
        lines = [line for line in text.splitlines() if line.strip()]
        with self._lock:
            self._at = time.monotonic()
            if lines:
                self._last = lines[-1].strip()

    def run(self) -> None:
        told, begin, wait = 0.0, self._at, self.every_s
        while not self._over.wait(min(0.5, self.every_s / 4)):
            with self._lock:
                last, at = self._last, self._at
            if at != begin:
                told, begin, wait = 0.0, at, self.every_s
            silent = time.monotonic() - at
            if silent - told >= wait:
                told, wait = silent, min(1.5 * wait, self.max_s)
                self.say(f"... {silent:.0f} s: {last}")

    def stop(self) -> None:
        self._over.set()
        self.join()


def paced(say: Callable[[str], None], every_s: float = 5.0) -> Callable[[str], None]:
    """`say` for the lines of a loop: one that comes sooner than `every_s` after the line before it, or after the start, is left out."""
    said = time.monotonic()

    def tell(line: str) -> None:
        nonlocal said
        if (now := time.monotonic()) - said >= every_s:
            said = now
            say(line)

    return tell


@contextmanager
def still(doing: str, say: Callable[[str], None], every_s: float = 8.0, max_s: float = 60.0) -> Iterator[None]:
    """A context in which `say` gets a line such as `... 8 s: doing`, every few seconds and ever more rarely."""
    ticker = Ticker(every_s, max_s, say)
    ticker.hear(doing)
    ticker.start()
    try:
        yield
    finally:
        ticker.stop()


@contextmanager
def ticking(every_s: float = 8.0, max_s: float = 60.0) -> Iterator[None]:
    """A context in which long silences of stdout and stderr are broken by a line on stderr (see `Ticker`)."""
    out, err = sys.stdout, sys.stderr

    def say(line: str) -> None:
        err.write(f"{line}\n")
        err.flush()

    ticker = Ticker(every_s, max_s, say)
    sys.stdout, sys.stderr = _Heard(out, ticker.hear), _Heard(err, ticker.hear)
    ticker.start()
    try:
        yield
    finally:
        ticker.stop()
        sys.stdout, sys.stderr = out, err
