"""ControlNet of an MMDiT (Stable Diffusion 3): its first blocks, copied, learn to follow a picture's latents.

Source: Zhang et al. 2023, "Adding conditional control to text-to-image diffusion models"; diffusers' SD3ControlNetModel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nexus_scale.contracts import Cond, UserError
from nexus_scale.models.adapters.residuals import OnTokens
from nexus_scale.models.diffusion.mmdit import MMDiT


class MMDiTControlNet(OnTokens):
    """Copies of an `mmdit`'s first blocks, which are also given a picture as latents. It begins with the base's weights by `init_from`."""

    def __init__(
        self,
        *,
        base: Callable[[], MMDiT],
        condition: str = "control",
        condition_channels: int = 16,
        depth: int = 12,
    ):
        """
        Args:
            base: makes the controlled network; the program gives it.
            condition: the picture that it follows, by its name among the conditions: latents (B, condition_channels, h, w), normalised as
                those that are drawn (`objective.latent_conditions`).
            depth: blocks of the copy, fewer than the base's.
        """
        with torch.device("meta"):
            made = base()
        if not isinstance(made, MMDiT):
            raise UserError(f"mmdit_control_net: adapts a {type(made).__name__}; expected an mmdit")
        if not 0 < depth < made.depth:
            raise UserError(
                f"mmdit_control_net.depth: got {depth}; expected 1 to {made.depth - 1}, below the base's blocks"
            )
        twin = base()
        twin.cut(depth)
        super().__init__(made, twin, condition, condition_channels, {"block_projs": depth})
        self.depth = depth

    def residuals(self, x: Tensor, t: Tensor, cond: Cond) -> list[Tensor]:
        self.twin.compiled = self.compiled
        img, txt, told = self.twin.taken(x, t, cond)
        img = self.joined(img, x, cond)
        found = []
        for number, block in enumerate(self.twin.joint_blocks):
            img, txt = block(img, txt, *told)
            found.append(self.proj(number, img))
        assert isinstance(self.base, MMDiT)
        places = self.base.depth
        return [found[int(place / (places / len(found)))] for place in range(places - 1)]
