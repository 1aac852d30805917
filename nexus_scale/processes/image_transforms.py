"""Random changes of images that a critic may not mind: geometry, colour, frequency bands, noise, holes. Gradients pass through, twice.

Source: Karras et al. 2020, "Training Generative Adversarial Networks with Limited Data" (ADA), appendix B, with its constants.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import UserError
from nexus_scale.kernels.transfer import constant, made_on

UNIFORMS, NORMALS = 29, 12
"""Random numbers of each sample, beside the noise itself."""

SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466, 0.787641141030194,
    0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
SYM2 = (-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025)
"""Low-pass filters of Daubechies' least asymmetric wavelets."""
BANDS = 4
BAND_POWERS = (10 / 13, 1 / 13, 1 / 13, 1 / 13)
"""Expected power of an image in each octave, lowest first."""
FARTHEST = 0.125
"""Of `xint`, a part of the image."""
AROUND = len(SYM6) // 4
"""Pixels beyond the image on each side that the filter of the geometry reaches."""


class _Columns:
    """Random numbers of each sample, one column after another, each (B,). `probability` scales the shares of `chosen`."""

    def __init__(self, uniform: Tensor, normal: Tensor, probability: Tensor | float):
        self._uniform, self._normal = iter(uniform.unbind(1)), iter(normal.unbind(1))
        self.probability = probability

    def u(self) -> Tensor:
        return next(self._uniform)

    def n(self) -> Tensor:
        return next(self._normal)

    def chosen(self, share: Tensor | float, value: Tensor, neutral: float) -> Tensor:
        """The value, with probability share * probability; else the neutral one. Values of more columns, (B, k), together."""
        here = self.u() < share * self.probability
        return torch.where(here.view(-1, *[1] * (value.dim() - 1)), value, neutral)


@dataclass(frozen=True, kw_only=True)
class ImageTransforms:
    """`transforms(x, uniform, normal, noise, probability) -> x`: each change with its share of the probability, by its published name."""

    xflip: float = 0.0
    rotate90: float = 0.0
    xint: float = 0.0
    scale: float = 0.0
    rotate: float = 0.0
    aniso: float = 0.0
    xfrac: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    lumaflip: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    imgfilter: float = 0.0
    noise: float = 0.0
    cutout: float = 0.0

    def __call__(
        self, x: Tensor, uniform: Tensor, normal: Tensor, noise: Tensor, probability: Tensor | float
    ) -> Tensor:
        """Changed images, (B, C, H, W) float32.

        Args:
            x: in [-1, 1], C is 1 or 3.
            uniform, normal: (B, UNIFORMS), (B, NORMALS).
            noise: standard normal, like x.
            probability: of a change whose share is 1.
        Raises:
            UserError: images of other channels, or smaller than a filter.
        """

        def columns(uniforms: slice, normals: slice) -> _Columns:
            return _Columns(uniform[:, uniforms], normal[:, normals], probability)

        if x.shape[1] not in (1, 3):
            raise UserError(
                f"augment: got images of {x.shape[1]} channels; expected 1 or 3: set objective.augment to null"
            )
        free = self.scale or self.rotate or self.aniso or self.xfrac
        if free or self.xflip or self.rotate90 or self.xint:
            # A turn by 90 degrees leaves an image that is not square.
            reach = 1.0 if free or (self.rotate90 and x.shape[2] != x.shape[3]) else FARTHEST
            x = warped(x, self._geometry(columns(slice(0, 14), slice(0, 4)), x.shape[2], x.shape[3]), reach)
        if self.brightness or self.contrast or self.lumaflip or self.hue or self.saturation:
            x = self._coloured(x, columns(slice(14, 21), slice(4, 7)))
        if self.imgfilter:
            x = self._filtered(x, columns(slice(21, 25), slice(7, 11)))
        if self.noise:
            column = columns(slice(25, 26), slice(11, 12))
            x = x + noise * column.chosen(self.noise, 0.1 * column.n().abs(), 0.0)[:, None, None, None]
        return self._cut(x, columns(slice(26, 29), slice(0, 0))) if self.cutout else x

    def _geometry(self, column: _Columns, height: int, width: int) -> Tensor:
        """(B, 3, 3): where a place of the result is taken from, in pixels from the middle."""
        u, n, chosen = column.u, column.n, column.chosen
        flip = chosen(self.xflip, (2 * u()).floor(), 0.0)
        place = _scaling(1 - 2 * flip, torch.ones_like(flip))
        place = place @ _rotation(math.pi / 2 * chosen(self.rotate90, (4 * u()).floor(), 0.0))
        shift = chosen(self.xint, FARTHEST * (2 * torch.stack([u(), u()], dim=1) - 1), 0.0)
        place = place @ _translation(-(shift[:, 0] * width).round(), -(shift[:, 1] * height).round())
        size = chosen(self.scale, (0.2 * n()).exp2(), 1.0)
        place = place @ _scaling(1 / size, 1 / size)
        place = place @ _rotation(self._turn(column))
        aspect = chosen(self.aniso, (0.2 * n()).exp2(), 1.0)
        place = place @ _scaling(1 / aspect, aspect)
        place = place @ _rotation(self._turn(column))
        shift = chosen(self.xfrac, 0.125 * torch.stack([n(), n()], dim=1), 0.0)
        return place @ _translation(-shift[:, 0] * width, -shift[:, 1] * height)

    def _turn(self, column: _Columns) -> Tensor:
        """The angle of one of two rotations; either is there with probability `rotate`."""
        angle = math.pi * (2 * column.u() - 1)
        left = 1 - self.rotate * torch.as_tensor(column.probability, dtype=torch.float32)
        return torch.where(column.u() < 1 - left.clamp(0, 1).sqrt(), angle, 0.0)

    def _coloured(self, x: Tensor, column: _Columns) -> Tensor:
        """An affine map of each pixel's colour. Lightness lies along (1, 1, 1)."""
        u, n, chosen = column.u, column.n, column.chosen
        grey = constant((1 / 3,) * 9, x.dtype, x.device).view(3, 3)  # the projection onto lightness
        around = constant(tuple(k / math.sqrt(3) for k in (0, -1, 1, 1, 0, -1, -1, 1, 0)), x.dtype, x.device).view(3, 3)
        unit = constant((1.0, 0, 0, 0, 1, 0, 0, 0, 1), x.dtype, x.device).view(3, 3)
        bright = chosen(self.brightness, 0.2 * n(), 0.0)
        contrast = chosen(self.contrast, (0.5 * n()).exp2(), 1.0)
        flip = chosen(self.lumaflip, (2 * u()).floor(), 0.0)[:, None, None]
        hue = chosen(self.hue, math.pi * (2 * u() - 1), 0.0)[:, None, None]
        saturation = chosen(self.saturation, n().exp2(), 1.0)[:, None, None]
        turn = grey + hue.cos() * (unit - grey) + hue.sin() * around  # Rodrigues
        colour = (grey + saturation * (unit - grey)) @ turn @ (unit - 2 * flip * grey)  # (B, 3, 3)
        matrix = colour * contrast[:, None, None]
        offset = matrix.sum(2) * bright[:, None]  # brightness comes first, so that of it goes through the rest, too
        if x.shape[1] == 1:
            matrix, offset = matrix.sum((1, 2), keepdim=True) / 3, offset.mean(1, keepdim=True)
        return (matrix @ x.flatten(2) + offset[:, :, None]).view_as(x)

    def _filtered(self, x: Tensor, column: _Columns) -> Tensor:
        """Octaves made louder and softer; the expected power stays."""
        bands = constant(filter_bank(), x.dtype, x.device).view(BANDS, -1)  # (bands, taps)
        powers = constant(BAND_POWERS, x.dtype, x.device)
        if min(x.shape[2:]) <= bands.shape[1] // 2:
            raise UserError(
                f"augment: images of {x.shape[2]} x {x.shape[3]} are smaller than the filter of `imgfilter` reaches; expected more than "
                f"{bands.shape[1] // 2} pixels, or objective.augment without it"
            )
        gain = torch.ones_like(bands[:, 0])  # (bands,)
        for band in range(BANDS):
            own = column.chosen(self.imgfilter, column.n().exp2(), 1.0)[:, None]  # (B, 1)
            only = constant(tuple(float(i == band) for i in range(BANDS)), x.dtype, x.device)
            louder = 1 + only * (own - 1)  # (B, bands)
            gain = gain * louder / (powers * louder.square()).sum(1, keepdim=True).sqrt()
        taps = (gain @ bands).repeat_interleave(x.shape[1], dim=0)[:, None]  # (B C, 1, taps)
        h = F.pad(x, [bands.shape[1] // 2] * 4, mode="reflect").flatten(0, 1)[None]
        h = F.conv2d(h, taps[:, :, None], groups=len(taps))
        return F.conv2d(h, taps[..., None], groups=len(taps)).view_as(x)

    def _cut(self, x: Tensor, column: _Columns) -> Tensor:
        """A rectangle of half the height and width around a place in the image is black."""
        half = column.chosen(self.cutout, torch.full_like(x[:, 0, 0, 0], 0.25), 0.0)[:, None]
        inside = [
            (((torch.arange(length, device=x.device) + 0.5) / length - column.u()[:, None]).abs() < half)
            for length in (x.shape[3], x.shape[2])
        ]  # (B, W), (B, H)
        return x * ~(inside[0][:, None, None, :] & inside[1][:, None, :, None])


# ------------------------------------------------------------------------------------------------- geometry


def _matrix(*values: Tensor | float) -> Tensor:
    """(B, 3, 3) from the nine values of its rows, each (B,) or a number."""
    like = next(value for value in values if isinstance(value, Tensor))
    full = [value if isinstance(value, Tensor) else torch.full_like(like, value) for value in values]
    return torch.stack(full, dim=1).view(-1, 3, 3)


def _scaling(x: Tensor, y: Tensor) -> Tensor:
    return _matrix(x, 0.0, 0.0, 0.0, y, 0.0, 0.0, 0.0, 1.0)


def _translation(x: Tensor, y: Tensor) -> Tensor:
    return _matrix(1.0, 0.0, x, 0.0, 1.0, y, 0.0, 0.0, 1.0)


def _rotation(angle: Tensor) -> Tensor:
    cos, sin = angle.cos(), angle.sin()
    return _matrix(cos, -sin, 0.0, sin, cos, 0.0, 0.0, 0.0, 1.0)


def warped(x: Tensor, place: Tensor, reach: float = 1.0) -> Tensor:
    """Images (B, C, H, W) whose pixels come from elsewhere in x, which goes on beyond its edges in a mirror.

    They are sampled at twice the size between two orthogonal low-pass filters. How far the mirror reaches does not depend on the places,
    so that a sample does not depend on the others, nor the host on values.

    Args:
        place: (B, 3, 3), see `ImageTransforms`; homogeneous, (x, y, 1) in pixels from the middle.
        reach: how far beyond each edge places lie at most, as a part of the longer side; at most a whole image.
    """
    batch, channels, height, width = x.shape
    beyond = math.ceil(reach * max(height, width)) + 2 * AROUND
    up, down = (made_on(doubling, (length, min(beyond, length - 1)), x.device) for length in (height, width))
    h = up.to(x.dtype) @ x @ down.to(x.dtype).T  # (B, C, 2 (H + 2 beyond), 2 (W + 2 beyond))
    inner = 2 * (height + 2 * AROUND), 2 * (width + 2 * AROUND)
    # A place p at the size of x is 2 p - 1/2 at twice the size; then both ends count in halves of their image.
    half = place.new_full((len(place),), 0.5)
    place = _two(place, 2.0, 2.0) @ place @ _two(place, 0.5, 0.5)
    place = _translation(-half, -half) @ place @ _translation(half, half)
    place = _two(place, 2 / h.shape[3], 2 / h.shape[2]) @ place @ _two(place, inner[1] / 2, inner[0] / 2)
    h = sampled(h, F.affine_grid(place[:, :2], [batch, channels, *inner], align_corners=False))
    up, down = (made_on(halving, (length,), x.device) for length in (height, width))
    return up.to(x.dtype) @ h @ down.to(x.dtype).T


def _two(like: Tensor, x: float, y: float) -> Tensor:
    return constant((x, 0.0, 0.0, 0.0, y, 0.0, 0.0, 0.0, 1.0), like.dtype, like.device).view(3, 3)


@cache
def doubling(length: int, beyond: int) -> Tensor:
    """(2 (length + 2 beyond), length): a row or column of pixels, with its mirror images, at twice the size."""
    taps, middle = 2 * np.array(SYM6) / sum(SYM6), len(SYM6) // 2 - 1
    made = np.zeros((2 * (length + 2 * beyond), length))
    for place in range(-beyond, length + beyond):
        pixel = length - 1 - abs(length - 1 - abs(place))
        first = 2 * (place + beyond) - middle
        for number, tap in enumerate(taps):
            if 0 <= first + number < len(made):
                made[first + number, pixel] += tap
    return torch.from_numpy(made).float()


@cache
def halving(length: int) -> Tensor:
    """(length, 2 (length + 2 AROUND)): back to the size, without what lies around."""
    made = np.zeros((length, 2 * (length + 2 * AROUND)))
    for place in range(length):
        made[place, 2 * place + 1 + np.arange(len(SYM6))] = np.array(SYM6) / sum(SYM6)
    return torch.from_numpy(made).float()


class _Sampled(torch.autograd.Function):
    """`F.grid_sample` for x alone. torch's has no second derivative; it is linear in x, and so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = x.shape
        return F.grid_sample(x, grid, align_corners=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Spread.apply(gradient, ctx.saved_tensors[0], ctx.shape), None


class _Spread(torch.autograd.Function):
    """The gradient of `_Sampled`."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        if gradient.is_cuda and torch.are_deterministic_algorithms_enabled():
            return spread_in_order(gradient, grid, shape)
        backward = torch.ops.aten.grid_sampler_2d_backward
        of_x: Tensor = backward(gradient, gradient.new_zeros(shape), grid, 0, 0, False, (True, False))[0]
        return of_x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _Sampled.apply(gradient, ctx.saved_tensors[0]), None, None


def spread_in_order(gradient: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of `sampled` to x of a shape, by sums that torch has a form of on a GPU which repeats to the bit; `grid_sample`'s own
    has none."""
    batch, channels, height, width = shape
    x, y = (((grid[..., i] + 1) * size - 1) / 2 for i, size in enumerate((width, height)))  # (B, h, w), in pixels
    rows = gradient.permute(0, 2, 3, 1).reshape(-1, channels)
    image = torch.arange(batch, device=grid.device).view(-1, 1, 1)
    found = gradient.new_zeros(batch * height * width, channels)
    for right, down in itertools.product((0, 1), (0, 1)):
        column, row = x.floor() + right, y.floor() + down
        share = (1 - (x - column).abs()) * (1 - (y - row).abs())
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        place = (image * height + row.clamp(0, height - 1).long()) * width + column.clamp(0, width - 1).long()
        spread = torch.where(inside.flatten()[:, None], rows * share.flatten()[:, None], 0.0)
        found.index_add_(0, place.flatten(), spread)
    return found.view(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()


def sampled(x: Tensor, grid: Tensor) -> Tensor:
    """Bilinear samples of x (B, C, H, W) at `grid` (B, h, w, 2), zeros outside; (B, C, h, w)."""
    samples: Tensor = _Sampled.apply(x, grid)
    return samples


# ------------------------------------------------------------------------------------------------- bands


@cache
def filter_bank() -> tuple[float, ...]:
    """Taps of the filters of octaves, lowest first, one after another; they add up to the identity."""
    low = np.array(SYM2)
    high = low * (-1.0) ** np.arange(len(low))
    low, high = (np.convolve(taps, taps[::-1]) / 2 for taps in (low, high))
    bank = np.eye(BANDS, 1)
    for band in range(1, BANDS):
        apart = np.zeros((BANDS, 2 * bank.shape[1] - 1))
        apart[:, ::2] = bank
        bank = np.stack([np.convolve(row, low) for row in apart])
        first = (bank.shape[1] - len(high)) // 2
        bank[band, first : first + len(high)] += high
    return tuple(bank.flatten().tolist())
