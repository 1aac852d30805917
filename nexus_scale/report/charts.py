"""Charts and bars for reports, as HTML with inline SVG and no script. Names are escaped here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from nexus_scale.callbacks.metrics import duration

COLOURS = ("a", "b", "c", "d", "e", "f", "g", "h")
"""Colours of the style sheet, light and dark, in the order in which lines and stages use them."""

MOST_POINTS = 400
"""Longer curves are thinned, so that a report stays small enough to send."""


@dataclass(frozen=True)
class Line:
    """One curve: x is the step. `smooth` draws it faintly under its running mean; `colour` is one of COLOURS, by default the next."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    smooth: bool = False
    colour: str = ""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover [low, high], about `count` of them."""
    if not high > low:
        half = abs(low) * 0.05 or 0.5
        low, high = low - half, high + half
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    return [round(i * step, 12) for i in range(first, math.ceil(high / step - 1e-9) + 1)]


def number(value: float) -> str:
    """A figure for readers: three digits, with letters for large numbers."""
    size = abs(value)
    for limit, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (1e3 if letter == 'k' else limit):.3g}{letter}"
    if size and size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.4g}" if size >= 1000 else f"{value:.3g}"


def gibibytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def thin(line: Line) -> Line:
    """At most MOST_POINTS means over equal stretches of points, so that thinning shows no chance swings."""
    size = -(-len(line.xs) // MOST_POINTS)
    if size <= 1:
        return line
    parts = [slice(i, i + size) for i in range(0, len(line.xs), size)]
    return Line(
        line.name, [_mean(line.xs[p]) for p in parts], [_mean(line.ys[p]) for p in parts], line.smooth, line.colour
    )


def smoothed(values: Sequence[float]) -> list[float]:
    """Mean over a window of a twentieth of the curve around each point, narrower at its ends, so that it neither lags nor leans."""
    widest = max(1, len(values) // 40)
    means = []
    for i in range(len(values)):
        reach = min(widest, i, len(values) - 1 - i)
        means.append(_mean(values[i - reach : i + reach + 1]))
    return means


def chart(
    title: str,
    lines: Iterable[Line],
    *,
    words: str = "",
    from_zero: bool = False,
    show: Any = number,
    show_x: Any = number,
) -> str:
    """A line chart as a card. The curves are SVG that stretches with the page; the ticks are text, which does not."""
    drawn = [thin(_finite(line)) for line in lines]
    drawn = [line for line in drawn if line.xs]
    if not drawn:
        return ""
    lows, highs = zip(*(_range(line) for line in drawn), strict=True)
    # Round numbers of what is written: bytes are written in powers of two.
    unit = 1 if show is not gibibytes else 2**30 if max(highs) >= 2**30 else 2**20
    y_ticks = [unit * tick for tick in ticks(0.0 if from_zero else min(lows) / unit, max(highs) / unit, 4)]
    left, right = min(min(line.xs) for line in drawn), max(max(line.xs) for line in drawn)
    bottom, top = y_ticks[0], y_ticks[-1]

    def x_of(x: float) -> float:
        return 1000 * (x - left) / (right - left) if right > left else 500.0

    def y_of(y: float) -> float:
        return min(1000.0, max(0.0, 1000 * (top - y) / (top - bottom)))

    def path(xs: Sequence[float], ys: Sequence[float], style: str, colour: str) -> str:
        points = " L".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in zip(xs, ys, strict=True))
        # A single point would be invisible: the round cap draws it as a dot.
        points = points if len(xs) > 1 else f"{points} h0.01"
        return f'<path class="{style}" stroke="var(--{colour})" d="M{points}"/>'

    curves = []
    for line, colour in zip(drawn, _colours(drawn), strict=True):
        if line.smooth and len(line.xs) >= 8:
            curves.append(path(line.xs, line.ys, "faint", colour))
            curves.append(path(line.xs, smoothed(line.ys), "line", colour))
        else:
            curves.append(path(line.xs, line.ys, "line", colour))
    rules = "".join(f'<path class="rule" d="M0 {y_of(tick):.1f} H1000"/>' for tick in y_ticks)
    labels = "".join(f'<span class="tick y" style="top:{y_of(tick) / 10:.2f}%">{show(tick)}</span>' for tick in y_ticks)
    labels += "".join(
        f'<span class="tick x" style="left:{x_of(x) / 10:.2f}%">{show_x(x)}</span>' for x in _x_ticks(left, right)
    )
    key = "" if len(drawn) == 1 else _key([line.name for line in drawn], _colours(drawn))
    words = words or f"last {show(drawn[0].ys[-1])}"
    ranges = f'data-x="{left:.10g} {right:.10g}" data-y="{bottom:.10g} {top:.10g}"'
    return (
        f'<section class="card"><header><h3>{escape(title)}</h3><span>{escape(words)}</span></header><div class="plot">'
        f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" {ranges} role="img" aria-label="{escape(title)}: {escape(words)}">'
        f"{rules}{''.join(curves)}</svg>{labels}</div>{key}</section>"
    )


def _x_ticks(left: float, right: float) -> list[float]:
    """Round steps within the chart, or its one step."""
    return [x for x in ticks(left, right, 4) if left <= x <= right] if right > left else [left]


def _finite(line: Line) -> Line:
    kept = [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if isinstance(y, int | float) and math.isfinite(y)]
    return Line(line.name, [x for x, _ in kept], [float(y) for _, y in kept], line.smooth, line.colour)


def _range(line: Line) -> tuple[float, float]:
    """Range of the curve without the few highest points (the first loss, a spike), which would flatten the rest."""
    ordered = sorted(line.ys)
    return ordered[0], ordered[min(len(ordered) - 1, math.ceil(len(ordered) * 0.99))] if len(
        ordered
    ) >= 100 else ordered[-1]


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _colours(lines: Sequence[Line]) -> list[str]:
    return [line.colour or colour for line, colour in zip(lines, _cycle(len(lines)), strict=True)]


def _key(names: Sequence[str], colours: Sequence[str]) -> str:
    items = zip(names, colours, strict=True)
    return (
        '<ul class="key">'
        + "".join(f'<li><i style="background:var(--{c})"></i>{escape(n)}</li>' for n, c in items)
        + "</ul>"
    )


def bars(values: Mapping[str, float], show: Any, most: float | None = None) -> str:
    """One horizontal bar per name."""
    most = most or max(values.values(), default=0.0) or 1.0
    rows = []
    for (name, value), colour in zip(values.items(), _cycle(len(values)), strict=True):
        filled = f'<i style="width:{100 * min(1.0, value / most):.2f}%;background:var(--{colour})"></i>'
        rows.append(
            f'<span>{escape(name)}</span><span class="track">{filled}</span><span class="value">{show(value)}</span>'
        )
    return f'<div class="rows">{"".join(rows)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose cells are escaped."""
    titles = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>'


def stacked(values: Mapping[str, float]) -> str:
    """One bar divided into shares, with a legend."""
    total = sum(values.values()) or 1.0
    cuts = "".join(
        f'<i style="width:{100 * value / total:.3f}%;background:var(--{colour})"></i>'
        for value, colour in zip(values.values(), _cycle(len(values)), strict=True)
    )
    return f'<div class="bar">{cuts}</div>' + _key(
        [f"{n} {percent(v / total)} ({duration(v)})" for n, v in values.items()], _cycle(len(values))
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def sparkline(values: Sequence[float]) -> str:
    """A curve as small as a word, without axes; empty for fewer than two finite values."""
    kept = thin(_finite(Line("", range(len(values)), values))).ys
    if len(kept) < 2:
        return ""
    low, high = _range(Line("", range(len(kept)), kept))
    height = (high - low) or 1.0
    points = " L".join(
        f"{100 * i / (len(kept) - 1):.1f} {min(30.0, max(0.0, 30 * (high - y) / height)):.1f}"
        for i, y in enumerate(kept)
    )
    return f'<svg class="spark" viewBox="0 0 100 30" preserveAspectRatio="none" aria-hidden="true"><path d="M{points}"/></svg>'
