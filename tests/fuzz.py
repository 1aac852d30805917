"""The harness of all fuzz tests: mutated input at a border of the program, many cases to a forked process.

`NEXUS_FUZZ=20000 pytest tests -k fuzz` shares that many cases over all borders; without it each has the number that BORDERS names.
`NEXUS_FUZZ_SEED=17 pytest tests/config/test_fuzz_recipe.py` runs one case again. A case is a function of its border and its seed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

from tests.distributed import forked

BORDERS: Mapping[str, int] = {
    "recipe": 60,
    "cluster": 60,
    "command": 200,
    "manifest": 200,
    "index": 100,
    "run folder": 40,
    "tar": 150,
    "table": 200,
    "image": 150,
    "clip": 100,
    "sound": 100,
}
"""Cases in CI by border; `NEXUS_FUZZ` shares its number in these proportions."""

CODES = frozenset({0, 2, 3, 4, 5, 6})
CPU_S = 10
"""Of one case. Processor time, so that a busy machine makes no hang of what is none; what sleeps is ended after WALL_S."""
WALL_S = 40.0
MEMORY = 2 << 30
"""Bytes that a case may take beyond what the process had at its start."""
PRINTED = 1 << 20
"""Bytes that a case may print."""
BATCH = 100
"""Cases to a process."""

Prepare = Callable[[random.Random, Path], Sequence[Any]]
"""`prepare(rng, folder)` writes a mutated input below the empty folder, which is the working directory, and returns the arguments of `act`.
A function of `rng` alone, at a module's top level, since it runs in another process."""
Act = Callable[..., int | None]
"""What is tried; returns an exit code, None for 0. Again a module's own."""


@dataclass(frozen=True)
class Failed:
    seed: int
    why: str
    given: str
    printed: str


@dataclass
class Summary:
    """What a border's cases came to; `line` is what the README quotes."""

    border: str
    cases: int = 0
    tracebacks: int = 0
    hangs: int = 0
    other: int = 0
    slowest_s: float = 0.0
    seconds: float = 0.0
    codes: Counter[int] = field(default_factory=Counter)

    def line(self) -> str:
        return (
            f"fuzz, {self.border}: {self.cases} cases, {self.tracebacks} tracebacks, {self.hangs} hangs, "
            f"{self.other} other failures, {self.codes[0]} done and {self.codes.total() - self.codes[0]} refused, "
            f"slowest {self.slowest_s:.1f} s of {self.seconds:.0f}"
        )


SUMMARIES: list[Summary] = []
"""Of this session, for conftest.py to print at its end."""


def cases(border: str) -> int:
    """How many cases this border gets."""
    asked = os.environ.get("NEXUS_FUZZ")
    if asked is None:
        return BORDERS[border]
    return max(1, round(int(asked) * BORDERS[border] / sum(BORDERS.values())))


def nexus(*arguments: str) -> int:
    """The `nexus` command in this process, left as it was: its exit code; 1 and a printed traceback for what it does not catch."""
    from nexus_scale import cli

    log = logging.getLogger()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ))
        stack.callback(setattr, log, "handlers", list(log.handlers))
        stack.callback(log.setLevel, log.level)
        stack.callback(setattr, sys, "argv", sys.argv)
        sys.argv = ["nexus", *arguments]
        return exit_code(cli.main)


def exit_code(program: Callable[[], Any]) -> int:
    """The exit code that an interpreter would give a program."""
    try:
        program()
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return left.code or 0
        print(left.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def fuzz(border: str, prepare: Prepare, folder: Path, act: Act = nexus) -> None:
    """Runs all cases of a border and fails with the seed, the input and the output of those that went wrong.

    A case must end by itself with one of CODES, without a traceback, within CPU_S, MEMORY and PRINTED.

    Args:
        border: one of BORDERS.
        folder: where the cases have their folders; that of a case that went wrong stays.
    """
    asked = os.environ.get("NEXUS_FUZZ_SEED")
    seeds = [int(asked)] if asked else list(range(cases(border)))
    summary = Summary(border)
    SUMMARIES.append(summary)
    failed: list[Failed] = []
    while seeds:
        batch, seeds = seeds[:BATCH], seeds[BATCH:]
        done = _run(border, batch, prepare, act, folder, summary, failed)
        seeds = batch[done:] + seeds
    if failed:
        shown = "\n\n".join(
            f"NEXUS_FUZZ_SEED={one.seed}: {one.why}\ngiven: {one.given}\nprinted: {one.printed}" for one in failed[:5]
        )
        raise AssertionError(f"{len(failed)} of {summary.cases} cases of {border} went wrong\n\n{shown}")


def _run(
    border: str,
    seeds: Sequence[int],
    prepare: Prepare,
    act: Act,
    folder: Path,
    summary: Summary,
    failed: list[Failed],
) -> int:
    """Runs these cases in one process until one of them ends it; returns how many were run."""
    ours, theirs = forked().Pipe(duplex=False)
    process = forked().Process(target=_work, args=(theirs, border, tuple(seeds), prepare, act, str(folder), sys.path))
    process.start()
    theirs.close()
    done = 0
    begun = False  # the first message says that the process stands
    try:
        while done < len(seeds):
            seed = seeds[done]
            if not ours.poll(WALL_S if begun else 120):
                _died(summary, failed, folder, seed, f"no end within {WALL_S:.0f} s")
                return done + 1
            try:
                message = ours.recv()
            except EOFError:
                process.join(10)
                code = process.exitcode
                slow = code == -signal.SIGPROF
                why = f"no end within {CPU_S} s of processor time" if slow else f"the process died with {code}"
                _died(summary, failed, folder, seed, why, hang=slow)
                return done + 1
            if message is None:
                begun = True
                continue
            code, seconds, printed, given = message
            done += 1
            summary.cases += 1
            summary.codes[code] += 1
            summary.seconds += seconds
            summary.slowest_s = max(summary.slowest_s, seconds)
            if why := _wrong(code, printed):
                summary.tracebacks += "Traceback" in printed
                summary.other += "Traceback" not in printed
                failed.append(Failed(seed, why, given, printed[-6000:]))
        process.join(10)  # it tidies up after its last case
    finally:
        ours.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
    return done


def _died(summary: Summary, failed: list[Failed], folder: Path, seed: int, why: str, hang: bool = True) -> None:
    summary.cases += 1
    summary.hangs += hang
    summary.other += not hang
    summary.slowest_s = max(summary.slowest_s, float(CPU_S))
    failed.append(Failed(seed, why, _files(folder / str(seed)), ""))


def _wrong(code: int, printed: str) -> str:
    if "Traceback (most recent call last)" in printed:
        return "a traceback"
    if len(printed) > PRINTED:
        return f"printed {len(printed):,} bytes"
    return "" if code in CODES else f"exit code {code}"


def _work(
    out: Connection, border: str, seeds: Sequence[int], prepare: Prepare, act: Act, folder: str, path: list[str]
) -> None:
    """In a process of its own, which never returns: one message for each case."""
    os.setsid()  # so that what it starts ends with it
    sys.path[:] = path
    printed = Path(folder) / f"printed-{os.getpid()}"
    printed.parent.mkdir(parents=True, exist_ok=True)
    with printed.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["NEXUS_DATA_ROOT"] = os.environ["NEXUS_RUNS_ROOT"] = ""  # a case's own; see below
    _bound_memory()
    out.send(None)
    for seed in seeds:
        place = Path(folder) / str(seed)
        place.mkdir(parents=True)
        os.chdir(place)
        os.environ["NEXUS_DATA_ROOT"], os.environ["NEXUS_RUNS_ROOT"] = str(place / "data"), str(place / "runs")
        os.truncate(printed, 0)
        begun = time.process_time()
        given, code = "", 1
        try:
            arguments = prepare(random.Random(f"{border} {seed}"), place)
            given = f"{list(arguments)!r:.2000}"
            (place / ".arguments").write_text(given, encoding="utf-8", errors="replace")
            signal.setitimer(signal.ITIMER_PROF, CPU_S)
            code = act(*arguments) or 0
        except BaseException:
            traceback.print_exc()
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.flush()
        sys.stderr.flush()
        text = printed.read_text(encoding="utf-8", errors="replace")
        bad = _wrong(code, text)
        out.send((code, time.process_time() - begun, text, f"{given}\n{_files(place)}" if bad else given))
        os.chdir(folder)
        if not bad:
            shutil.rmtree(place)
    out.close()
    os._exit(0)


def _bound_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _files(place: Path) -> str:
    """The files of a case, as far as they can be shown."""
    shown = []
    for file in sorted(place.rglob("*"))[:20] if place.is_dir() else []:
        if file.is_file():
            data = file.read_bytes()[:1500]
            shown.append(f"{file.relative_to(place)}: {data.decode(errors='backslashreplace')}")
    return "\n".join(shown)
