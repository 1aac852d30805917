"""What the networks of pix2pix and CycleGAN compute: `python -m tests.golden.image_translation FOLDER`, where FOLDER holds `networks.py`
of github.com/junyanz/pytorch-CycleGAN-and-pix2pix (its `models`).

Writes image_translation.npz beside this file: for each case each seventh value of their networks' outputs and of the gradients at their
inputs, and the squares of the gradients of their parameters, of a sum that is weighted by place. Weights are a formula of a parameter's
place in the network, so that they need not be stored. Batch norms train on one image at a time, as pix2pix does.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FILE = Path(__file__).with_suffix(".npz")
CASES: dict[str, tuple[str, str, dict[str, int], tuple[int, int, int]]] = {
    "resnet": ("resnet", "instance", {"hidden_size": 3, "depth": 2}, (3, 12, 20)),
    "resnet affine": ("resnet", "batch", {"hidden_size": 2, "depth": 1}, (3, 8, 16)),
    "unet": ("unet", "batch", {"hidden_size": 2, "depth": 5}, (3, 32, 64)),
    "unet instance": ("unet", "instance", {"hidden_size": 2, "depth": 6}, (1, 128, 64)),
    "patches": ("patches", "batch", {"hidden_size": 3, "depth": 3}, (6, 38, 33)),
    "patches instance": ("patches", "instance", {"hidden_size": 2, "depth": 4}, (3, 70, 70)),
}
"""Network, norm, sizes and shape of an image."""


def numbers(seed: int, shape: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(tuple(shape)))


def fill(parameters: Iterable[Tensor]) -> None:
    """Gives parameters numbers by their place: matrices of the spread that keeps signals as large as they are."""
    with torch.no_grad():
        for place, parameter in enumerate(parameters):
            values = numbers(place, parameter.shape)
            fan = parameter[0].numel() if parameter.ndim > 1 else 16
            parameter.copy_((values / fan**0.5).float())  # which files of either precision hold


def image(name: str) -> Tensor:
    return numbers(1000 + list(CASES).index(name), (1, *CASES[name][3])).tanh()


def found(net: nn.Module, name: str) -> dict[str, Tensor]:
    """A network's output for a case and the gradient at its input, each seventh value; parameters get their gradients."""
    x = image(name).to(next(net.parameters()).dtype).requires_grad_()
    y = net(x)
    (y * numbers(7, y.shape).to(y.dtype)).sum().backward()
    assert x.grad is not None
    return {"y": y.detach().flatten()[::7], "x": x.grad.flatten()[::7]}


def squares(gradients: Iterable[Tensor]) -> Tensor:
    return torch.stack([gradient.square().sum() for gradient in gradients])


def theirs(networks: Any, name: str) -> nn.Module:
    kind, norm, sizes, (channels, _, _) = CASES[name]
    if norm == "batch":
        normed = functools.partial(nn.BatchNorm2d, affine=True)
    else:
        normed = functools.partial(nn.InstanceNorm2d, affine=False, track_running_stats=False)
    width, depth = sizes["hidden_size"], sizes["depth"]
    if kind == "resnet":
        made: nn.Module = networks.ResnetGenerator(channels, 3, width, norm_layer=normed, n_blocks=depth)
    elif kind == "unet":
        made = networks.UnetGenerator(channels, 3, depth, width, norm_layer=normed)
    else:
        made = networks.NLayerDiscriminator(channels, width, depth, norm_layer=normed)
    return made.double()


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    import networks  # type: ignore[import-not-found]

    stored: dict[str, np.ndarray] = {}
    for name in CASES:
        net = theirs(networks, name)
        fill(net.parameters())
        values = found(net, name)
        values["squares"] = squares(p.grad for p in net.parameters() if p.grad is not None)
        stored |= {f"{name}/{what}": value.numpy() for what, value in values.items()}
    np.savez_compressed(FILE, **stored)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1])
