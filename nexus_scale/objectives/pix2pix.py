"""Image-to-image translation from pairs: a generator that is told an image, and a critic of pairs that is told it, too.

Source: Isola et al. 2017, "Image-to-Image Translation with Conditional Adversarial Networks", section 3 and appendix 6.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nexus_scale.contracts import (
    Batch,
    Cond,
    Draws,
    Generated,
    Loss,
    Nets,
    Objective,
    Phase,
    Request,
    Rng,
    UserError,
)
from nexus_scale.objectives.patch_losses import IMAGE, SOURCE, PatchLosses, distance, fooled, judged
from nexus_scale.processes.pixels import mirrored, pixels_of


class Pix2Pix(Objective):
    """`model: model(source) -> image`, and `critic: critic(source and image on channels) -> logits`, (B, 1, h, w), one for each patch.

    generator loss = the critic's part + l1_weight * mean absolute error; critic loss = half of the sum over data and translations. Draws,
    by name: `mirror`.
    """

    def __init__(self, *, losses: PatchLosses = "logistic", l1_weight: float = 100.0, mirror: bool = False):
        """
        Args:
            losses: of the critic.
            mirror: flip each training pair left to right with probability 1/2.
        """
        if l1_weight < 0:
            raise UserError(f"objective.l1_weight: got {l1_weight}; expected 0 or more")
        self.losses, self.l1_weight, self.mirror = losses, l1_weight, mirror

    @property
    def needs(self) -> Sequence[str]:
        return ("model", "critic")

    @property
    def fields(self) -> Sequence[str]:
        return (SOURCE, IMAGE)

    def phases(self, step: int) -> Sequence[Phase]:
        return (Phase("critic", trains="critic"), Phase("generator", trains="model", draws=False))

    def loss(self, phase: str, nets: Nets, batch: Batch, rng: Rng, step: int) -> Loss:
        """Mean over samples. Metrics of `critic`: `loss`, and `real`, `fake`, its mean logits; of `generator`: `loss` and its parts
        `adversarial` and `l1`, unweighted."""
        source, image = (mirrored(x, rng) if self.mirror else x for x in _pair(batch))  # of a pair both or none
        if phase == "generator":
            made = nets["model"](source).float()
            adversarial, l1 = fooled(self.losses, nets["critic"](torch.cat([source, made], 1))), distance(made, image)
            parts = {"adversarial": adversarial, "l1": l1.mean()}
            total = adversarial + self.l1_weight * parts["l1"]
        else:
            with torch.no_grad():
                made = nets["model"](source).float()
            real, fake = (nets["critic"](torch.cat([source, x], 1)) for x in (image, made))
            parts = {"real": real.float().mean(), "fake": fake.float().mean()}
            total = judged(self.losses, real, fake)
        return Loss(total, {name: value.detach() for name, value in {"loss": total, **parts}.items()})

    def validate(self, nets: Nets, batch: Batch, rng: Rng) -> Mapping[str, Tensor]:
        """`loss`, the mean absolute error of translations, `loss_zero` of grey ones, and where sources are as images are, `identity`: of
        sources left as they are; each (B,)."""
        source, image = _pair(batch)
        found = {"loss": distance(nets["model"](source), image), "loss_zero": image.abs().flatten(1).mean(1)}
        return {**found, "identity": distance(source, image)} if source.shape == image.shape else found

    # ------------------------------------------------------------------------------------------- generation

    @property
    def draws(self) -> Draws:
        return Draws(IMAGE, takes=frozenset({"image"}), given=(SOURCE,))

    def request_like(self, batch: Batch, request: Request) -> tuple[Cond, Request]:
        source, image = _pair(batch)
        return {}, replace(request, shape=tuple(image.shape[1:]), given={SOURCE: source})

    def generate(self, nets: Nets, cond: Cond, request: Request, rng: Rng) -> Generated:
        """The translation of each source that is given, (B, C, H, W) in [-1, 1]."""
        return Generated(nets["model"](request.given[SOURCE]).float())


def _pair(batch: Batch) -> tuple[Tensor, Tensor]:
    return pixels_of(batch, SOURCE), pixels_of(batch, IMAGE)
