"""Euler's ancestral sampler: a step down in sigma / alpha beyond the next level, and fresh noise back up to it.

With eta = 1 on the same grid it is DDPM with the posterior's variance; see `samplers.grid.toward`.
Source: k-diffusion, sample_euler_ancestral.
"""

from __future__ import annotations

from dataclasses import dataclass

from nexus_scale.samplers.ddim import DDIM
from nexus_scale.samplers.grid import Share


@dataclass(kw_only=True)
class EulerAncestral(DDIM):
    """First order, with fresh noise in each step.

    Attributes:
        eta: the share of noise; 0 is `euler`.
    """

    eta: Share = 1.0

    ends_at_ratio = True
