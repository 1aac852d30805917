"""What training costs on a GPU, ours beside diffusers, in one call that fits a few minutes on a borrowed machine; without Ray.

Cases come in order of importance, each in a process of its own with a time limit; the next one imports what it needs while the one before
compiles. Rows are written as they come, so what was measured stays when time runs out.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import torch

from nexus_scale.bench.gpu.cases import CASES, WANTED, WANTED_MFU, WANTED_STEPS
from nexus_scale.bench.gpu.measuring import READY, ROW
from nexus_scale.contracts import UserError
from nexus_scale.rehearsal.peaks import peak_tflops

LONGEST = 3.0
"""Times its usual duration that a case may take."""

LAST_LINES = 12

COMMAND = [sys.executable, "-m", "nexus_scale.bench.gpu.worker"]
"""What runs a case; its name, device and size follow."""


def run(
    minutes: float = 7.0, tiny: bool = False, output: str = "nexus-bench-gpu.jsonl", cases: Sequence[str] | None = None
) -> dict[str, Any]:
    """Measures case after case while there is time.

    Args:
        minutes: for all of it.
        tiny: networks in miniature, on the CPU where there is no GPU: whether every case runs, and no figure.
        output: takes each row as it comes, a JSON object a line; next to it `.log` takes what the processes say.
        cases: names of cases; by default all.
    Returns:
        `figures`: what is wanted, with what was measured; `ceilings`; `rows`, everything; `left_out`: cases for which there was no time;
        and card, date, versions.
    Raises:
        UserError: no GPU, an unknown case, or an output that cannot be written.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        raise UserError(
            "bench gpu: torch finds no GPU; run it on a machine with one, or in miniature with --tiny: every case, and no figure",
            code=4,
        )
    chosen = list(CASES if cases is None else cases)
    if unknown := [name for name in chosen if name not in CASES]:
        raise UserError(f"bench gpu: unknown case {unknown[0]!r}; cases: {', '.join(CASES)}")
    rows: list[dict[str, Any]] = []
    path = Path(output)
    try:
        with path.open("w") as lines, path.with_suffix(".log").open("w") as log:
            left_out = _all(chosen, device, tiny, time.monotonic() + 60 * minutes, rows, lines, log)
    except OSError as error:
        raise UserError(f"bench gpu: {output}: {error.strerror}; name another file with --output", code=6) from error
    return summary(rows, left_out, device, tiny)


def _all(
    names: list[str], device: str, tiny: bool, deadline: float, rows: list[dict[str, Any]], lines: TextIO, log: TextIO
) -> list[str]:
    """Runs the cases one after another; those for which there was no time."""
    following = Worker(names[0], device, tiny, log) if names else None
    left_out, trials = [], dict[Any, Any]()
    for name, after in zip(names, [*names[1:], None], strict=True):
        worker, left = following, deadline - time.monotonic()
        assert worker is not None
        if left < CASES[name].seconds / 2 and not tiny:
            left_out.append(name)
            worker.end()
            following = Worker(after, device, tiny, log) if after is not None else None
            continue
        task = CASES[name].task
        worker.go(trials.get(task and task.recipe, []))
        following = Worker(after, device, tiny, log) if after is not None else None
        for row in worker.rows(min(left, LONGEST * CASES[name].seconds)):
            rows.append(row)
            if row.get("trials") and task is not None:
                trials.setdefault(task.recipe, row["trials"])
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            print(_told(row), file=sys.stderr, flush=True)
    return left_out


def _told(row: dict[str, Any]) -> str:
    """A row in a line, for people."""
    what = [str(row[key]) for key in ("recipe", "engine", "kernel", "kernels") if isinstance(row.get(key), str)]
    figures = [f"{key} {row[key]:.4g}" for key in _TOLD if isinstance(row.get(key), int | float)]
    said = row.get("error") or row.get("unavailable") or ", ".join(figures)
    return f"{row['case']} {' '.join([row['row'], *what])}: {said}"


_TOLD = (
    "micro_batch", "samples_per_second", "ms", "host_ms", "mfu", "gib", "device_ms", "idle_ms", "tflops", "gb_per_second", "first_s",
    "seconds",
)  # fmt: skip


class Worker:
    """The process of a case. It imports at once, and begins to compute at `go`."""

    def __init__(self, name: str, device: str, tiny: bool, log: TextIO):
        self.name = name
        self._log = log
        self._from = log.tell()
        self._process = subprocess.Popen(
            [*COMMAND, name, device, "tiny" if tiny else "full"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True,
        )  # fmt: skip
        self._said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.put(line)
        self._said.put(None)

    def go(self, trials: list[Any]) -> None:
        """Lets it begin; what an earlier case tried of the same recipe's kernels is not tried again."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(trials) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # it failed while it started; `rows` says so

    def rows(self, seconds: float) -> Iterator[dict[str, Any]]:
        """What the case measures, as it comes; a row `failed` where it ends badly or takes longer than so many seconds."""
        deadline, failed = time.monotonic() + seconds, False
        try:
            while True:
                try:
                    line = self._said.get(timeout=max(0.01, deadline - time.monotonic()))
                except queue.Empty:
                    yield {"case": self.name, "row": "failed", "error": f"not done after {seconds:.0f} s; ended"}
                    return
                if line is None:
                    break
                if line.startswith(ROW):
                    row = json.loads(line[len(ROW) :])
                    failed = failed or row["row"] == "failed"
                    yield row
                elif line.strip() != READY:
                    self._log.write(line)
            if (code := self._process.wait()) != 0 and not failed:
                yield {"case": self.name, "row": "failed", "error": f"ended with code {code}: {self._last_words()}"}
        finally:
            self.end()

    def _last_words(self) -> str:
        self._log.flush()
        with open(self._log.name) as file:
            return " | ".join(file.read().splitlines()[-LAST_LINES:])[-1500:]

    def end(self) -> None:
        """Ends the process, and what it started: inductor's compilers."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


# ------------------------------------------------------------------------------------------------ what it comes to


def summary(rows: list[dict[str, Any]], left_out: list[str], device: str, tiny: bool) -> dict[str, Any]:
    """The result as one object."""
    card = torch.cuda.get_device_name(0) if device == "cuda" else platform.processor() or platform.machine()
    ratios = _ratios(rows)
    return {
        "name": "gpu",
        "ratio": ratios.get("dit_zero3_over_local"),
        "figures": {}
        if tiny
        else {**_compared(ratios, {name: want for name, (_, _, want) in WANTED.items()}), **_absolute(rows)},
        "ceilings": ceilings_of(rows),
        "card": card,
        "peak_tflops": peak_tflops(card),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "tiny": tiny,
        "left_out": left_out,
        "failed": [{"case": row["case"], "error": row["error"]} for row in rows if row["row"] == "failed"],
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda, **_versions()},
        "rows": rows,
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name in ("torch", "triton", "deepspeed", "diffusers", "flash-attn"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _steps(rows: list[dict[str, Any]], case: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["case"] == case and row["row"] == "step"]


def _ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Samples a second of one case over another's, at a micro-batch that both have."""
    found = {}
    for name, (ours, theirs, _) in WANTED.items():
        each = [
            {row["micro_batch"]: row["samples_per_second"] for row in _steps(rows, side)} for side in (ours, theirs)
        ]
        if shared := sorted(set(each[0]) & set(each[1])):
            found[name] = each[0][shared[0]] / each[1][shared[0]]
    return found


def _compared(measured: dict[str, float], wanted: dict[str, float]) -> dict[str, Any]:
    return {
        name: {"measured": measured[name], "wanted": want, "reached": measured[name] >= want}
        for name, want in wanted.items()
        if name in measured
    }


def _absolute(rows: list[dict[str, Any]]) -> dict[str, Any]:
    mfu = {f"{name}_mfu": [row["mfu"] for row in _steps(rows, name) if row["mfu"]] for name in WANTED_MFU}
    steps = {f"{name}_steps_per_second": [1e3 / row["ms"] for row in _steps(rows, name)] for name in WANTED_STEPS}
    best = {name: max(values) for name, values in {**mfu, **steps}.items() if values}
    wanted = {f"{name}_mfu": want for name, want in WANTED_MFU.items()}
    wanted |= {f"{name}_steps_per_second": want for name, want in WANTED_STEPS.items()}
    return _compared(best, wanted)


def ceilings_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The card's measured rates: `matmul_tflops`, `copy_gb_per_second`, and of attention for each head dim and length the fastest
    implementation's TFLOP/s, forward and with its backward."""
    found: dict[str, Any] = {}
    attention: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        if row["row"] == "matmul":
            found["matmul_tflops"] = row["tflops"]
        elif row["row"] == "copy":
            found["copy_gb_per_second"] = row["gb_per_second"]
        elif row["row"] == "attention" and "both_ms" in row:
            place = row["head_dim"], row["tokens"]
            if place not in attention or row["both_ms"] < attention[place]["both_ms"]:
                attention[place] = row
    kept = ("head_dim", "tokens", "kernel", "forward_tflops", "both_tflops", "both_ms")
    found["attention"] = [{key: row[key] for key in kept} for _, row in sorted(attention.items())]
    return found
