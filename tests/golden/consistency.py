"""What openai/consistency_models computes on known inputs: `python -m tests.golden.consistency FOLDER`.

FOLDER is a checkout of it. What it imports beside torch and numpy (piq, torchvision, mpi4py) is stood in for and not used. Writes
consistency.npz beside this file: losses and gradients of distillation and training, its schedule of scales, and samples in several steps.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".npz")
SHAPE, SCALES = (6, 3, 4, 5), 40
CASES = {
    f"{kind}/{norm}/{weight}": (kind == "cd", norm, weight)
    for kind in ("cd", "ct")
    for norm, weight in (("l2", "uniform"), ("l1", "karras"), ("l2", "snr"), ("l2", "snr+1"), ("l1", "truncated-snr"))
}
SCHEDULES = {"ct_imagenet64": (2, 200, 800_000), "ct_bedroom256": (2, 150, 1_000_000)}
STEPS_OF_RUN = (0, 1, 1000, 77_777, 400_000, 799_999)
LEVELS_DRAWN = (0, 22, 39)
"""The two-step sampling of their README: places on the scale, the last of which is not evaluated."""


def drawn(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape).astype(np.float32))


def indices() -> Tensor:
    """Places of the higher levels, counted from the highest down, (B,)."""
    return torch.tensor([0, 38, 7, 21, 30, 13])


def weights(seed: int) -> Tensor:
    return drawn(seed, (3,))


def network(x: Tensor, c_noise: Tensor, w: Tensor) -> Tensor:
    """A network of three weights."""
    t = c_noise[:, None, None, None].float()
    return w[0] * x + w[1] * torch.tanh(2 * x) * torch.cos(3 * t) + w[2] * x.roll(1, -1)


def theirs(w: Tensor) -> Callable[..., Tensor]:
    return lambda x, t: network(x, t / 1000, w)


def stand_ins() -> None:
    for name, members in (
        ("piq", {"LPIPS": object}),
        ("torchvision", {}),
        ("torchvision.transforms", {"RandomCrop": object}),
        ("cm", {"__path__": [f"{sys.argv[1]}/cm"]}),
        ("cm.dist_util", {}),
        ("cm.unet", {"UNetModel": object}),
    ):
        module = types.ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module
    sys.modules["cm"].dist_util = sys.modules["cm.dist_util"]  # type: ignore[attr-defined]


class Noise:
    def randn_like(self, x: Tensor) -> Tensor:
        return drawn(9)


def main() -> None:
    stand_ins()
    from cm import karras_diffusion
    from cm.script_util import create_ema_and_scales_fn

    found: dict[str, np.ndarray] = {}
    for name, (distils, norm, weight) in CASES.items():
        diffusion = karras_diffusion.KarrasDenoiser(weight_schedule=weight, distillation=True, loss_norm=norm)
        w = weights(1).requires_grad_()
        torch_randint, torch.randint = torch.randint, lambda *a, **k: indices()
        terms = diffusion.consistency_losses(
            theirs(w), 0.5 * drawn(0), SCALES, target_model=theirs(weights(2)), noise=drawn(3),
            teacher_model=theirs(weights(4)) if distils else None,
            teacher_diffusion=karras_diffusion.KarrasDenoiser(loss_norm=norm) if distils else None,
        )  # fmt: skip
        torch.randint = torch_randint
        terms["loss"].mean().backward()
        found[f"{name}/loss"], found[f"{name}/grad"] = terms["loss"].detach().numpy(), w.grad.numpy()
    for name, (first, last, steps) in SCHEDULES.items():
        scales_of = create_ema_and_scales_fn("adaptive", 0.95, "progressive", first, last, steps, 0)
        found[f"{name}/scales"] = np.array([scales_of(step)[1] for step in STEPS_OF_RUN])
    diffusion = karras_diffusion.KarrasDenoiser(distillation=True, loss_norm="l2")
    answer = lambda x, sigma: diffusion.denoise(theirs(weights(1)), x, sigma)[1].clamp(-1, 1)  # noqa: E731
    x = karras_diffusion.stochastic_iterative_sampler(
        answer, 80.0 * drawn(8), None, Noise(), LEVELS_DRAWN, steps=SCALES
    )
    found["two_steps"] = x.numpy()
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
