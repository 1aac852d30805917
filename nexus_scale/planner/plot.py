"""The plot of a search, as a PNG: hours and GPU hours (or cost) over the number of GPUs."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from nexus_scale.io.durable import atomic_write
from nexus_scale.planner.search import Row

SIZE, MARGIN = (1000, 640), (90, 40, 40, 70)
BLUE, RED, GREY, INK = "#1f6feb", "#cf222e", "#d8dee4", "#1f2328"


def plot(rows: Sequence[Row], file: Path, title: str, price: float | None) -> None:
    """Writes the plot of at least one row. Both axes are logarithmic: a straight line down is a cluster that is used in full."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    lines: dict[str, tuple[str, list[float]]] = {
        "hours in all, with saves and failures": (BLUE, [row.hours_in_all for row in rows]),
        "GPU hours" if price is None else f"cost, at {price:g} a GPU hour": (
            RED,
            [row.hours_in_all * row.gpus * (price or 1.0) for row in rows],
        ),
    }
    values = [value for _, series in lines.values() for value in series]
    low, high = (f(math.log10(v)) for f, v in ((math.floor, min(values)), (math.ceil, max(values))))
    high = max(high, low + 1)
    left, top, right, bottom = MARGIN[0], MARGIN[1] + 30, SIZE[0] - MARGIN[2], SIZE[1] - MARGIN[3]
    span = max(1.0, math.log2(rows[-1].gpus / rows[0].gpus))

    def x_of(gpus: float) -> float:
        return left + (right - left) * math.log2(gpus / rows[0].gpus) / span

    def y_of(value: float) -> float:
        return bottom - (bottom - top) * (math.log10(value) - low) / (high - low)

    draw.text((left, 12), title, INK, font)
    for power in range(low, high + 1):
        draw.line((left, y_of(10.0**power), right, y_of(10.0**power)), GREY)
        draw.text((left - 10, y_of(10.0**power)), f"{10.0**power:,.{max(0, -power)}f}", INK, font, anchor="rm")
    for row in rows:
        draw.text((x_of(row.gpus), bottom + 10), f"{row.gpus:,}", INK, font, anchor="ma")
    draw.text(((left + right) / 2, bottom + 36), "GPUs", INK, font, anchor="ma")
    for number, (name, (colour, series)) in enumerate(lines.items()):
        points = [(x_of(row.gpus), y_of(value)) for row, value in zip(rows, series, strict=True)]
        _curve(draw.line, draw.ellipse, points, colour)
        draw.text((left + 12, top + 8 + 22 * number), name, colour, font)
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    atomic_write(file, buffer.getvalue())


def _curve(line: Callable[..., None], dot: Callable[..., None], points: list[tuple[float, float]], colour: str) -> None:
    line(points, colour, 3)
    for x, y in points:
        dot((x - 4, y - 4, x + 4, y + 4), colour)
