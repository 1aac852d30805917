"""A job as a command: its roots, its progress bar (plain lines where there is no terminal), its errors."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipelines import load_job
from nexus_scale.contracts import UserError
from nexus_scale.io.terminal import keep_output_open

Progress = Callable[[int, int], None]
"""`progress(done, total)`: how far a job is, in its own units."""


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """An argument parser with what all jobs share."""
    made = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the data (default: ./data)")
    made.add_argument("--runs-root", type=Path, default=Path("runs"), help="folder of the runs (default: ./runs)")
    made.add_argument("--debug", action="store_true", help="show the stack trace of an error")
    return made


def actor_options(command: argparse.ArgumentParser, threads: int | None = None) -> None:
    """Options of a job of shards by Ray Data: `--workers`; with `threads`, the default of an encoder's, `--threads` and `--device` too."""
    command.add_argument(
        "--workers", type=int, help="actors of Ray Data; 0: in this process (default: one for two cores)"
    )
    if threads is not None:
        command.add_argument("--threads", type=int, default=threads, help=f"threads of each (default: {threads})")
        command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def serve(job: Callable[..., Any], title: str, arguments: argparse.Namespace) -> int:
    """Calls `job` with the parsed arguments; a user's mistake is one line on stderr and its exit code."""
    keep_output_open()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if job.__module__ == "__main__":
        # Of a script: Ray sends its functions by value, with all that they use. Those of a module are found there by their names.
        job = load_job(title).run
    options = vars(arguments).copy()
    debug = options.pop("debug")
    roots = {name: Path(os.path.expanduser(options.pop(name))).absolute() for name in ("data_root", "runs_root")}
    print(f"{title}: data in {roots['data_root']}, runs in {roots['runs_root']}")
    try:
        with progress_bar(title) as progress:
            job(**options, **roots, progress=progress)
    except UserError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"{title}: stopped; run the same command again to finish it", file=sys.stderr)
        return 130
    return 0


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """One bar with rate and time left; without a terminal, a line every ten seconds and one at the end."""
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
