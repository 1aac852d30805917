"""Images side by side in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAD = 2
"""Pixels around each image of a grid."""


def columns_of(count: int) -> int:
    """A number of columns that makes a grid a little wider than high."""
    return next(
        (c for c in range(int(np.ceil(count**0.5)), min(count, 12) + 1) if count % c == 0), int(np.ceil(count**0.5))
    )


def make_grid(images: Sequence[Any], columns: int | None = None, captions: Sequence[str] | None = None) -> Image.Image:
    """Lays images out in rows.

    Args:
        images: (H, W, 3) uint8 arrays; each cell has the size of the largest.
        columns: images in a row; None chooses.
        captions: one per image, drawn beneath it and cut to its width; needs images some 64 pixels wide to be readable.
    Raises:
        ValueError: no image, or one of another type or shape.
    """
    arrays = [np.asarray(image) for image in images]
    if not arrays:
        raise ValueError("make_grid: got no image; expected at least one")
    for array in arrays:
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise ValueError(f"make_grid: got {array.dtype} of shape {array.shape}; expected uint8 (H, W, 3)")
    if captions is not None and len(captions) != len(arrays):
        raise ValueError(f"make_grid: got {len(captions)} captions for {len(arrays)} images; expected as many")
    columns = columns or columns_of(len(arrays))
    rows = -(-len(arrays) // columns)
    height, width = max(a.shape[0] for a in arrays), max(a.shape[1] for a in arrays)
    text = 14 if captions is not None else 0
    grid = Image.new("RGB", (columns * (width + PAD) + PAD, rows * (height + text + PAD) + PAD), "white")
    draw = ImageDraw.Draw(grid)
    for i, array in enumerate(arrays):
        x = PAD + i % columns * (width + PAD)
        y = PAD + i // columns * (height + text + PAD)
        grid.paste(Image.fromarray(array), (x, y))
        if captions is not None:
            draw.text(
                (x, y + height), _cut(captions[i], width, draw), fill="black", font=ImageFont.load_default(size=10)
            )
    return grid


def _cut(caption: str, width: int, draw: ImageDraw.ImageDraw) -> str:
    """One line of text that fits the width, cut with an ellipsis where it is longer."""
    # Nearly all letters are wider than two pixels; a text that is much longer is not measured.
    line = " ".join("".join(c for c in caption[: 4 * width + 64] if c.isprintable() or c.isspace()).split())
    font = ImageFont.load_default(size=10)
    if len(caption) <= 4 * width + 64 and draw.textlength(line, font=font) <= width:
        return line
    fits, too_long = 0, len(line) + 1
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if draw.textlength(line[:middle] + "…", font=font) <= width:
            fits = middle
        else:
            too_long = middle
    return line[:fits] + "…"
