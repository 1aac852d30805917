"""The Inception-v3 of FID: the network of 2015 as TensorFlow computed it, with the weights that torch-fidelity published for it.

It differs from the Inception-v3 of torchvision in its weights, its 1008 classes, and in how it pools. Images are resized to 299 x 299 by
one of two rules, and figures by one do not compare with figures by the other:

- `tensorflow`: TensorFlow 1's bilinear, corners not aligned, no antialiasing (the original FID, torch-fidelity, pytorch-fid nearly);
- `clean`: Pillow's bicubic with antialiasing, channels as float32 (clean-fid).

Sources: Szegedy et al. 2015, "Rethinking the Inception Architecture"; Heusel et al. 2017 (FID: the pooled 2048); Nash et al. 2021,
"Generating Images with Sparse Representations" (sFID: the first 7 channels of a 17 x 17 layer, `mixed_6/conv`, as ADM's evaluator);
Parmar et al. 2022, "On Aliased Resizing".
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

SIDE, POOLED, CLASSES = 299, 2048, 1008
SPATIAL, SPATIAL_CHANNELS = "Mixed_6d", 7
"""The layer that TensorFlow's graph calls mixed_6, whose 1 x 1 convolution sFID takes."""


class Inception(NamedTuple):
    """`pooled` (B, 2048) for FID and KID, `spatial` (B, 2023) for sFID, `logits` (B, 1008) without the bias, for the Inception score."""

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


class Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, stride: int = 1, padded: bool = True
    ):
        super().__init__()
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (size[0] // 2, size[1] // 2) if padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(inputs, outputs, size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


Path = tuple[tuple[str, int, int | tuple[int, int]], ...]
"""Convolutions one behind the other: name, channels, kernel."""


class Mixed(nn.Module):
    """Paths side by side, their outputs concatenated; paths that begin with the same names share these.

    Args:
        paths: the last but in `stride` 2 is of what is pooled: the mean without padding, or the maximum.
        stride: 2: the last convolution of each path and the pooling have it, and the pooled input is an output itself.
    """

    def __init__(self, inputs: int, paths: tuple[Path, ...], stride: int = 1, maximum: bool = False):
        super().__init__()
        self.paths, self.stride, self.maximum = (
            tuple(tuple(name for name, *_ in path) for path in paths),
            stride,
            maximum,
        )
        self.channels = inputs if stride == 2 else 0
        for path in paths:
            before = inputs
            for i, (name, outputs, kernel) in enumerate(path):
                if not hasattr(self, name):
                    self.add_module(name, Conv(before, outputs, kernel, stride if i == len(path) - 1 else 1))
                before = outputs
            self.channels += before

    def forward(self, x: Tensor) -> Tensor:
        made: dict[str, Tensor] = {}
        outputs = []
        for path in self.paths:
            h = self._pooled(x) if path[0] == "branch_pool" else x
            for name in path:
                made[name] = h = made[name] if name in made else self.get_submodule(name)(h)
            outputs.append(h)
        return torch.cat(outputs if self.stride == 1 else [*outputs, self._pooled(x)], 1)

    def _pooled(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return F.max_pool2d(x, 3, 2)
        if self.maximum:
            return F.max_pool2d(x, 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def _a(inputs: int, pooled: int) -> Mixed:
    five: Path = (("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5))
    three: Path = (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
    return Mixed(inputs, ((("branch1x1", 64, 1),), five, three, (("branch_pool", pooled, 1),)))


def _b(inputs: int) -> Mixed:
    three: Path = (("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3))
    return Mixed(inputs, ((("branch3x3", 384, 3),), three), stride=2)


def _c(inputs: int, c: int) -> Mixed:
    seven: Path = (("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1)))
    twice: Path = (
        ("branch7x7dbl_1", c, 1),
        ("branch7x7dbl_2", c, (7, 1)),
        ("branch7x7dbl_3", c, (1, 7)),
        ("branch7x7dbl_4", c, (7, 1)),
        ("branch7x7dbl_5", 192, (1, 7)),
    )
    return Mixed(inputs, ((("branch1x1", 192, 1),), seven, twice, (("branch_pool", 192, 1),)))


def _d(inputs: int) -> Mixed:
    seven: Path = (
        ("branch7x7x3_1", 192, 1),
        ("branch7x7x3_2", 192, (1, 7)),
        ("branch7x7x3_3", 192, (7, 1)),
        ("branch7x7x3_4", 192, 3),
    )
    return Mixed(inputs, ((("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3)), seven), stride=2)


def _e(inputs: int, maximum: bool) -> Mixed:
    one: Path = (("branch3x3_1", 384, 1),)
    two: Path = (("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3))
    paths: tuple[Path, ...] = (
        (("branch1x1", 320, 1),),
        (*one, ("branch3x3_2a", 384, (1, 3))),
        (*one, ("branch3x3_2b", 384, (3, 1))),
        (*two, ("branch3x3dbl_3a", 384, (1, 3))),
        (*two, ("branch3x3dbl_3b", 384, (3, 1))),
        (("branch_pool", 192, 1),),
    )
    return Mixed(inputs, paths, maximum=maximum)


class InceptionV3(nn.Module):
    """Images (B, 3, 299, 299) in 0..255, float32 -> `Inception`. Its state dict has the names of torch-fidelity's file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padded=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.MaxPool_1 = nn.MaxPool2d(3, 2)
        self.Conv2d_3b_1x1 = Conv(64, 80)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padded=False)
        self.MaxPool_2 = nn.MaxPool2d(3, 2)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _a(192, 32), _a(256, 64), _a(288, 64)
        self.Mixed_6a = _b(288)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
            _c(768, 128),
            _c(768, 160),
            _c(768, 160),
            _c(768, 192),
        )
        self.Mixed_7a = _d(768)
        self.Mixed_7b, self.Mixed_7c = _e(1280, maximum=False), _e(2048, maximum=True)
        self.fc = nn.Linear(POOLED, CLASSES)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Inception:
        x = (images - 128) / 128
        spatial = x
        for name, module in self.named_children():
            if name == SPATIAL:
                spatial = module.get_submodule("branch1x1")(x)[:, :SPATIAL_CHANNELS].flatten(1)
            if name != "fc":
                x = module(x)
        pooled = x.mean((2, 3))
        return Inception(pooled, spatial, F.linear(pooled, self.fc.weight))


def resized_as_tensorflow(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, 299, 299) float32 in 0..255, by TensorFlow 1's `resize_bilinear`."""
    rows, columns = (_between(size, images.device) for size in images.shape[2:])
    x = images.float()
    (top, bottom, y), (left, right, weight) = rows, columns
    x = x[..., left] + (x[..., right] - x[..., left]) * weight
    return x[..., top, :] + (x[..., bottom, :] - x[..., top, :]) * y[:, None]


def _between(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each of SIDE pixels the two of `size` that it lies between, and the share of the second."""
    place = torch.arange(SIDE, dtype=torch.float32, device=device) * (size / SIDE)
    low = place.floor().long()
    return low, (low + 1).clamp_max(size - 1), place - low


def resized_clean(images: Tensor) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, 299, 299) float32 in 0..255, as clean-fid resizes: on the host, by Pillow."""

    def one(channel: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(channel.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        return np.asarray(picture).clip(0, 255)

    flat = images.cpu().flatten(0, 1).numpy()
    made = torch.from_numpy(np.stack([one(channel) for channel in flat]))
    return made.view(*images.shape[:2], SIDE, SIDE).to(images.device)


RESIZES = {"tensorflow": resized_as_tensorflow, "clean": resized_clean}
