"""The curves of a report: losses of each phase apart, validation, what was measured of samples, speed and memory."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nexus_scale.callbacks.metrics import duration
from nexus_scale.report.charts import COLOURS, Line, chart, gibibytes, number, percent


def newest(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    """The last value of that name."""
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)


def phases_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What stands before the metrics of each phase in rows, by its name; of a run of one phase, nothing before those of one without."""
    names = dict.fromkeys(name for row in rows for name in row if name.endswith("/loss") and name.count("/") == 1)
    phases = [phase for name in names if (phase := name.partition("/")[0]) != "validation"]
    return {phase: f"{phase}/" for phase in phases} or {"": ""}


def metrics_of(rows: Sequence[Mapping[str, Any]], prefix: str) -> list[str]:
    """What a phase measures beside its loss and what the engine says of it."""
    names = dict.fromkeys(name.removeprefix(prefix) for row in rows for name in row if name.startswith(prefix))
    return [name for name in names if not name.startswith(("loss", "lr", "grad_norm", "skipped"))]


def curves(
    rows: list[dict[str, Any]],
    held: list[dict[str, Any]],
    watched: list[dict[str, Any]],
    evaluated: list[dict[str, Any]],
) -> str:
    """The section of a run's curves, from the rows of its metrics, of its validations, and of what monitored and evaluated its samples."""
    phases = phases_of(rows)

    def line(name: str, title: str = "", *, of: list[dict[str, Any]] = rows, smooth: bool = False) -> Line:
        found = [(row["step"], row[name]) for row in of if row.get(name) is not None]
        return Line(title or name, [x for x, _ in found], [y for _, y in found], smooth)

    times = sorted({key for row in held for key in row if key.startswith(("loss_t", "loss/t"))}, key=_natural)
    buckets = sorted({key for row in rows for key in row if key.startswith(("loss_t", "loss/t"))}, key=_natural)
    last = newest(held, "ratio")
    cards = [
        chart("Training loss", [line(f"{prefix}loss", phase, smooth=True) for phase, prefix in phases.items()]),
        *(
            chart(f"{phase}: beside the loss".capitalize(), [line(prefix + name, name, smooth=True) for name in names])
            for phase, prefix in phases.items()
            if phase and (names := metrics_of(rows, prefix))
        ),
        chart("Fréchet distance of samples", [line("frechet", of=watched)], from_zero=True),
        chart(
            "Diversity of samples",
            [line("diversity", "samples", of=watched), line("diversity_real", "data", of=watched)],
            words="deviation within a condition",
            from_zero=True,
        ),
        chart("Modes reached", [line("modes", of=watched)], from_zero=True),
        chart("Samples in a mode", [line("in_modes", of=watched)], from_zero=True, show=percent),
        chart("Fréchet distance to held-out samples", [line("frechet", of=evaluated)], from_zero=True),
        chart(
            "Samples like held-out ones",
            [line(name, of=evaluated) for name in ("precision", "recall", "coverage")],
            from_zero=True,
            show=percent,
        ),
        chart(
            "Nearness to training samples",
            [
                line("nearer_train", "nearer than to held-out ones", of=evaluated),
                line("copied", "copied", of=evaluated),
            ],
            words="50% and 1% by chance",
            from_zero=True,
            show=percent,
        ),
        chart(
            "Validation loss",
            [line("loss", "loss", of=held)],
            words="" if last is None else f"{number(last)} of the zero predictor's",
        ),
        chart(
            "Validation loss by time",
            [line(name, name, of=held) for name in times],
            words="t = 0 is data, t = 1 is noise",
        ),
        chart("Training loss by time", [line(name) for name in buckets], words="t = 0 is data, t = 1 is noise"),
        chart(
            "Gradient norm",
            [line(f"{prefix}grad_norm", phase, smooth=True) for phase, prefix in phases.items()],
            from_zero=True,
        ),
        chart("Learning rate", [line("lr")], from_zero=True),
        chart("Throughput", [line("samples_per_s", "samples/s")], words=_throughput_words(rows), from_zero=True),
        chart("Model FLOP/s", [line("model_flops_per_s", "FLOP/s")], words=_mfu_words(rows), from_zero=True),
        chart(
            "Waiting",
            [line("data_wait", "for data"), line("host_wait", "host for device")],
            words="share of the training time",
            from_zero=True,
            show=percent,
        ),
        chart("Peak memory", [line("memory_peak_bytes")], words="all workers together", from_zero=True, show=gibibytes),
    ]
    drawn = "".join(card for card in cards if card)
    return f'<h2>Curves <small>by step</small></h2><div class="cards">{drawn}</div>' if drawn else ""


COMPARED: Sequence[tuple[str, str, str, bool, Any]] = (
    ("metrics", "loss", "Training loss", False, number),
    ("validation", "ratio", "Validation loss over the zero predictor's", False, number),
    ("validation", "loss", "Validation loss", False, number),
    ("monitor", "frechet", "Fréchet distance of samples", True, number),
    ("monitor", "diversity", "Diversity of samples", True, number),
    ("metrics", "grad_norm", "Gradient norm", True, number),
    ("metrics", "lr", "Learning rate", True, number),
    ("metrics", "samples_per_s", "Samples per second", True, number),
    ("metrics", "model_flops_per_s", "Model FLOP/s", True, number),
    ("metrics", "memory_peak_bytes", "Peak memory", True, gibibytes),
)
"""Curves that runs are compared by: which rows, the value's name, the title, whether the axis begins at zero, how values are written."""


def overlaid(runs: Mapping[str, Mapping[str, list[dict[str, Any]]]], *, by_time: bool = False) -> list[str]:
    """Charts with a line for each run, by step or by seconds of training. A run has the same colour in all of them.

    Args:
        runs: rows of each run, by the names in COMPARED.
    """
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(runs)}
    charts = []
    for kind, value, title, from_zero, show in COMPARED:
        lines = []
        for name, rows in runs.items():
            at = _seconds_at(rows["metrics"]) if by_time else float
            found = [(at(row["step"]), row[value]) for row in rows[kind] if row.get(value) is not None]
            lines.append(Line(name, [x for x, _ in found], [y for _, y in found], kind == "metrics", colours[name]))
        show_x = duration if by_time else number
        charts.append(chart(title, lines, words=_last_of(lines, show), from_zero=from_zero, show=show, show_x=show_x))
    return [one for one in charts if one]


def _seconds_at(rows: Sequence[Mapping[str, Any]]) -> Callable[[float], float]:
    """Seconds of training until a step, between the rows that say so."""
    known = [(row["step"], row["seconds"]) for row in rows if row.get("seconds") is not None]
    steps = [step for step, _ in known]

    def at(step: float) -> float:
        i = min(bisect.bisect_left(steps, step), len(known) - 1)
        return float(known[i][1]) if known else float("nan")

    return at


def _last_of(lines: Sequence[Line], show: Any) -> str:
    return "last " + ", ".join(show(line.ys[-1]) for line in lines if line.ys)


def _natural(name: str) -> tuple[str, float]:
    """Sorts loss_t2 before loss_t10."""
    digits = name.rsplit("t", 1)[-1]
    return (name[: len(name) - len(digits)], float(digits)) if digits.replace(".", "", 1).isdigit() else (name, 0.0)


def _throughput_words(rows: Sequence[Mapping[str, Any]]) -> str:
    samples, tokens = newest(rows, "samples_per_s"), newest(rows, "tokens_per_s")
    return (
        ""
        if samples is None
        else f"{number(samples)} samples/s" + ("" if tokens is None else f", {number(tokens)} tokens/s")
    )


def _mfu_words(rows: Sequence[Mapping[str, Any]]) -> str:
    rate, mfu = newest(rows, "model_flops_per_s"), newest(rows, "mfu")
    return (
        ""
        if rate is None
        else f"{_spaced(rate)}FLOP/s" + ("; peak unknown" if mfu is None else f", {percent(mfu)} of the peak")
    )


def _spaced(value: float) -> str:
    """`51.2 G`, to put before a unit."""
    text = number(value)
    return f"{text[:-1]} {text[-1]}" if text[-1].isalpha() else f"{text} "
