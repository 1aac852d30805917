"""What public GAN networks compute: `python -m tests.golden.gan_networks EXAMPLES MIMICRY`.

EXAMPLES is a checkout of pytorch/examples, MIMICRY an unpacked torch-mimicry 0.1.16 (PyPI), of which what draws metrics is stood in for.
Writes gan_networks.npz beside this file: of small networks all weights, what goes in and comes out in training mode, and the gradients of
a weighted sum of it. Mimicry doubles resolutions bilinearly, and its ReLUs change what shortcuts are given; here neither, as in
the authors' code (pfnet-research/sngan_projection). Its spectral norms are given the singular vectors to begin with.
"""

from __future__ import annotations

import ast
import importlib
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

FILE = Path(__file__).with_suffix(".npz")
NOISE, CLASSES = 5, 3
DCGAN = {"nz": NOISE, "ngf": 1, "ndf": 2, "nc": 1}
INTERPOLATE = F.interpolate


def waves(shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Numbers in [-1, 1] of no pattern that a network could like, which need not be kept."""
    return torch.sin(torch.arange(torch.Size(shape).numel(), dtype=torch.float64).square() * 0.7).float().view(shape)


def singular(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The first singular vectors of a weight (N, ...) as a matrix: left (N,), right."""
    left, _, right = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
    return left[:, 0].to(weight.dtype), right[0].to(weight.dtype)


def recorded(name: str, net: nn.Module, shape: tuple[int, ...], *label: Tensor) -> dict[str, np.ndarray]:
    """Weights of the network, which are drawn here, its output for `waves` of a shape, and gradients of the output times waves."""
    x = waves(shape).requires_grad_()
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    with torch.no_grad():
        for key, value in net.named_parameters():
            fan = value[0].numel() if value.ndim > 1 else 4
            value.copy_(torch.randn(value.shape) / fan**0.5 + (value.ndim == 1 and key.endswith("weight")))
        for module in net.modules():
            for key, of in (("sn_u", "weight"), ("weight_u", "weight_orig")):
                if hasattr(module, key):
                    left = singular(getattr(module, of))[0]
                    getattr(module, key).copy_(left.view_as(getattr(module, key)))
    out = net(x, *label)
    gradients = torch.autograd.grad((out * waves(out.shape)).sum(), [x, *net.parameters()])
    found = {"out": out, "gradient/in": gradients[0]}
    for (key, value), gradient in zip(net.named_parameters(), gradients[1:], strict=True):
        found[f"weight/{key}"], found[f"gradient/{key}"] = value, gradient
    return {f"{name}/{key}": value.detach().numpy() for key, value in found.items()}


def of_examples(folder: Path) -> dict[str, np.ndarray]:
    """The classes of dcgan/main.py, which trains when it is imported."""
    tree = ast.parse((folder / "dcgan" / "main.py").read_text())
    tree.body = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    names: dict[str, Any] = {"nn": nn, "torch": torch, **DCGAN}
    exec(compile(tree, "dcgan", "exec"), names)
    generator, critic = (names[name](1) for name in ("Generator", "Discriminator"))
    return {
        **recorded("dcgan_generator", generator, (3, NOISE, 1, 1)),
        **recorded("dcgan_critic", critic, (5, DCGAN["nc"], 64, 64)),
    }


def nearest(x: Tensor, scale_factor: int, mode: str, align_corners: bool) -> Tensor:
    return INTERPOLATE(x, scale_factor=scale_factor, mode="nearest")


def of_mimicry(folder: Path) -> dict[str, np.ndarray]:
    """Networks for 32 pixels; `label` of the conditional ones is 2, 0, 1, 2."""
    package = types.ModuleType("torch_mimicry")
    package.__path__ = [str(folder / "torch_mimicry")]
    nets = types.ModuleType("torch_mimicry.nets")
    nets.__path__ = [str(folder / "torch_mimicry" / "nets")]
    sys.modules.update({"torch_mimicry": package, "torch_mimicry.nets": nets})

    def made(part: str, name: str, **sizes: int) -> nn.Module:
        module = importlib.import_module(f"torch_mimicry.nets.{part}.{part}_32")
        return getattr(module, name)(**sizes)

    z, x, label = (4, NOISE), (4, 3, 32, 32), torch.tensor([2, 0, 1, 2])
    found: dict[str, np.ndarray] = {}
    with mock.patch.object(F, "interpolate", nearest):
        for part, prefix, told in (("sngan", "SNGAN", ()), ("cgan_pd", "CGANPD", (label,)), ("wgan_gp", "WGANGP", ())):
            classes = {"num_classes": CLASSES} if told else {}
            generator = made(part, f"{prefix}Generator32", ngf=4, nz=NOISE, **classes)
            critic = made(part, f"{prefix}Discriminator32", ndf=3, **classes)
            if part != "wgan_gp":  # whose generator is SNGAN's
                found |= recorded(f"{part}_generator", generator, z, *told)
            found |= recorded(f"{part}_critic", critic, x, *told)
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    np.savez_compressed(FILE, **of_examples(Path(sys.argv[1])), **of_mimicry(Path(sys.argv[2])))
