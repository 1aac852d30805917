"""Where a walk begins: in noise, or at samples that are given and noised as far as they are to be drawn anew."""

from __future__ import annotations

from torch import Tensor

from nexus_scale.contracts import Start, UserError
from nexus_scale.processes.gaussian import add_noise
from nexus_scale.processes.paths import Path


def first_step(start: Start | None, steps: int) -> int:
    """The step that a walk of `steps` begins with: 0 from noise, else as diffusers counts it, so that the last strength * steps are left,
    rounded down.

    Raises:
        UserError: none is left.
    """
    if start is None:
        return 0
    left = min(int(steps * start.strength), steps)
    if left < 1:
        raise UserError(
            f"strength {start.strength:g} of {steps} steps leaves none; give a strength of at least {1 / steps:.3g}, or more steps"
        )
    return steps - left


def noised(start: Start, path: Path, t: float, noise: Tensor) -> Tensor:
    """The given samples at time t, (B, ...) float32."""
    time = noise.new_full((len(noise),), t)
    return add_noise(path, start.x0.to(noise.dtype), noise, time)
