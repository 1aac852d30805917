"""Drawing into an image: a denoiser that is given, beside x_t on channels, the mask and the latents of the image without what it covers.

Source: Rombach et al. 2022, section 4.5 and appendix D.7; Stable Diffusion's inpainting model, whose network takes 4 + 1 + 4 channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Cond, Draws, Request, UserError
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.latents import normalise, split_moments

MASK, LEFT = "mask", "masked_moments"
"""Fields: 1 where the image is drawn anew, (B, 1, h, w); moments of the image without that, (B, 2C, h, w)."""


class Inpainting(Denoising):
    """As `Denoising` on moments, with `mask` and the mean of `masked_moments` beside x_t, in this order, in training and in drawing;
    neither is ever dropped. Precompute_latents makes both (`masks: true`).
    """

    @property
    def fields(self) -> Sequence[str]:
        if self.input != "moments" or self.mirror or self.coupling.fields:
            raise UserError(
                f"objective: inpainting learns moments with a mask of each, which cannot be flipped; got input {self.input}, mirror "
                f"{self.mirror}, coupling {self.coupling}: leave them out"
            )
        return (*super().fields, MASK, LEFT)

    def condition(self, batch: Batch | Cond) -> dict[str, Tensor]:
        beside = {name: batch[name].float() for name in (MASK, LEFT) if name in batch}
        return {**super().condition(batch), **beside}

    def beside(self, x: Tensor, cond: Cond) -> Tensor:
        if LEFT not in cond:
            raise UserError(
                f"objective inpainting draws into pictures, and was told no {MASK} and {LEFT}: `nexus sample` takes --image and --mask; "
                "generate and score draw from prompts alone"
            )
        left = normalise(split_moments(cond[LEFT])[0], self.latents)  # (B, C, h, w)
        return torch.cat([x, cond[MASK].to(x.dtype), left.to(x.dtype)], dim=1)

    @property
    def draws(self) -> Draws:
        return replace(super().draws, draws_into=True)

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        cond, request = super().request_like(batch, request)
        return {**cond, MASK: batch[MASK], LEFT: batch[LEFT]}, request
