"""Clips that begin as a picture: a denoiser that is given the picture's latents, and zeros behind them, beside x_t on channels.

Source: Yang et al. 2024, "CogVideoX", section on image to video, whose network takes 16 + 16 channels; diffusers'
CogVideoXImageToVideoPipeline. Noise on the picture, and clips that are shown without one, as there in training, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus_scale.contracts import Batch, Cond, Draws, Request, Rng, UserError
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.latents import normalise, split_moments

FIRST = "first_moments"
"""A condition: moments of the picture that a clip begins as, (B, 2C, 1, h, w)."""


class FirstFrame(Denoising):
    """As `Denoising` on moments of clips, with the mean of their first latent frame, and zeros behind, beside x_t: in training their own,
    which is a picture's, since autoencoders of clips read no later frames for it. It is never dropped.
    """

    @property
    def fields(self) -> Sequence[str]:
        if self.input != "moments" or self.mirror or self.coupling.fields:
            raise UserError(
                f"objective: first_frame learns moments of clips, which cannot be flipped; got input {self.input}, mirror {self.mirror}, "
                f"coupling {self.coupling}: leave them out"
            )
        return super().fields

    def told_of(self, batch: Batch, rng: Rng, train: bool) -> dict[str, Tensor]:
        return {**super().told_of(batch, rng, train), FIRST: self._first(batch)}

    def _first(self, batch: Batch) -> Tensor:
        if f"{self.input}_mask" in batch:
            raise UserError(
                "objective: first_frame learns clips of one length each; leave frames of many lengths out of the data",
                3,
            )
        return batch[self.input][:, :, :1].float()

    def condition(self, batch: Batch | Cond) -> dict[str, Tensor]:
        beside = {FIRST: batch[FIRST].float()} if FIRST in batch else {}
        return {**super().condition(batch), **beside}

    def beside(self, x: Tensor, cond: Cond) -> Tensor:
        if FIRST not in cond:
            raise UserError(
                "objective first_frame draws clips that begin as a picture, and was told none: `nexus sample` takes --image; generate and "
                "score draw from prompts alone"
            )
        first = normalise(split_moments(cond[FIRST])[0], self.latents)  # (B, C, 1, h, w)
        behind = F.pad(first, (0, 0, 0, 0, 0, x.shape[2] - 1))
        return torch.cat([x, behind.to(x.dtype)], dim=1)

    @property
    def draws(self) -> Draws:
        draws = super().draws
        return replace(draws, begins=FIRST, takes=draws.takes - {"strength", "mask"})

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        cond, request = super().request_like(batch, request)
        return {**cond, FIRST: self._first(batch)}, request
