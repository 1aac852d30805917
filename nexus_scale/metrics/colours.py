"""Which colours a picture has, by rules on its pixels: whether it is of the colour that its caption names."""

from __future__ import annotations

import re

import torch
from torch import Tensor

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "grey")
"""Colours that are told apart. White is not among them: it is what pictures lie on."""

_HUES = (
    (0, "red"),
    (18, "orange"),
    (44, "yellow"),
    (70, "green"),
    (165, "blue"),
    (260, "purple"),
    (300, "pink"),
    (345, "red"),
)
"""From which hue on, in degrees, a colour begins. Not from a public source: set by eye on OpenMoji's palette."""

_SAID = re.compile(rf"\b({'|'.join(COLOURS)}|gray|violet)\b(?! hair)", re.IGNORECASE)
_OTHER_NAMES = {"gray": "grey", "violet": "purple"}

LEAST = 0.25
"""The share of what is painted that a named colour has at least; line drawings are a third black."""


def colour_said(caption: str) -> str | None:
    """The one colour that a caption names, of the thing and not of its hair; None where it names none or several."""
    found = {_OTHER_NAMES.get(word.lower(), word.lower()) for word in _SAID.findall(caption)}
    return found.pop() if len(found) == 1 else None


def colour_shares(images: Tensor) -> Tensor:
    """The share of each of COLOURS among the pixels of an image that are not nearly white, (B, 10) float32; zeros for a white image.

    Args:
        images: (B, 3, H, W) in [-1, 1].
    """
    x = ((images.float() + 1) / 2).clamp(0, 1)
    value, least = x.amax(1), x.amin(1)  # (B, H, W)
    chroma = value - least
    red, green, blue = x.unbind(1)
    of_green, of_blue = (blue - red) / chroma.clamp_min(1e-6) + 2, (red - green) / chroma.clamp_min(1e-6) + 4
    hue = (
        torch.where(
            value == red, ((green - blue) / chroma.clamp_min(1e-6)) % 6, torch.where(value == green, of_green, of_blue)
        )
        * 60
    )
    saturation = chroma / value.clamp_min(1e-6)
    bounds = torch.tensor([bound for bound, _ in _HUES[1:]], dtype=hue.dtype, device=hue.device)
    names = torch.tensor([COLOURS.index(name) for _, name in _HUES], device=hue.device)
    colour = names[torch.bucketize(hue, bounds, right=True)]

    def of(name: str, where: Tensor) -> None:
        colour[where] = COLOURS.index(name)

    of("pink", ((hue < 18) | (hue >= 345)) & (saturation < 0.55) & (value > 0.75))
    of("brown", (hue > 8) & (hue < 44) & (value < 0.7))
    of("grey", saturation < 0.15)
    of("black", value < 0.22)
    painted = ~((value > 0.88) & (saturation < 0.1))
    counts = torch.stack([((colour == number) & painted).flatten(1).sum(1) for number in range(len(COLOURS))], dim=1)
    return counts / painted.flatten(1).sum(1, keepdim=True).clamp_min(1)


def colour_follows(shares: Tensor, captions: list[str]) -> Tensor:
    """1 where an image has the colour that its caption names for at least a quarter of what is painted, else 0; nan where none is named.

    Args:
        shares: see `colour_shares`, (B, 10).
    """
    answers = torch.full((len(captions),), torch.nan)
    for row, caption in enumerate(captions):
        if (said := colour_said(caption)) is not None:
            answers[row] = float(shares[row, COLOURS.index(said)] >= LEAST)
    return answers
