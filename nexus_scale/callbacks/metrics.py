"""The run's metrics: one row every N steps in metrics.jsonl, in the progress display and, optionally, in W&B.

The file is the record. W&B is a copy on a thread of its own: whatever becomes of it, the run neither waits nor fails.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import torch
from pydantic import PositiveInt

from nexus_scale.config.secret_names import SECRET_KEY
from nexus_scale.contracts import Callback, Engine, Progress, RunFolder, StepInfo, UserError
from nexus_scale.io.rows import RowFile
from nexus_scale.io.terminal import visible

log = logging.getLogger(__name__)


class Sums:
    """Sums of step metrics until `means` is asked for."""

    def __init__(self) -> None:
        self._totals: dict[str, tuple[float, float]] = {}

    def add(self, metrics: Mapping[str, tuple[float, float]]) -> None:
        """`metrics`: (sum, count) by name."""
        for name, (total, count) in metrics.items():
            before, counted = self._totals.get(name, (0.0, 0.0))
            self._totals[name] = (before + total, counted + count)

    def means(self, world_size: int) -> dict[str, float]:
        """Means since the last call, over steps and ranks; one collective if there are several ranks."""
        totals, self._totals = self._totals, {}
        if world_size > 1:
            packed = {
                kind + name: value for name, pair in totals.items() for kind, value in zip("sn", pair, strict=True)
            }
            packed = mean_of_figures(packed)
            totals = {name: (packed["s" + name], packed["n" + name]) for name in totals}
        return {name: total / count for name, (total, count) in totals.items() if count}


def first_phase(means: Mapping[str, float], order: Iterable[str]) -> dict[str, float]:
    """`loss`, `lr` and `grad_norm` of the first of several phases under these plain names: tables and charts show them for the run.

    Args:
        means: by name, with several phases `<phase>/<metric>`.
        order: the names in the order of the phases.
    """
    phase = next((name.partition("/")[0] for name in order if "/" in name), None)
    plain = {name: means.get(f"{phase}/{name}") for name in ("loss", "lr", "grad_norm") if name not in means}
    return {name: value for name, value in plain.items() if value is not None}


def mean_of_figures(figures: Mapping[str, float]) -> dict[str, float]:
    """Means over ranks of figures; names must agree on all ranks. A collective."""
    from nexus_scale.engine.distributed import mean_over_ranks

    names = sorted(figures)
    packed = torch.tensor([figures[name] for name in names], dtype=torch.float64)
    return dict(zip(names, mean_over_ranks({"figures": packed})["figures"].tolist(), strict=True))


class Metrics(Callback):
    """Writes a row every `every` steps and at the last one, and shows the progress.

    Args:
        every: steps between rows.
        wandb: `true`, or a mapping with any of `project`, `entity`, `name`, `group`, `mode` (`offline` unless this or the
            environment's WANDB_MODE says otherwise), `deadline_s`. The key is W&B's own affair: a file or the environment.
        progress: whether to show a progress bar, or plain lines where there is no terminal.
        run, record, context: the run's folder; the only configuration that W&B gets to see; what other callbacks measured.
    """

    def __init__(
        self,
        *,
        every: PositiveInt = 10,
        wandb: bool | dict[str, Any] = False,
        progress: bool = True,
        run: RunFolder,
        record: Mapping[str, Any],
        context: dict[str, float],
    ):
        self.every, self.show_progress = every, progress
        self.run, self.record, self.context = run, record, context
        self._wandb_settings = check_wandb(wandb)
        self._sums = Sums()
        self._rows: RowFile | None = None
        self._wandb: WandbThread | None = None
        self._display: Display | None = None
        self._begin, self._seconds_before = time.perf_counter(), 0.0
        self._read = 0  # the newest step whose metrics have been read

    def before_run(self, engine: Engine, progress: Progress) -> None:
        self._begin, self._seconds_before, self._read = time.perf_counter(), 0.0, progress.step
        if engine.rank != 0:
            return
        self._rows = RowFile(self.run.metrics, progress.step)
        if self._rows.newest is not None:
            self._seconds_before = float(self._rows.newest.get("seconds") or 0.0)
        if self._wandb_settings is not None:
            self._wandb = WandbThread(self._wandb_settings, self.run.path, self.record)

    def after_reading(self, info: StepInfo) -> None:
        # Figures that later callbacks measured in the previous step are still in the context.
        if self.context and self.context["step"] < info.step:
            self._take_context()
        self._sums.add(info.metrics)
        self._read = info.step
        if info.step % self.every == 0 or info.step == info.steps:
            self._write(info)
        self._take_context()

    def after_step(self, info: StepInfo) -> None:
        if self._rows is not None and self.show_progress:
            if self._display is None:
                self._display = Display(self.run.path.name, info.step - 1, info.steps)
            self._display.advance(info.step)
        # Figures of a step whose metrics are on their way wait for its row.
        if self.context and self.context["step"] <= self._read:
            self._take_context()

    def after_run(self, engine: Engine, progress: Progress) -> None:
        self._take_context()
        if self._display is not None:
            self._display.finish()

    def close(self) -> None:
        self._take_context()
        if self._display is not None:
            self._display.close()
            self._display = None
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _write(self, info: StepInfo) -> None:
        means = self._sums.means(info.engine.world_size)
        if self._rows is None:
            return
        seconds = self._seconds_before + time.perf_counter() - self._begin
        row = {"step": info.step, "seconds": round(seconds, 3), **first_phase(means, info.metrics), **means}
        self._rows.append(row)
        if self._wandb is not None:
            self._wandb.log(row)
        if self._display is not None:
            self._display.say(info.step, row.get("loss", next(iter(means.values()), None)))

    def _take_context(self) -> None:
        figures = dict(self.context)
        self.context.clear()
        if self._rows is None or len(figures) < 2:
            return
        newest = self._rows.newest
        if newest is not None and newest["step"] == figures["step"]:
            self._rows.extend(figures)
        else:
            seconds = self._seconds_before + time.perf_counter() - self._begin
            self._rows.append({"step": figures["step"], "seconds": round(seconds, 3), **figures})
        if self._wandb is not None:
            self._wandb.log(figures)


class Display:
    """Shows the progress: a bar on a terminal, otherwise a plain line at most every seven seconds."""

    line_seconds = 7.0
    bar_seconds = 0.25

    def __init__(self, name: str, step: int, steps: int):
        self.name, self.first, self.step, self.steps = visible(name, keep=""), step, step, steps
        self.loss: float | None = None
        self._begin = self._drawn = time.perf_counter()
        self._said = self._begin - self.line_seconds + 1.0  # the first line comes early, to show that the run has begun
        self._bar: Any = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            figures = TextColumn("{task.fields[figures]}")
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), figures, refresh_per_second=4
            )
            self._task = self._bar.add_task(name, total=steps, completed=step, figures="")
            self._bar.start()

    def advance(self, step: int) -> None:
        self.step = step
        if self._bar is None:
            return
        now = time.perf_counter()
        if now - self._drawn >= self.bar_seconds:
            self._drawn = now
            self._bar.update(self._task, completed=step, figures=self._figures(now))

    def say(self, step: int, loss: float | None) -> None:
        self.step, self.loss = step, loss
        now = time.perf_counter()
        if self._bar is None and now - self._said >= self.line_seconds:
            self._said = now
            self._print(now)

    def finish(self) -> None:
        """The last line of a finished run."""
        now = time.perf_counter()
        if self._bar is None:
            self._print(now)
        else:
            self._bar.update(self._task, completed=self.step, figures=self._figures(now))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _print(self, now: float) -> None:
        sys.stdout.write(f"{self.name}: step {self.step}/{self.steps}, {self._figures(now)}\n")
        sys.stdout.flush()

    def _figures(self, now: float) -> str:
        done = self.step - self.first
        parts = [] if self.loss is None else [f"loss {self.loss:.4g}"]
        if done > 0 and now > self._begin:
            rate = done / (now - self._begin)
            parts += [f"{rate:.3g} steps/s", f"{duration((self.steps - self.step) / rate)} left"]
        return ", ".join(parts)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s`, `2 h 10 min`, `3 d 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


# ---------------------------------------------------------------------------------------------- W&B

_WANDB_KEYS = ("project", "entity", "name", "group", "mode", "deadline_s")


def check_wandb(wandb: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    """Settings of W&B, or None if it is off.

    Raises:
        UserError: a setting that is not one; a key in the recipe.
    """
    if wandb is False:
        return None
    settings = {} if wandb is True else dict(wandb)
    for name in settings:
        if SECRET_KEY.search(name):
            raise UserError(
                f"callbacks.metrics.wandb.{name}: a key does not belong in a recipe; use `wandb login` or WANDB_API_KEY"
            )
        if name not in _WANDB_KEYS:
            raise UserError(f"callbacks.metrics.wandb.{name}: unknown key; valid: {', '.join(_WANDB_KEYS)}")
    mode = settings.setdefault("mode", os.environ.get("WANDB_MODE", "offline"))
    if mode not in ("offline", "online", "disabled"):
        raise UserError(f"callbacks.metrics.wandb.mode: got {mode!r}; expected 'offline', 'online' or 'disabled'")
    return settings


def safe_record(record: Any) -> Any:
    """`record` without likely secrets: values of keys with such names, and user names and passwords in URLs."""
    if isinstance(record, Mapping):
        return {
            str(key): "(left out)" if SECRET_KEY.search(str(key)) and isinstance(value, str) else safe_record(value)
            for key, value in record.items()
        }
    if isinstance(record, list | tuple):
        return [safe_record(value) for value in record]
    if isinstance(record, str) and "://" in record and "@" in record:
        parts = urlsplit(record)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    return record


class WandbThread:
    """Copies rows to W&B; the caller never waits.

    Rows go through a bounded queue to a daemon thread, which also imports and starts W&B. Where W&B does not start by the
    deadline, fails, or falls behind by a whole queue, it is given up with one warning; the rows are in metrics.jsonl anyway.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path, record: Mapping[str, Any], rows: int = 1000):
        self.settings, self.folder, self.record = dict(settings), folder, safe_record(record)
        self.deadline_s = float(self.settings.pop("deadline_s", 60.0))
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(maxsize=rows)
        self._started = threading.Event()
        self._given_up = threading.Event()
        self._begin = time.perf_counter()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, row: dict[str, Any]) -> None:
        if self._given_up.is_set():
            return
        if not self._started.is_set() and time.perf_counter() - self._begin > self.deadline_s:
            self._give_up(f"it did not start within {self.deadline_s:g} s")
            return
        try:
            self._queue.put_nowait(row)
        except queue.Full:
            self._give_up(f"it fell {self._queue.maxsize} rows behind")

    def close(self, wait_s: float = 15.0) -> None:
        """Lets W&B finish for at most `wait_s`, then ends whatever still hangs, so that it cannot delay the exit."""
        if not self._given_up.is_set():
            try:
                self._queue.put_nowait(None)
            except queue.Full:
                self._give_up(f"it fell {self._queue.maxsize} rows behind")
        if not self._given_up.is_set():
            self._thread.join(wait_s)
            if self._thread.is_alive():
                self._give_up(f"it did not finish within {wait_s:g} s")
        if self._given_up.is_set():
            # W&B waits for its service process in an exit hook, without a deadline.
            for pid in service_processes():
                os.kill(pid, signal.SIGKILL)

    def _give_up(self, why: str) -> None:
        if not self._given_up.is_set():
            self._given_up.set()
            log.warning("W&B is switched off for this run: %s. All rows are in metrics.jsonl.", why)

    def _work(self) -> None:
        try:
            import wandb

            wandb_run = wandb.init(
                **self.settings,
                config=self.record,
                dir=str(self.folder),
                # Without these two W&B stores the command line and the source; a command line can hold secrets.
                settings=wandb.Settings(
                    x_disable_meta=True,
                    save_code=False,
                    x_disable_stats=True,
                    console="off",
                    silent=True,
                    init_timeout=self.deadline_s,
                ),
            )
            self._started.set()
            for row in self._rows():
                wandb_run.log({name: value for name, value in row.items() if name != "step"}, step=row["step"])
            wandb_run.finish()
        except Exception as error:  # the run continues whatever happens: its record is metrics.jsonl
            self._give_up(f"{type(error).__name__}: {error}")

    def _rows(self) -> Iterator[dict[str, Any]]:
        while not self._given_up.is_set():
            row = self._queue.get()
            if row is None:
                return
            yield row


def service_processes() -> list[int]:
    """W&B processes that this process started."""
    found = []
    for task in Path("/proc/self/task").glob("*/children"):
        for pid in task.read_text().split():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:  # it has just ended
                continue
            if b"wandb-core" in command:
                found.append(int(pid))
    return found
