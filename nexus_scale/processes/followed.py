"""Pictures made of pictures without a network: what a drawing is to follow. Each takes and gives bytes, (3, H, W) uint8.

Source: Canny 1986, as OpenCV has it (3 x 3 Sobel, L1 norm), with the thresholds of Zhang et al. 2023 (ControlNet); the others' numbers are
ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import UserError

TANGENT = 13573
"""Of 22.5 degrees, times 2^15: gradients are compared with it in whole numbers, as OpenCV does."""


@dataclass(frozen=True)
class Canny:
    """White edges on black: where the gradient is largest along its own direction, above `high`, or above `low` and joined to such."""

    name: ClassVar[str] = "canny"
    low: float = 100.0
    high: float = 200.0

    def __call__(self, image: Tensor) -> Tensor:
        if not 0 <= self.low <= self.high:
            raise UserError(f"canny: got low {self.low:g}, high {self.high:g}; expected 0 <= low <= high")
        dx, dy = self._gradients(image)
        size = dx.abs() + dy.abs()
        around = F.pad(size, (1, 1, 1, 1))
        h, w = size.shape

        def at(down: int, right: int) -> Tensor:
            return around[1 + down : 1 + down + h, 1 + right : 1 + right + w]

        x, y = dx.abs() * TANGENT, dy.abs() << 15
        flat, steep = y < x, y > x + (dx.abs() << 16)
        falls = (dx < 0) != (dy < 0)
        slanted = torch.where(falls, (size > at(-1, 1)) & (size > at(1, -1)), (size > at(-1, -1)) & (size > at(1, 1)))
        along = torch.where(flat, (size > at(0, -1)) & (size >= at(0, 1)), (size > at(-1, 0)) & (size >= at(1, 0)))
        thin = torch.where(flat | steep, along, slanted) & (size > int(self.low))
        edges = _joined(thin & (size > int(self.high)), thin)
        return (edges.to(torch.uint8) * 255).expand(3, -1, -1)

    @staticmethod
    def _gradients(image: Tensor) -> tuple[Tensor, Tensor]:
        """Of the channel that changes most at each place, (H, W) int64."""
        padded = F.pad(image[None].float(), (1, 1, 1, 1), mode="replicate")
        kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
        both = F.conv2d(padded.transpose(0, 1), torch.stack((kernel, kernel.T))[:, None]).long()  # (3, 2, H, W)
        largest = both.abs().sum(1).argmax(0)
        dx, dy = both.gather(0, largest.expand(1, 2, -1, -1))[0]
        return dx, dy


@dataclass(frozen=True)
class Blur:
    """The picture without what is smaller than `radius` pixels, the deviation of a Gaussian."""

    name: ClassVar[str] = "blur"
    radius: float = 4.0

    def __call__(self, image: Tensor) -> Tensor:
        if not 0 < self.radius <= 1000:
            raise UserError(f"blur: got radius {self.radius:g}; expected above 0, at most 1000")
        return _bytes(_blurred(image.float(), self.radius))


@dataclass(frozen=True)
class LowResolution:
    """The picture as means of squares of `factor` pixels, made as large as it was."""

    name: ClassVar[str] = "low_resolution"
    factor: int = 4

    def __call__(self, image: Tensor) -> Tensor:
        size = (max(1, image.shape[1] // self.factor), max(1, image.shape[2] // self.factor))
        small = F.adaptive_avg_pool2d(image.float(), size)
        return _bytes(F.interpolate(small[None], image.shape[1:], mode="bilinear")[0])


@dataclass(frozen=True)
class Sketch:
    """White strokes on black: what is darker by `contrast` than what lies around it, within some `radius`."""

    name: ClassVar[str] = "sketch"
    radius: float = 4.0
    contrast: float = 12.0

    def __call__(self, image: Tensor) -> Tensor:
        grey = _grey(image)
        strokes = _blurred(grey, self.radius) - grey > self.contrast
        return (strokes.to(torch.uint8) * 255).expand(3, -1, -1)


@dataclass(frozen=True)
class Silhouette:
    """White where the picture is not its background: where it differs by `contrast` from the median colour of its border."""

    name: ClassVar[str] = "silhouette"
    contrast: float = 16.0

    def __call__(self, image: Tensor) -> Tensor:
        border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1).float()
        away = (image.float() - border.median(dim=1).values[:, None, None]).abs().amax(0, keepdim=True)
        return ((away > self.contrast).to(torch.uint8) * 255).expand(3, -1, -1)


Maker = Canny | Blur | LowResolution | Sketch | Silhouette
MAKERS: Mapping[str, type[Maker]] = {cls.name: cls for cls in (Canny, Blur, LowResolution, Sketch, Silhouette)}


def maker(name: str, settings: Mapping[str, Any]) -> Maker:
    """The maker of that name.

    Raises:
        UserError: no such maker, or settings that it has none of.
    """
    if name not in MAKERS:
        raise UserError(f"no maker {name!r} of conditions; expected {', '.join(MAKERS)}")
    known = [one.name for one in dataclasses.fields(MAKERS[name])]
    if wrong := sorted(set(settings) - set(known)):
        raise UserError(f"{name}: has no {', '.join(wrong)}; expected {', '.join(known)}")
    return MAKERS[name](**settings)


def _joined(seeds: Tensor, within: Tensor) -> Tensor:
    """The places `within` that are joined to seeds through their eight neighbours."""
    while True:
        grown = F.max_pool2d(seeds[None].float(), 3, 1, 1)[0].bool() & within
        if torch.equal(grown, seeds):
            return seeds
        seeds = grown


def _grey(image: Tensor) -> Tensor:
    """(1, H, W), by ITU-R 601."""
    return (image.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True)


def _blurred(image: Tensor, radius: float) -> Tensor:
    """(C, H, W) float32, along one axis after the other; borders repeat."""
    reach = max(1, round(3 * radius))
    places = torch.arange(-reach, reach + 1).float()
    kernel = torch.exp(-0.5 * (places / radius) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(image[:, None], (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))[:, 0]


def _bytes(image: Tensor) -> Tensor:
    return image.round().clamp(0, 255).to(torch.uint8)
