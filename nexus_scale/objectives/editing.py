"""Pictures changed as a text asks: a denoiser that is given, beside x_t on channels, the latents of the picture that is to be changed.

Source: Brooks et al. 2023, "InstructPix2Pix: Learning to follow image editing instructions", whose guidance has two scales.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nexus_scale.contracts import Batch, Cond, Draws, Guidance, Nets, NoiseSampler, Rng, Start, UserError
from nexus_scale.objectives.conditions import null_condition
from nexus_scale.objectives.denoising import Denoising
from nexus_scale.processes.guidance import guide_apart
from nexus_scale.processes.latents import split_moments

SOURCE = "source"
"""A condition: moments of the picture that is changed, (B, 2C, h, w), which sources of data call so (`named`)."""


class Editing(Denoising):
    """As `Denoising` on moments, with the mean of `source`, as the autoencoder gives it, beside x_t. Where it is dropped it is zeros:
    `condition_drop: {text: 0.05, source: 0.05, text+source: 0.05}` is InstructPix2Pix's.

    In drawing `guidance.scale` leads away from no text, and `guidance.image` from no picture.
    """

    @property
    def fields(self) -> Sequence[str]:
        if SOURCE not in self.conditions or SOURCE in self.latent_conditions or self.input != "moments" or self.mirror:
            raise UserError(
                f"objective: editing learns moments told a {SOURCE!r}, which cannot be flipped; got conditions {list(self.conditions)}, "
                f"latent_conditions {list(self.latent_conditions)}, input {self.input}, mirror {self.mirror}"
            )
        return super().fields

    def condition(self, batch: Batch | Cond) -> dict[str, Tensor]:
        cond = super().condition(batch)
        return {**cond, SOURCE: split_moments(cond[SOURCE])[0]}

    def beside(self, x: Tensor, cond: Cond) -> Tensor:
        return x if SOURCE not in cond else torch.cat([x, cond[SOURCE].to(x.dtype)], dim=1)

    @property
    def draws(self) -> Draws:
        draws = super().draws
        return replace(draws, encoded=(*draws.encoded, SOURCE), guides_pictures=True)

    def _walked(
        self,
        nets: Nets,
        sampler: NoiseSampler,
        guidance: Guidance,
        given: Cond,
        null: Cond,
        noise: Tensor,
        rng: Rng,
        progress: Callable[[int, int], None],
        start: Start | None = None,
    ) -> Tensor:
        """Three predictions: told the text and the picture, the picture alone, and nothing; a negative text is told beside the picture."""
        if SOURCE not in given or (guidance.scale == 1 and guidance.image == 1):
            return super()._walked(nets, sampler, guidance, given, null, noise, rng, progress, start)
        pictured = {**null, SOURCE: given[SOURCE]}
        nothing = null_condition(pictured, [SOURCE])
        nothing = {name: value for name, value in nothing.items() if name in pictured}
        denoise = guide_apart(
            lambda cond: self.predictor(nets, cond, variance=sampler.learns_variance),
            [(given, guidance.scale), (pictured, guidance.image - guidance.scale), (nothing, 1 - guidance.image)],
        )
        return sampler.sample(
            denoise, noise, path=self.path, rng=rng, callback=lambda step, t, x, x0: progress(step, sampler.steps),
            start=start,
        )  # fmt: skip
