"""What jobs share as commands: the parser with the data and runs roots, and the progress bar (plain lines without a terminal)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Progress = Callable[[int, int], None]
"""`progress(done, total)` reports how far a job is, in its own units."""


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """An argument parser with the options of all jobs."""
    made = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the data (default: ./data)")
    made.add_argument("--runs-root", type=Path, default=Path("runs"), help="folder of the runs (default: ./runs)")
    made.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    return made


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """A progress bar with rate and time left; without a terminal, a line every ten seconds and one at the end."""
    if not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.speed:.1f}/s"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        bar.tasks[0].finished_speed = 0.0

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield show


def _lines(title: str) -> Progress:
    start = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 10.0 and done < total:
            return
        last = now
        rate = done / max(now - start, 1e-9)
        left = (total - done) / rate if rate > 0 else float("inf")
        print(f"{title}: {done}/{total}, {rate:.1f}/s, {left:.0f} s left", file=sys.stderr, flush=True)

    return show
