"""DDIM: the chain without noise (eta = 0), DDPM's (eta = 1), or between.

On EDM's path its step is `euler`'s, and with eta 1 `euler_ancestral`'s; those scale the first noise as k-diffusion does.

Source: Song et al. 2021, "Denoising Diffusion Implicit Models", equation 12.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from nexus_scale.samplers.grid import Share, Stepwise, Walk, toward


@dataclass(kw_only=True)
class DDIM(Stepwise):
    """First order; draws noise if eta is above 0.

    Attributes:
        eta: the share of DDPM's noise.
        keeps_eps: eps stays the network's where x0 is clipped, as in diffusers; else it is what the clipped x0 leaves of x_t.
    """

    eta: Share = 0.0
    keeps_eps: bool = False

    def solve(self, walk: Walk, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for i, (here, there) in enumerate(walk.pairs):
            x0, eps = walk.predict(x, here, self.keeps_eps)
            x, std = toward(x0, eps, here, there, self.eta)
            if std > 0:
                x = x + std * walk.noise(f"noise_{i}", x)
            yield x, x0
