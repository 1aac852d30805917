"""ControlNet of FLUX: its first blocks of both kinds, copied, learn to follow a picture's latents.

Source: Zhang et al. 2023, "Adding conditional control to text-to-image diffusion models"; diffusers' FluxControlNetModel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nexus_scale.contracts import Cond, UserError
from nexus_scale.models.adapters.residuals import OnTokens
from nexus_scale.models.diffusion.flux import Flux


class FluxControlNet(OnTokens):
    """Copies of a `flux`'s first blocks, which are also given a picture as latents. It begins with the base's weights by `init_from`."""

    def __init__(
        self,
        *,
        base: Callable[[], Flux],
        condition: str = "control",
        condition_channels: int = 16,
        depth_double: int = 4,
        depth_single: int = 10,
    ):
        """
        Args:
            base: makes the controlled network; the program gives it.
            condition: the picture that it follows, by its name among the conditions: latents (B, condition_channels, h, w), normalised as
                those that are drawn (`objective.latent_conditions`).
            depth_double, depth_single: blocks of the copy; of one stream there may be none, and then nothing is added behind such blocks.
        """
        with torch.device("meta"):
            made = base()
        if not isinstance(made, Flux):
            raise UserError(f"flux_control_net: adapts a {type(made).__name__}; expected a flux")
        if not 0 < depth_double <= made.depth_double or not 0 <= depth_single <= made.depth_single:
            raise UserError(
                f"flux_control_net: got depth_double {depth_double}, depth_single {depth_single}; expected 1 to {made.depth_double}, and 0 "
                f"to {made.depth_single}"
            )
        twin = base()
        twin.cut(depth_double, depth_single)
        projs = {"double_projs": depth_double, "single_projs": depth_single}
        super().__init__(made, twin, condition, condition_channels, projs)
        self.depth_double, self.depth_single = depth_double, depth_single

    def residuals(self, x: Tensor, t: Tensor, cond: Cond) -> list[Tensor | None]:
        self.twin.compiled = self.compiled
        img, txt, silu_c, joint = self.twin.taken(x, t, cond)
        found: list[Tensor] = []

        def see(number: int, img: Tensor) -> None:
            found.append(self.proj(number, img))

        self.twin.transformed(self.joined(img, x, cond), txt, silu_c, joint, see)
        assert isinstance(self.base, Flux)
        double, single = found[: self.depth_double], found[self.depth_double :]
        return [*_spread(double, self.base.depth_double), *_spread(single, self.base.depth_single)]


def _spread(found: Sequence[Tensor], places: int) -> list[Tensor | None]:
    """For each of the base's blocks what is added behind it."""
    if not found:
        return [None] * places
    each = -(-places // len(found))
    return [found[place // each] for place in range(places)]
