"""What Gsunshine/py-meanflow computes on known inputs: `python -m tests.golden.mean_flow FOLDER`.

FOLDER is a checkout of it. Writes mean_flow.npz beside this file: losses and gradients at given times, and how its two ways of drawing
times make t and r of given draws.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.golden.consistency import drawn

FILE = Path(__file__).with_suffix(".npz")
SHAPE = (6, 3, 4, 5)
CASES = {"paper": (1.0, 0.01), "cifar": (0.75, 1e-3)}
"""Power and offset of the weight."""
TIMES = {"v0": (-0.4, 1.0, -0.4, 1.0), "v1": (-0.6, 1.6, -4.0, 1.6)}
"""Means and deviations of t and r before the sigmoid."""


def times() -> tuple[Tensor, Tensor]:
    """t and r, some of them equal."""
    t = torch.tensor([0.9, 0.5, 0.7, 0.3, 0.99, 0.2])
    return t, torch.tensor([0.1, 0.5, 0.2, 0.3, 0.0, 0.15])


def weights(seed: int) -> Tensor:
    return drawn(seed, (4,))


def network(z: Tensor, t: Tensor, span: Tensor, w: Tensor) -> Tensor:
    """A smooth network of four weights."""
    t, span = t[:, None, None, None], span[:, None, None, None]
    return (
        w[0] * z
        + w[1] * torch.tanh(2 * z) * torch.cos(3 * t)
        + w[2] * span * z.roll(1, -1)
        + w[3] * torch.sin(2 * span)
    )


def uniforms() -> Tensor:
    """By row: of t, of r, and of whether they differ."""
    generator = np.random.Generator(np.random.PCG64(7))
    return torch.from_numpy(generator.uniform(0.01, 0.99, (3, 64)).astype(np.float32))


def main() -> None:
    sys.path.insert(0, f"{sys.argv[1]}/meanflow")
    from models import meanflow, time_sampler

    found: dict[str, np.ndarray] = {}
    x, noise, given = drawn(0, SHAPE), drawn(1, SHAPE), weights(2)
    for name, (power, offset) in CASES.items():
        w = given.clone().requires_grad_()

        def net(z: Tensor, of_times: tuple[Tensor, Tensor], aug: Any, w: Tensor = w) -> Tensor:
            return network(z, *of_times, w)

        meanflow.sample_two_timesteps = lambda *args, **kwargs: times()
        randn_like, torch.randn_like = torch.randn_like, lambda *args, **kwargs: noise
        owner = SimpleNamespace(net=net, args=SimpleNamespace(norm_p=power, norm_eps=offset))
        loss = meanflow.MeanFlow.forward_with_loss(owner, x, None)
        torch.randn_like = randn_like
        loss.backward()
        found[f"{name}/loss"], found[f"{name}/grad"] = loss.detach().numpy(), w.grad.numpy()  # type: ignore[union-attr]
    for name, (mean_t, std_t, mean_r, std_r) in TIMES.items():
        of_t, of_r, apart = uniforms()
        normals = iter([torch.special.ndtri(of_t.double()).float(), torch.special.ndtri(of_r.double()).float()])
        time_sampler.torch = SimpleNamespace(
            **{**vars(torch), "randn": lambda *a, **k: next(normals), "rand": lambda *a, apart=apart, **k: 1 - apart}  # noqa: B023
        )
        args = SimpleNamespace(
            tr_sampler=name, P_mean_t=mean_t, P_std_t=std_t, P_mean_r=mean_r, P_std_r=std_r, ratio=0.75
        )
        found[f"{name}/t"], found[f"{name}/r"] = (
            one.numpy() for one in time_sampler.sample_two_timesteps(args, 64, None)
        )
    np.savez_compressed(FILE, **found)


if __name__ == "__main__":
    main()
