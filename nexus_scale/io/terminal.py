"""Safe output: text from files without terminal control codes, and streams that survive the loss of their reader."""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import sys
import unicodedata
from typing import Any


def visible(text: str, keep: str = "\n\t") -> str:
    """`text` with everything that would control a terminal escaped: `\\x1b` for an escape, `\\u202e` for a change of direction.

    Names of folders, messages of incidents and lines of logs come from files that other users may have written.

    Args:
        keep: control characters that stay.
    """
    return "".join(
        character
        if character in keep or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in text
    )


class VisibleFormatter(logging.Formatter):
    """Log lines whose text is `visible`."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _Unread(io.FileIO):
    """A file descriptor for output that never fails: output without a reader is dropped."""

    has_reader = True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            try:
                written = super().write(view[done:])
            except OSError as error:
                if error.errno == errno.EPIPE:  # the reader is gone: the rest has no reader either
                    self.has_reader = False
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, self.fileno())
                    os.close(nowhere)
                break  # a full disk or a closed terminal: this line is lost, the next may succeed
            if written is None:  # a full pipe
                select.select([], [self.fileno()], [], 1.0)
            else:
                done += written
        return len(view)


def open_output(fd: int) -> io.TextIOWrapper:
    """A line-buffered text stream onto a descriptor, which stays open. Writing to it never raises: not where a pipe's reader has left, the
    disk is full, or a character has no place in the encoding."""
    encoding = getattr(sys.__stdout__, "encoding", None) or "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(_Unread(fd, "wb", closefd=False)),
        encoding=encoding,
        errors="backslashreplace",
        line_buffering=True,
        write_through=False,
    )


def has_reader() -> bool:
    """Whether this program's output still has a reader, as far as is known; `| head` closes early."""
    return bool(getattr(getattr(getattr(sys.stdout, "buffer", None), "raw", None), "has_reader", True))


def keep_output_open() -> None:
    """Keeps a closed stdout or stderr from ending the process: `nexus train ... | head` trains to the end."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # closed before the program began (`>&-`): its number may belong to another file now
            try:
                os.fstat(fd)
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
                setattr(sys, name, open_output(fd))
            continue
        if stream is not getattr(sys, f"__{name}__") or isinstance(getattr(stream.buffer, "raw", None), _Unread):
            continue  # the caller's own stream, or already wrapped
        try:
            stream.flush()
        except OSError:
            logging.getLogger(__name__).debug("%s: nobody reads it", name)
        opened = open_output(fd)
        setattr(sys, name, opened)
        setattr(sys, f"__{name}__", opened)
