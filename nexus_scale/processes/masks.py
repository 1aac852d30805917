"""What an image is drawn into: masks, 1 where it is drawn anew, and images without what lies under them.

Source: Rombach et al. 2022, section 4.5; random masks are boxes and wide strokes, like the large ones of Suvorov et al. 2022 (LaMa),
and a quarter cover everything, as for Stable Diffusion's inpainting model; their numbers and widths are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WHOLE, BOXES, OUTSIDE = 0.25, 0.5, 0.5
"""How many random masks cover everything; of the others, how many are boxes and not strokes; and of those of clips, how many cover what is
around a box."""


def without(image: Tensor, mask: Tensor) -> Tensor:
    """The image (B, C, H, W) in [-1, 1] with grey, 0, where the mask (B, 1, H, W) is at least 1/2."""
    return image * (mask < 0.5)


def mask_of_places(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A mask (B, 1, H, W) at the resolution of latents, (B, 1, h, w): that of each place's first pixel, as diffusers' pipelines have it."""
    return F.interpolate(mask, size=tuple(size), mode="nearest")


def random_mask(height: int, width: int, generator: np.random.Generator) -> Tensor:
    """A mask (1, H, W) float32 of boxes or of wide strokes, or of everything."""
    if generator.random() < WHOLE:
        return torch.ones(1, height, width)
    draw = _boxes if generator.random() < BOXES else _strokes
    return torch.from_numpy(draw(height, width, generator)).float()[None]


def clip_mask(height: int, width: int, generator: np.random.Generator) -> Tensor:
    """A mask (1, H, W) float32 for clips: of boxes or of wide strokes, or as often of all around a box, a half to seven eighths of each
    side, within which they are known."""
    if generator.random() < OUTSIDE:
        mask = np.ones((height, width), bool)
        sides = [max(1, round(side * generator.uniform(1 / 2, 7 / 8))) for side in (height, width)]
        _cover(mask, sides, generator, False)
    else:
        mask = (_boxes if generator.random() < BOXES else _strokes)(height, width, generator)
    return torch.from_numpy(mask).float()[None]


def _cover(mask: np.ndarray, sides: Sequence[int], generator: np.random.Generator, value: bool) -> None:
    """Sets a box of such sides somewhere in the mask."""
    top, left = (int(generator.integers(0, side - own + 1)) for side, own in zip(mask.shape, sides, strict=True))
    mask[top : top + sides[0], left : left + sides[1]] = value


def _boxes(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """One to four, each side between an eighth and a half of the image's."""
    mask = np.zeros((height, width), bool)
    for _ in range(generator.integers(1, 5)):
        sides = [max(1, int(side * generator.uniform(1 / 8, 1 / 2))) for side in (height, width)]
        _cover(mask, sides, generator, True)
    return mask


def _strokes(height: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """One to four lines with bends, as wide as a sixteenth to a fifth of the image."""
    mask = np.zeros((height, width), bool)
    rows, columns = np.mgrid[:height, :width]
    side = min(height, width)
    for _ in range(generator.integers(1, 5)):
        radius = max(1.0, side * generator.uniform(1 / 32, 1 / 10))
        at = generator.uniform((0, 0), (height, width))
        for _ in range(generator.integers(2, 7)):
            angle, length = generator.uniform(0, 2 * math.pi), side * generator.uniform(1 / 8, 1 / 2)
            to = np.clip(at + length * np.array([math.sin(angle), math.cos(angle)]), 0, (height, width))
            mask |= _distance(rows, columns, at, to) <= radius
            at = to
    return mask


def _distance(rows: np.ndarray, columns: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each pixel from the line between two points."""
    along = b - a
    share = ((rows - a[0]) * along[0] + (columns - a[1]) * along[1]) / max(float(along @ along), 1e-9)
    share = np.clip(share, 0, 1)
    return np.asarray(np.hypot(rows - a[0] - share * along[0], columns - a[1] - share * along[1]))
