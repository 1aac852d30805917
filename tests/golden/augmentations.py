"""What the published augmentations of GANs make of images: `python -m tests.golden.augmentations ADA DIFF`, where ADA holds `training`,
`torch_utils` and `dnnlib` of github.com/NVlabs/stylegan2-ada-pytorch, and DIFF holds DiffAugment_pytorch.py of
github.com/mit-han-lab/data-efficient-gans.

Writes augmentations.npz beside this file: images, the random numbers that were used, one column after another, results, and gradients at
the images of the sum of the results with given weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".npz")
BGC = (
    "xflip",
    "rotate90",
    "xint",
    "scale",
    "rotate",
    "aniso",
    "xfrac",
    "brightness",
    "contrast",
    "lumaflip",
    "hue",
    "saturation",
)
CASES: dict[str, tuple[tuple[int, ...], tuple[str, ...], float]] = {
    "colours": ((4, 3, 9, 14), BGC, 0.7),
    "grey": ((3, 1, 13, 8), BGC, 0.9),
    "all": ((2, 3, 23, 25), (*BGC, "imgfilter", "noise", "cutout"), 0.8),
}
"""Shapes, changes, and their probability."""


class Recorded:
    """Takes the place of torch's generators; keeps what they gave, (B, columns) each."""

    def __init__(self) -> None:
        self.drawn = np.random.Generator(np.random.PCG64(3))
        self.uniform: list[Tensor] = []
        self.normal: list[Tensor] = []
        self.noise = torch.zeros(0)

    def rand(self, *shape: Any, **rest: Any) -> Tensor:
        made = torch.from_numpy(self.drawn.random(_sizes(shape))).float()
        self.uniform.append(made.flatten(1))
        return made

    def randn(self, *shape: Any, **rest: Any) -> Tensor:
        made = torch.from_numpy(self.drawn.standard_normal(_sizes(shape))).float()
        if len(made.shape) == 4 and made[0].numel() > 1:
            self.noise = made
        else:
            self.normal.append(made.flatten(1))
        return made

    def randint(self, low: int, high: int, size: Any, **rest: Any) -> Tensor:
        return (self.rand(size) * (high - low)).floor().long() + low


def _sizes(shape: tuple[Any, ...]) -> tuple[int, ...]:
    sizes = shape[0] if isinstance(shape[0], (list, tuple)) else shape
    return (sizes[0], 1) if len(sizes) == 1 else tuple(sizes)


def recorded(change: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> dict[str, Tensor]:
    own = Recorded()
    x = torch.from_numpy(own.drawn.uniform(-1, 1, shape)).float().requires_grad_()
    kept = torch.rand, torch.randn, torch.randint

    def flat(make: Any) -> Any:  # theirs are (B,) where ours has a column
        def made(*sizes: Any, **rest: Any) -> Tensor:
            value: Tensor = make(*sizes, **rest)
            return value[:, 0] if isinstance(sizes[0], list) and len(sizes[0]) == 1 else value

        return made

    torch.rand, torch.randn, torch.randint = flat(own.rand), flat(own.randn), own.randint  # type: ignore[assignment]
    try:
        y = change(x)
    finally:
        torch.rand, torch.randn, torch.randint = kept  # type: ignore[assignment]
    weights = torch.from_numpy(own.drawn.standard_normal(shape)).float()
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    found = {
        "x": x.detach(),
        "y": y.detach(),
        "weights": weights,
        "gradient": gradient,
        "uniform": torch.cat(own.uniform, 1),
    }
    return found | ({"normal": torch.cat(own.normal, 1), "noise": own.noise} if own.normal else {})


def main(ada: str, diff: str) -> None:
    sys.path[:0] = [ada, diff]
    from DiffAugment_pytorch import DiffAugment  # type: ignore[import-not-found]
    from training.augment import AugmentPipe  # type: ignore[import-not-found]

    found: dict[str, Tensor] = {}
    for name, (shape, changes, probability) in CASES.items():
        pipe = AugmentPipe(**dict.fromkeys(changes, 1))
        pipe.p.fill_(probability)
        found |= {f"{name}/{key}": value for key, value in recorded(pipe, shape).items()}
    for name, shape in (("diff", (4, 3, 9, 14)), ("diff even", (3, 1, 16, 8))):
        values = recorded(lambda x: DiffAugment(x, policy="color,translation,cutout"), shape)
        found |= {f"{name}/{key}": value for key, value in values.items()}
    np.savez_compressed(FILE, **{name: value.numpy() for name, value in found.items()})  # type: ignore[arg-type]


if __name__ == "__main__":
    main(*sys.argv[1:])
